"""DeepSeek's GGUF files: older ones, blocks, layers for speculation, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.models import load_family
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.fields import Fields
from tests.engine.running import random_prompts
from tests.families.experts import joined_expert
from tests.families.gguf_converters import deepseek, older_deepseek, with_kv_b_apart
from tests.families.gguf_writer import Converter, Kind, Writer, with_stacked_experts, write_gguf
from tests.families.harness import check, news_of
from tests.families.test_gguf import check_logits, tiny_of

FAMILIES = ("deepseek_v2", "deepseek_v3")
NEWER = Converter(gguf.MODEL_ARCH.DEEPSEEK2, deepseek)
OLDER = Converter(gguf.MODEL_ARCH.DEEPSEEK2, older_deepseek)
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"


def write(
    folder: Path, family: str, variant: str, how: Converter, kind: Kind = Kind.F32
) -> PreTrainedModel:
    """The reference; the file is model.gguf. Rows of all parts are whole blocks of 32."""
    tiny = tiny_of(family)
    tiny = replace(tiny, settings={**tiny.settings, "qk_nope_head_dim": 32})
    reference = tiny.write(folder / "hf", variant)
    tensors = with_stacked_experts(folder / "hf")
    if how.settings is not older_deepseek:
        tensors = with_kv_b_apart(tensors, reference.config)
    write_gguf(folder / "model.gguf", reference, how, kind, tensors=tensors)
    return reference


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("deepseek_v2", ""),
        ("deepseek_v2", "latent-queries"),
        ("deepseek_v3", "one-group"),
        ("deepseek_v2", "even-yarn-rope"),
    ],
)
def test_older_files(family: str, variant: str, tmp_path: Path) -> None:
    reference = write(tmp_path, family, variant, OLDER)
    check_logits(tmp_path / "model.gguf", reference)


@pytest.mark.parametrize("how", [OLDER, NEWER], ids=["older", "newer"])
@pytest.mark.parametrize(("family", "variant"), [("deepseek_v2", ""), ("deepseek_v3", "one-group")])
def test_blocks(family: str, variant: str, how: Converter, tmp_path: Path) -> None:
    """As transformers computes with the numbers that they stand for."""
    reference = write(tmp_path, family, variant, how, Kind.Q8_0)
    checkpoint, parameters = open_checkpoint(tmp_path / "model.gguf"), reference.state_dict()
    assert checkpoint.format(KV_B).name == ("q8_0" if how is OLDER else "float32")
    with torch.no_grad():
        for name in checkpoint.names():
            joined_expert(parameters, name).copy_(checkpoint.read(name))
    checkpoint.close()
    prompts = random_prompts(3)
    check(reference, prompts, news_of(tmp_path / "model.gguf", prompts), 1e-3)


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.F16])
def test_parts_of_short_numbers_are_joined_as_short(kind: Kind, tmp_path: Path) -> None:
    reference = write(tmp_path, "deepseek_v3", "", NEWER, kind)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    stored = reference.state_dict()[KV_B]
    short = checkpoint.format(KV_B).dtype
    assert short == (torch.bfloat16 if kind == Kind.BF16 else torch.float16)
    assert torch.equal(checkpoint.read(KV_B), stored.to(short).float())
    checkpoint.close()


def speculating(how_many: int, names: tuple[str, ...]) -> Converter:
    """With tensors of a layer behind the three; `how_many` are counted among them."""

    def settings(writer: Writer, config: PretrainedConfig) -> None:
        deepseek(writer, config)
        writer.add_block_count(config.num_hidden_layers + how_many)
        writer.add_nextn_predict_layers(1)
        for name in names:
            writer.add_tensor(f"blk.3.{name}.weight", np.ones(64, dtype=np.float32))

    return Converter(gguf.MODEL_ARCH.DEEPSEEK2, settings)


@pytest.mark.parametrize("how_many", [0, 1])
def test_layers_that_predict_further_tokens_are_left_out(how_many: int, tmp_path: Path) -> None:
    how = speculating(how_many, ("attn_norm", "nextn.enorm"))
    reference = write(tmp_path, "deepseek_v3", "", how)
    check_logits(tmp_path / "model.gguf", reference)


def test_other_layers_are_not(tmp_path: Path) -> None:
    write(tmp_path, "deepseek_v3", "", speculating(0, ("attn_norm",)))
    with pytest.raises(ModelError, match=r"tensor 'blk\.3\.attn_norm\.weight' has no place"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("n_experts", "n_layers", "groups"), [(64, 27, (1, 1)), (160, 60, (8, 3)), (256, 61, (8, 4))]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_that_older_files_do_not_say(
    family: str, n_experts: int, n_layers: int, groups: tuple[int, int]
) -> None:
    """As in the config.json of DeepSeek-V2-Lite, -V2 and -V3."""
    dialect = load_family(family).GGUF  # type: ignore[attr-defined]
    keys = {
        "rope.dimension_count": 64,
        "attention.key_length": 192,
        "attention.value_length": 128,
        "attention.kv_lora_rank": 512,
        "expert_count": n_experts,
        "block_count": n_layers,
    }
    read = dialect.read(Fields(keys, "test"), {})
    assert (read["n_group"], read["topk_group"]) == groups
    said = dialect.read(Fields({**keys, "expert_group_count": 1}, "test"), {})
    assert said["n_group"] == 1
    method = "greedy" if groups == (1, 1) else "group_limited_greedy"
    expected = {"topk_method": method} if family == "deepseek_v2" else {}
    assert dialect.derived(read, ()) == expected


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    def gating(writer: Writer, config: PretrainedConfig) -> None:
        deepseek(writer, config)
        writer.add_uint32("deepseek2.expert_gating_func", 3)

    write(tmp_path, "deepseek_v3", "", Converter(gguf.MODEL_ARCH.DEEPSEEK2, gating))
    with pytest.raises(ModelError, match="with experts and expert_gating_func 3"):
        open_checkpoint(tmp_path / "model.gguf")


def test_parts_of_other_shapes_are_refused(tmp_path: Path) -> None:
    tiny = tiny_of("deepseek_v3")
    reference = tiny.write(tmp_path / "hf")
    tensors = with_kv_b_apart(with_stacked_experts(tmp_path / "hf"), reference.config)
    name = KV_B.replace("kv_b", "k_b")
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, NEWER, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"k_b_proj.* \(4, 24, 32\), expected \(4, 32, 24\)"):
        open_checkpoint(path)
    del tensors[name]
    write_gguf(path, reference, NEWER, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"no tensor .*k_b_proj"):
        open_checkpoint(path)
