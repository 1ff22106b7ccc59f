"""GGUF files, written as llama.cpp's converter does, against transformers' own logits."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.models import load_family, supported_families
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.gguf_dialect import GgufDialect
from tests.engine.running import random_prompts
from tests.families.experts import joined_expert, stacked_expert
from tests.families.gguf_converters import CONVERTERS, expert_by_itself, with_kv_b_apart
from tests.families.gguf_writer import (
    Kind,
    Writer,
    with_gates_apart,
    with_joined_projections,
    with_stacked_experts,
    write_gguf,
)
from tests.families.harness import COMMON, Tiny, check, news_of

# Variants beside the plain one; others have no counterpart in the format, or change nothing there.
VARIANTS = {
    "apertus": ["plain-rope", "biases", "tied"],
    "arcee": ["biases", "tied", "yarn-rope"],
    "cohere": ["many-key-heads", "head-norms", "large-logits", "biases"],
    "cohere2": ["large-logits"],
    "bloom": ["six-heads"],
    "deepseek_v2": ["latent-queries", "groups", "even-yarn-rope"],
    "deepseek_v3": [
        *("whole-queries", "even-yarn-rope", "one-group", "two-shared", "as-they-are"),
        "no-dense",
    ],
    "exaone4": ["listed", "no-window", "tied"],
    "falcon": ["grouped", "grouped-one-norm", "grouped-biases", "many-key-heads", "narrow-mlp"],
    "gemma": ["one-key-head", "other-heads", "odd-scale"],
    "gemma2": [],
    "gemma3_text": ["scaled-rope", "soft-cap"],
    "glm": ["whole-heads-turn", "no-biases", "tied"],
    "glm4": ["whole-heads-turn", "no-biases", "tied"],
    "gpt2": ["narrow-mlp"],
    "gpt_bigcode": [],
    "gpt_neox": ["sequential", "no-attention-biases", "tied", "half-rotated", "scaled-rope"],
    "gpt_oss": ["no-biases", "plain-rope"],
    "granite": ["plain-multipliers", "tied", "biases"],
    "llama": [
        *("many-key-heads", "one-key-head", "tied", "biases", "other-heads"),
        *("linear-rope", "yarn-rope"),
    ],
    "mistral": [],
    "mixtral": ["one-expert", "all-experts", "tied", "other-heads"],
    "mpt": ["six-heads", "clipped", "own-head"],
    "nemotron": ["biases", "whole-heads-turn", "tied"],
    "olmo": ["clipped", "many-key-heads", "tied"],
    "olmo2": ["many-key-heads", "tied", "biases"],
    "olmo3": ["yarn-rope", "given-amplitude", "two-ropes", "tied", "biases"],
    "phi": ["quarter-rotated"],
    "phi3": [
        *("window", "part-of-a-head-turns", "long-rope", "long-rope-of-a-part", "tied"),
        "one-key-head",
    ],
    "qwen2": ["tied", "yarn-rope"],
    "qwen2_moe": ["no-biases"],
    "qwen3": ["tied", "biases", "yarn-rope"],
    "qwen3_moe": ["biases", "other-heads"],
    "seed_oss": ["no-biases", "all-biases", "tied"],
    "smollm3": ["own-head", "biases"],
    "stablelm": ["parallel", "biases", "half-rotated", "tied"],
    "starcoder2": ["no-biases", "own-head"],
}
WITH_LATENTS = ("deepseek_v2", "deepseek_v3")
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", *WITH_LATENTS)
# Where llama.cpp has in its code what others have among their settings.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {"layer_types": None, "num_hidden_layers": 4},  # every fourth sees all
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
        "num_hidden_layers": 6,
    },
    "mistral": {"sliding_window": None},  # there is none
    "qwen3_moe": {"norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
}
CASES = [
    (family, variant)
    for family, variants in VARIANTS.items()
    if family in supported_families()
    for variant in ["", *variants]
]
# transformers reads these architectures from GGUF files itself.
READ_BY_TRANSFORMERS = {
    *("bloom", "falcon", "gemma2", "gemma3_text", "llama", "nemotron"),
    *("qwen2", "stablelm", "starcoder2"),
}


def tiny_of(family: str) -> Tiny:
    tiny = importlib.import_module(f"tests.families.test_{family}").TINY
    assert isinstance(tiny, Tiny)
    return replace(tiny, settings={**tiny.settings, **SETTINGS.get(family, {})})


def write(folder: Path, family: str, variant: str = "", **options: object) -> PreTrainedModel:
    """The reference; the file is model.gguf."""
    reference = tiny_of(family).write(folder / "hf", variant)
    if family in WITH_EXPERTS:
        tensors = with_stacked_experts(folder / "hf")
        apart = family in WITH_LATENTS
        options["tensors"] = with_kv_b_apart(tensors, reference.config) if apart else tensors
    if family == "gpt_oss":
        options["tensors"] = with_gates_apart(folder / "hf")
    write_gguf(folder / "model.gguf", reference, CONVERTERS[family], **options)  # type: ignore[arg-type]
    return reference


def check_logits(path: Path, reference: PreTrainedModel) -> None:
    prompts = random_prompts(3)
    check(reference, prompts, news_of(path, prompts))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_are_those_of_the_folder(family: str, variant: str, tmp_path: Path) -> None:
    reference = write(tmp_path, family, variant)
    check_logits(tmp_path / "model.gguf", reference)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_settings_are_those_of_the_folder(family: str, variant: str, tmp_path: Path) -> None:
    write(tmp_path, family, variant)
    ours, folder = (open_checkpoint(tmp_path / name) for name in ("model.gguf", "hf"))
    for name in set(folder.names()) - constants(family):
        torch.testing.assert_close(ours.read(name), folder.read(name).float(), rtol=0, atol=1e-6)
    ours.close()
    folder.close()


def constants(family: str) -> set[str]:
    """Tensors that the family's arithmetic has the numbers of."""
    layers = range(COMMON["num_hidden_layers"])
    ends = {"apertus": ("beta", "eps")}.get(family, ())
    return {f"model.layers.{i}.mlp.act_fn.{end}" for i in layers for end in ends}


