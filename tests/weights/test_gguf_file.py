from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sl_serve.config import RopeConfig
from sl_serve.errors import CheckpointError, ModelError, UserError
from sl_serve.weights.checkpoint import open_checkpoint
from tests.weights.tiny_models import permuted, tiny_llama, write_tiny_gguf

Kind = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_reads_what_was_stored(tmp_path: Path, kind: Kind) -> None:
    model = tiny_llama(attention_bias=True)
    path = tmp_path / "x.gguf"
    stored = write_tiny_gguf(path, model, quantisation=kind)
    checkpoint = open_checkpoint(path)
    state = model.state_dict()
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        ours = checkpoint.read(name)
        assert ours.dtype == torch.float32
        assert checkpoint.shape(name) == tuple(ours.shape) == tuple(tensor.shape)
        torch.testing.assert_close(ours, tensor, atol=0.0 if kind == Kind.F32 else 0.02, rtol=0)
    q_name = "model.layers.1.self_attn.q_proj.weight"
    again = permuted(checkpoint.read(q_name).numpy(), n_heads=4)
    assert np.array_equal(again, stored["blk.1.attn_q.weight"])


def test_tensors_equal_transformers(tmp_path: Path) -> None:
    """Several kinds of heads; transformers undoes the permutation on its own."""
    write_tiny_gguf(
        tmp_path / "x.gguf",
        tiny_llama(tie_word_embeddings=True),
        quantisation=Kind.Q8_0,
        settings={"general.name": "tiny"},
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    )
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    state = reference.state_dict()
    assert checkpoint.config.tie_embeddings
    assert set(checkpoint.names()) == set(state) - {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), state[name])


