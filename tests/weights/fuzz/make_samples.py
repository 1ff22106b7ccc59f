"""Small valid checkpoints of every kind that is read, written by the formats' own libraries."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from sl_serve.config import RopeConfig
from sl_serve.weights.gguf_rope import LLAMA3_FACTORS, llama3_rope_factors
from tests.models import tiny_opt, write_tokenizer
from tests.weights.fuzz.sample import GgufParts, Sample
from tests.weights.published_models import (
    awq,
    gptq,
    one_byte,
    pack_experts,
    pack_quantized,
    write_stored_blocks,
)
from tests.weights.published_models import write as write_published
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

Kind = gguf.GGMLQuantizationType

# As few elements as can be, so that most of a file is its header.
SMALL_LLAMA = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
SMALL_OPT = {
    "hidden_size": 8,
    "ffn_dim": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
THETA = 500000.0
BYTE_LEVEL = {
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>", "c", "ac"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 1, 1],
    "tokenizer.ggml.merges": ["a b", "a c"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "\u2581a", "aa"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1],
    "tokenizer.ggml.eos_token_id": 2,
}


def make_samples() -> list[Sample]:
    """The same ones each time."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_folders(Path(folder)), *_published(Path(folder)), *_ggufs(Path(folder))]


def _folders(root: Path) -> list[Sample]:
    llama = tiny_llama(**SMALL_LLAMA, num_hidden_layers=2)
    scaling = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    short = tiny_llama(**SMALL_LLAMA, num_hidden_layers=1, rope_parameters=scaling)
    tied = tiny_llama(**SMALL_LLAMA, num_hidden_layers=1, tie_word_embeddings=True)
    narrow = tiny_opt(**SMALL_OPT, do_layer_norm_before=False, word_embed_proj_dim=4)
    return [
        _folder(root / "llama", short.to(torch.bfloat16)),
        _folder(root / "llama-tied", tied.to(torch.float16)),
        _folder(root / "llama-shards", llama, max_shard_size="2KB"),
        _folder(root / "opt", narrow),
    ]


def _published(root: Path) -> list[Sample]:
    sizes = SMALL_LLAMA | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    of_name = {
        "gptq": (gptq(group=32), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        "awq": (awq(16), {"quant_method": "awq", "bits": 4, "group_size": 16}),
        "packed": (pack_quantized(8, 16, symmetric=False), packed),
        "fp8": (
            one_byte("fp8", (16, 16), suffix="weight_scale_inv"),
            {"quant_method": "fp8", "weight_block_size": [16, 16]},
        ),
    }
    for name, (pack, settings) in of_name.items():
        (root / name).mkdir()
        write_published(root / name, pack, settings, **sizes)
    write_stored_blocks(root / "stored-blocks", "int4_g32_min", **sizes)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    GptOssForCausalLM(GptOssConfig(**sizes, **experts)).save_pretrained(root / "mxfp4")
    write_tokenizer(root / "mxfp4")
    pack_experts(root / "mxfp4")
    return [_sample(root / name) for name in (*of_name, "stored-blocks", "mxfp4")]


def _folder(path: Path, model: PreTrainedModel, **options: Any) -> Sample:
    model.save_pretrained(path, **options)
    write_tokenizer(path)
    return _sample(path)


def _sample(path: Path) -> Sample:
    return Sample(path.name, {file.name: file.read_bytes() for file in sorted(path.iterdir())})


def _ggufs(root: Path) -> list[Sample]:
    one_layer = SMALL_LLAMA | {"num_hidden_layers": 1}
    blocks = one_layer | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 8}
    rope = RopeConfig(THETA, "llama3", 8.0)
    factors = np.array(llama3_rope_factors(rope, 8), dtype=np.float32)
    scaled = {"llama.attention.key_length": 8, "llama.rope.freq_base": THETA}
    write_tiny_gguf(root / "plain.gguf", tiny_llama(**one_layer), settings=BYTE_LEVEL)
    write_tiny_gguf(
        root / "blocks.gguf", tiny_llama(**blocks), quantisation=Kind.Q8_0, settings=PIECES
    )
    write_tiny_gguf(
        root / "scaled.gguf",
        tiny_llama(**one_layer, head_dim=8, attention_bias=True),
        settings=BYTE_LEVEL | scaled,
        tensors={LLAMA3_FACTORS: factors},
    )
    return [_gguf(root / f"{name}.gguf") for name in ("plain", "blocks", "scaled")]


def _gguf(path: Path) -> Sample:
    content, reader = path.read_bytes(), gguf.GGUFReader(path)
    settings = [f.offset for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    tensors = [tensor.field.offset for tensor in reader.tensors]
    end = tensors[-1] + sum(part.nbytes for part in reader.tensors[-1].field.parts)
    pieces = _cut(content, [*settings, *tensors, end])
    parts = GgufParts(
        content[:8], pieces[: len(settings)], pieces[len(settings) :], content[reader.data_offset :]
    )
    assert parts.joined() == content
    return Sample(path.stem, {path.name: content}, parts)


def _cut(content: bytes, offsets: list[int]) -> list[bytes]:
    return [content[start:stop] for start, stop in pairwise(offsets)]