@pytest.mark.parametrize("family", sorted({f for f, _ in CASES} & READ_BY_TRANSFORMERS))
def test_transformers_reads_the_same_tensors(family: str, tmp_path: Path) -> None:
    """A second opinion on the writer of these tests."""
    write(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    ours = open_checkpoint(tmp_path / "model.gguf")
    for name in ours.names():
        torch.testing.assert_close(ours.read(name), theirs[name], rtol=0, atol=1e-6)
    ours.close()


def test_transformers_reads_the_same_experts(tmp_path: Path) -> None:
    """Of Qwen2-MoE, whose sizes of experts it takes for granted."""
    sizes = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    tiny = tiny_of("qwen2_moe")
    tiny = replace(tiny, settings={**tiny.settings, **sizes, "num_hidden_layers": 1})
    reference = tiny.write(tmp_path / "hf")
    path, tensors = tmp_path / "model.gguf", with_stacked_experts(tmp_path / "hf")
    write_gguf(path, reference, CONVERTERS["qwen2_moe"], tensors=tensors)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = open_checkpoint(path)
    for name in ours.names():
        torch.testing.assert_close(ours.read(name), joined_expert(theirs, name), rtol=0, atol=1e-6)
    ours.close()


def test_every_statement_is_tested() -> None:
    stated = {f for f in supported_families() if hasattr(load_family(f), "GGUF")}
    assert stated == {family for family, _ in CASES} - {"mistral"}  # written as a Llama
    dialects = [load_family(family).GGUF for family in stated]  # type: ignore[attr-defined]
    told_apart_by_name = [d for d in dialects if d.belongs is GgufDialect("any").belongs]
    others = [d for d in dialects if d not in told_apart_by_name]
    names = [(d.architecture, d.has_experts) for d in told_apart_by_name]
    assert len({*names}) == len(names)
    assert not {(d.architecture, d.has_experts) for d in others} & {*names}


@pytest.mark.parametrize(
    ("family", "sizes", "scalar"),
    [  # as in the config.json of google/gemma-2-9b, -2-27b, gemma-3-12b and -3-27b
        ("gemma2", (42, 3584, 16, 256), 256),
        ("gemma2", (46, 4608, 32, 128), 144),
        ("gemma3_text", (48, 3840, 16, 256), 256),
        ("gemma3_text", (62, 5376, 32, 128), 168),
    ],
)
def test_the_scale_of_scores_that_no_file_has(
    family: str, sizes: tuple[int, ...], scalar: int
) -> None:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    dialect = load_family(family).GGUF  # type: ignore[attr-defined]
    derived = dialect.derived(dict(zip(names, sizes, strict=True)), ())
    assert derived == {"query_pre_attn_scalar": scalar}


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.BF16])
@pytest.mark.parametrize(
    "family", sorted({f for f, _ in CASES} & {"llama", "falcon", "gemma2", "mixtral"})
)
def test_quantised_types(family: str, kind: Kind, tmp_path: Path) -> None:
    """As transformers computes with the numbers that the blocks stand for."""
    reference = write(tmp_path, family, kind=kind)
    path = tmp_path / "model.gguf"
    checkpoint, parameters = open_checkpoint(path), reference.state_dict()
    in_blocks = [n for n in checkpoint.names() if len(checkpoint.shape(n)) == 2]
    names = {checkpoint.format(name).name for name in in_blocks}
    assert names == {"bfloat16" if kind == Kind.BF16 else kind.name.lower()}
    with torch.no_grad():
        for name in checkpoint.names():
            here = name.replace("block_sparse_moe.gate", "mlp.gate")  # transformers' own name
            joined_expert(parameters, here).copy_(checkpoint.read(name))
    checkpoint.close()
    prompts = random_prompts(3)
    check(reference, prompts, news_of(path, prompts), 1e-3)