def test_smollm2_config_equals_transformers(smollm2_path: Path) -> None:
    ours = open_checkpoint(smollm2_path).config
    theirs = AutoConfig.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert (ours.n_layers, ours.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert (ours.n_heads, ours.n_kv_heads) == (9, 3)
    assert (ours.n_heads, ours.n_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.head_dim == theirs.head_dim
    assert ours.vocab_size == theirs.vocab_size
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.ropes == (RopeConfig(theirs.rope_parameters["rope_theta"]),)
    assert ours.tie_embeddings is theirs.tie_word_embeddings is True
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.bos_token_id == theirs.bos_token_id


def test_smollm2_tensors_equal_the_package_reader(smollm2_path: Path) -> None:
    """Bit for bit; q and k against the permutation written out element by element."""
    checkpoint = open_checkpoint(smollm2_path)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    assert len(checkpoint.names()) == len(reader) == 272
    for name, gguf_name, n_heads in (
        ("model.norm.weight", "output_norm.weight", None),
        ("model.embed_tokens.weight", "token_embd.weight", None),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight", None),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight", None),
        ("model.layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight", 9),
        ("model.layers.7.self_attn.k_proj.weight", "blk.7.attn_k.weight", 3),
    ):
        raw = reader[gguf_name]
        expected = gguf.dequantize(raw.data, raw.tensor_type)
        ours = checkpoint.read(name).numpy()
        assert np.array_equal(ours if n_heads is None else permuted(ours, n_heads), expected)


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 5e5), (32.0, 5e5)])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float, theta: float) -> None:
    """The factors are computed from transformers' rotary embedding, with and without scaling."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = {"rope_type": "default", "rope_theta": theta}
    model = tiny_llama(head_dim=64)
    frequencies = [
        LlamaRotaryEmbedding(LlamaConfig(head_dim=64, rope_parameters=parameters)).inv_freq
        for parameters in (plain, scaling)
    ]
    factors = (frequencies[0] / frequencies[1]).numpy()
    assert len(set(factors.round(3))) > 3  # kept, blended and slowed ones
    path = tmp_path / "x.gguf"
    settings = {"llama.attention.key_length": 64, "llama.rope.freq_base": theta}
    write_tiny_gguf(path, model, settings=settings, tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.ropes == (RopeConfig(theta, "llama3", factor, 1.0, 4.0, 8192),)
    assert "rope_freqs.weight" not in checkpoint.names()
    nearly = factors * np.where(np.arange(len(factors)) == 5, 1.01, 1).astype(np.float32)
    for others in (nearly, factors * 0, factors * 1e-9):
        write_tiny_gguf(path, model, settings=settings, tensors={"rope_freqs.weight": others})
        with pytest.raises(ModelError, match="rope_freqs"):
            open_checkpoint(path)


def test_linear_scaling_and_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    settings = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eot_token_id": 11,
        "tokenizer.ggml.bos_token_id": 5000,
    }
    write_tiny_gguf(path, tiny_llama(mlp_bias=True), settings=settings)
    config = open_checkpoint(path).config
    assert config.ropes == (RopeConfig(10000.0, "linear", 4.0),)
    assert config.eos_token_ids == (7, 11)
    assert config.bos_token_id is None
    assert (config.attention_bias, config.mlp_bias, config.tie_embeddings) == (False, True, False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"general.architecture": "mamba"}}, "mamba.*supported: .*llama"),
        ({"settings": {"llama.expert_count": 8}}, "no place in a model of type mixtral"),
        ({"settings": {"llama.expert_used_count": 2}}, "expert_used_count 2"),
        ({"settings": {"llama.expert_count": 2**31}}, "expert_count must be an integer from 0 to"),
        ({"settings": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.factor is missing"),
        ({"settings": {"llama.rope.scaling.type": "spiral"}}, "spiral"),
        ({"settings": {"llama.rope.scaling.type": "longrope"}}, "long-RoPE needs rope_factors_"),
        ({"settings": {"llama.rope.scaling.attn_factor": 2.0}}, "attn_factor 2.0"),
        ({"settings": {"llama.attention.sliding_window_pattern": 6}}, "sliding_window_pattern"),
        ({"settings": {"llama.logit_scale": 2.0}}, "the setting 'llama.logit_scale'"),
        ({"settings": {"llama.rope.dimension_count": 8}}, "dimension_count 8"),
        ({"settings": {"llama.attention.value_length": 8}}, "value_length 8"),
        ({"settings": {"split.count": 3}}, "split.no is missing"),
        ({"settings": {"llama.block_count": None}}, "block_count is missing"),
        ({"settings": {"llama.attention.head_count": [4, 4]}}, "head_count must be an integer"),
        ({"settings": {"llama.expert_count": [4, 4]}}, "expert_count"),
        ({"settings": {"llama.attention.head_count_kv": 3}}, "4 heads cannot share 3"),
        ({"settings": {"llama.attention.head_count_kv": [2, 2]}}, "num_key_value_heads must be"),
        ({"tensors": {"blk.2.attn_q.weight": np.zeros(4, np.float32)}}, "blk.2.attn_q"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "attn_sinks"),
        ({"tensors": {"blk.00.attn_q.weight": np.zeros(4, np.float32)}}, "blk.00"),
        ({"without": ("token_embd.weight",)}, "no embeddings"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = tmp_path / "x.gguf"
    write_tiny_gguf(path, tiny_llama(), **changes)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(path)


def test_a_type_nobody_dequantises_is_refused_before_loading(tmp_path: Path) -> None:
    architecture = struct.pack("<Q", 5) + b"llama"
    content = raw_gguf(
        n_tensors=1,
        settings=(setting(b"general.architecture", 8, architecture),),
        rest=tensor(b"output.weight", (4,), Kind.I32) + bytes(64),
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="type I32"):
        open_checkpoint(path)


def raw_gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int = 0,
    settings: tuple[bytes, ...] = (),
    n_settings: int | None = None,
    rest: bytes = b"",
) -> bytes:
    count = len(settings) if n_settings is None else n_settings
    return magic + struct.pack("<IQQ", version, n_tensors, count) + b"".join(settings) + rest


def setting(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)


HOSTILE = {
    "magic": raw_gguf(magic=b"GGUX"),
    "version 1": raw_gguf(version=1),
    "big-endian": raw_gguf(version=0x03000000),
    "count of tensors": raw_gguf(n_tensors=2**63),
    "count of settings": raw_gguf(n_settings=2**64 - 1),
    "long key": raw_gguf(n_settings=1, rest=struct.pack("<Q", 2**64 - 1) + bytes(50)),
    "long text": raw_gguf(settings=(setting(b"a", 8, struct.pack("<Q", 2**63)),)),
    "unknown value type": raw_gguf(settings=(setting(b"a", 77, bytes(8)),)),
    "array of arrays": raw_gguf(settings=(setting(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(30)),)),
    "long array": raw_gguf(settings=(setting(b"a", 9, struct.pack("<IQ", 10, 2**61)),)),
    "long list of texts": raw_gguf(settings=(setting(b"a", 9, struct.pack("<IQ", 8, 2**61)),)),
    "text in a list": raw_gguf(
        settings=(setting(b"a", 9, struct.pack("<IQQQ", 8, 2, 2**64 - 8, 0)),)
    ),
    "not utf-8": raw_gguf(settings=(setting(b"\xff\xfe", 0, b"\x00"),)),
    "key twice": raw_gguf(settings=(setting(b"a", 0, b"\x00"),) * 2, rest=bytes(32)),
    "alignment zero": raw_gguf(settings=(setting(b"general.alignment", 4, bytes(4)),)),
    "alignment of 3": raw_gguf(settings=(setting(b"general.alignment", 4, struct.pack("<I", 3)),)),
    "no sizes": raw_gguf(n_tensors=1, rest=tensor(b"a", ()) + bytes(64)),
    "five sizes": raw_gguf(n_tensors=1, rest=tensor(b"a", (1,) * 5) + bytes(64)),
    "size zero": raw_gguf(n_tensors=1, rest=tensor(b"a", (0,)) + bytes(64)),
    "product overflows": raw_gguf(n_tensors=1, rest=tensor(b"a", (2**32, 2**32, 4)) + bytes(64)),
    "offset overflows": raw_gguf(n_tensors=1, rest=tensor(b"a", (4,), 0, 2**64 - 32) + bytes(64)),
    "offset unaligned": raw_gguf(n_tensors=1, rest=tensor(b"a", (4,), 0, 5) + bytes(64)),
    "unknown tensor type": raw_gguf(n_tensors=1, rest=tensor(b"a", (32,), 4) + bytes(64)),
    "part of a block": raw_gguf(n_tensors=1, rest=tensor(b"a", (33,), 2) + bytes(64)),
    "tensor twice": raw_gguf(n_tensors=2, rest=tensor(b"a", (1,)) * 2 + bytes(64)),
    "overlap": raw_gguf(
        n_tensors=2, rest=tensor(b"a", (9,)) + tensor(b"b", (1,), 0, 32) + bytes(99)
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    small_llama = tiny_llama(hidden_size=8, intermediate_size=8, vocab_size=6, num_hidden_layers=1)
    settings = {
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>", "c", "ac"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 1, 1],
        "tokenizer.ggml.merges": ["a b", "a c"],
        "tokenizer.ggml.bos_token_id": 3,
    }
    write_tiny_gguf(path, small_llama, settings=settings)
    return path


def test_every_truncation_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(small).tensors)
    in_data = range(int(gguf.GGUFReader(small).data_offset), int(end), 37)
    for size in (*range(in_data.start), *in_data, int(end) - 1):
        small.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(small)
    small.write_bytes(whole[:end])
    assert open_checkpoint(small).load_tokenizer().encode("abac") == [2, 5]


def test_damage_never_ends_in_another_error(small: Path) -> None:
    whole = small.read_bytes()
    header_bytes = gguf.GGUFReader(small).data_offset
    generator = random.Random(1)
    n_refused = 0
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(int(header_bytes))] = generator.choice([0, 1, 9, 127, 255])
        small.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(small)
            for name in checkpoint.names():
                assert tuple(checkpoint.read(name).shape) == checkpoint.shape(name)
            checkpoint.load_tokenizer().encode("abc <x>")
        except UserError:
            n_refused += 1
    assert 200 < n_refused < 800