@pytest.mark.parametrize("variant", ["", "no-biases", "whole-heads-turn"])
def test_queries_keys_and_values_in_one_matrix(variant: str, tmp_path: Path) -> None:
    """As the first files of GLM have them."""
    reference = tiny_of("glm").write(tmp_path / "hf", variant)
    tensors = with_joined_projections(reference.state_dict())
    assert not any("q_proj" in name for name in tensors)
    write_gguf(tmp_path / "model.gguf", reference, CONVERTERS["glm"], tensors=tensors)
    check_logits(tmp_path / "model.gguf", reference)


def test_joined_projections_of_another_size_are_refused(tmp_path: Path) -> None:
    reference = tiny_of("glm").write(tmp_path / "hf")
    tensors = with_joined_projections(reference.state_dict())
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:-24]
    write_gguf(tmp_path / "model.gguf", reference, CONVERTERS["glm"], tensors=tensors)
    with pytest.raises(CheckpointError, match=r"attn_qkv\.weight has 168 rows, not 192"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_experts_by_themselves(kind: Kind, tmp_path: Path) -> None:
    """As the first files of Mixtral have them: the same tensors as in one that stacks them."""
    reference = write(tmp_path, "mixtral", kind=kind)
    how = replace(CONVERTERS["mixtral"], old_name=expert_by_itself)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    write_gguf(tmp_path / "old.gguf", reference, how, kind, tensors=tensors)
    old, new = (open_checkpoint(tmp_path / name) for name in ("old.gguf", "model.gguf"))
    assert set(old.names()) == set(new.names())
    for name in new.names():
        assert old.format(name) == new.format(name)
        assert torch.equal(old.read(name), new.read(name))
    old.close()
    new.close()
    if kind == Kind.F32:
        check_logits(tmp_path / "old.gguf", reference)


@pytest.mark.parametrize(
    ("numbers", "error", "named"),
    [
        ({"xielu.alpha_p": [1.0, 2.0]}, CheckpointError, "xielu.alpha_p must be 3 numbers"),
        ({"xielu.alpha_n": 1.0}, CheckpointError, "xielu.alpha_n must be 3 numbers, not 1.0"),
        ({"xielu.beta": [0.5, 0.5, 0.25]}, ModelError, "xielu.beta .* is not supported"),
        ({"xielu.eps": "small"}, ModelError, "xielu.eps 'small' is not supported"),
    ],
)
def test_numbers_among_the_settings_are_checked(
    numbers: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    def change(writer: Writer, _config: PretrainedConfig) -> None:
        for key, value in numbers.items():
            add = {list: writer.add_array, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)

    reference = tiny_of("apertus").write(tmp_path / "hf")
    how = CONVERTERS["apertus"]
    kept = {end: key for end, key in how.numbers.items() if key not in numbers}
    gone = {end for end, key in how.numbers.items() if key in numbers}
    state = reference.state_dict().items()
    tensors = {name: t for name, t in state if name.rpartition(".")[2] not in gone}
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, replace(how, settings=change, numbers=kept), tensors=tensors)
    with pytest.raises(error, match=named):
        open_checkpoint(path)


@pytest.mark.parametrize("bias", [0.0, 4.0])
def test_mpt_with_other_positions_is_refused(bias: float, tmp_path: Path) -> None:
    def change(writer: Writer, config: PretrainedConfig) -> None:
        CONVERTERS["mpt"].settings(writer, config)
        writer.add_max_alibi_bias(bias)

    reference = tiny_of("mpt").write(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, replace(CONVERTERS["mpt"], settings=change))
    with pytest.raises(ModelError, match=r"alibi(_bias_max)? .* is not supported"):
        open_checkpoint(path)


def test_experts_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    reference = write(tmp_path, "gpt_oss", kind=Kind.Q8_0, expert_kind=Kind.MXFP4)
    path = tmp_path / "model.gguf"
    checkpoint, parameters = open_checkpoint(path), reference.state_dict()
    matrices = [n for n in checkpoint.names() if ".experts." in n and n.endswith(".weight")]
    assert {checkpoint.format(name).name for name in matrices} == {"mxfp4"}
    with torch.no_grad():
        for name in checkpoint.names():
            stacked_expert(parameters, name).copy_(checkpoint.read(name))
    checkpoint.close()
    prompts = random_prompts(3)
    check(reference, prompts, news_of(path, prompts), 1e-3)


PART = "model-{:05}-of-{:05}.gguf"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write(tmp_path, "llama", part_tensors=9)
    return sorted(tmp_path.glob("model-*.gguf"))


def test_a_model_in_parts(tmp_path: Path) -> None:
    reference = write(tmp_path, "llama", part_tensors=9)
    first, *others = sorted(tmp_path.glob("model-*.gguf"))
    assert first.name == PART.format(1, 1 + len(others)) and len(others) > 1
    check_logits(first, reference)


def test_parts_are_opened_from_the_first(parts: list[Path]) -> None:
    with pytest.raises(ModelError, match=f"part 2 of {len(parts)}; give the first one's path"):
        open_checkpoint(parts[1])
    alone = parts[0].with_name("alone.gguf")
    parts[0].rename(alone)
    with pytest.raises(ModelError, match=r"the first of . parts must be called NAME-00001-of-"):
        open_checkpoint(alone)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[2].name}: this part is missing"):
        open_checkpoint(parts[0])


def test_a_foreign_part_is_refused(parts: list[Path], tmp_path: Path) -> None:
    whole = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=f"{parts[1].name}: not part 2 of"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(whole)
    folder = tmp_path / "other"
    folder.mkdir()
    write(folder, "llama", "biases", part_tensors=15)
    others = sorted(folder.glob("model-*.gguf"))
    assert len(others) == len(parts)
    parts[1].write_bytes(others[1].read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another model"):
        open_checkpoint(parts[0])
