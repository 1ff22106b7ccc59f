from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from sl_serve.device import Device, SimDevice
from sl_serve.errors import CheckpointError
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.stacked import parts_of
from tests.engine.running import random_prompts
from tests.families.experts import STACKS, stacked_expert
from tests.families.harness import FamilyTests, Tiny, check, news_of
from tests.weights.published_models import from_mxfp4, pack_experts

TINY = Tiny(
    GptOssConfig,
    GptOssForCausalLM,
    {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "sliding_window": 7,
    },
    {
        "all-windows": {"layer_types": ["sliding_attention"] * 3},
        "no-biases": {"attention_bias": False},
        "narrow-gates": {"swiglu_limit": 0.5, "swiglu_alpha": 1.1},
        "plain-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    },
)


class TestGptOss(FamilyTests):
    tiny = TINY
    find = staticmethod(stacked_expert)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, GptOssForCausalLM]:
    """A folder whose experts are MXFP4 with random numbers, and the reference with the same."""
    reference = TINY.write(tmp_path)
    assert isinstance(reference, GptOssForCausalLM)
    parameters = reference.state_dict()
    with torch.no_grad():
        for name, numbers in pack_experts(tmp_path).items():
            parameters[name].copy_(numbers)
    return tmp_path, reference


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_packed_experts(packed: tuple[Path, GptOssForCausalLM], device: str) -> None:
    folder, reference = packed
    prompts = random_prompts(3)
    simulated: Device | None = SimDevice() if device == "sim" else None
    check(reference, prompts, news_of(folder, prompts, 7, simulated), 3e-4)


def test_packed_numbers_are_kept_to_the_last_bit(packed: tuple[Path, object]) -> None:
    folder, _ = packed
    stored = load_file(folder / "model.safetensors")
    experts = "model.layers.1.mlp.experts"
    # Among the scales the largest and the least that there are.
    for stack in ("down_proj", "gate_up_proj"):
        stored[f"{experts}.{stack}_scales"][2, :2, :2] = torch.tensor([[0, 1], [2, 251]])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    for module, (stack, outputs) in STACKS.items():
        blocks, scales = (stored[f"{experts}.{stack}_{kind}"][2] for kind in ("blocks", "scales"))
        expected = from_mxfp4(blocks, scales)[outputs]
        name = f"{experts}.2.{module}.weight"
        rows = checkpoint.read_blocks(name)
        assert rows.shape == (len(expected), expected.shape[1] // 32 * 17)
        found = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.MXFP4)
        assert np.array_equal(found.astype(np.float64), expected.numpy())
        assert torch.equal(checkpoint.read(name).double(), expected)
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.format(name).name == "mxfp4" and checkpoint.location(name) is None
    assert not [n for n in checkpoint.names() if n.endswith(("_proj", "_bias", "_scales"))]
    checkpoint.close()


@pytest.mark.parametrize(
    ("name", "shape"), [("_scales", (6, 64, 2)), ("_blocks", (6, 64, 3, 15)), ("_scales", None)]
)
def test_damaged_experts_are_refused(
    packed: tuple[Path, object], name: str, shape: tuple[int, ...] | None
) -> None:
    folder, _ = packed
    stored = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.down_proj{name}"
    del stored[name]
    if shape is not None:
        stored[name] = torch.zeros(shape, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(folder)


def test_a_stack_is_seen_expert_by_expert(tmp_path: Path) -> None:
    TINY.write(tmp_path)
    checkpoint, stored = open_checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    experts = "model.layers.2.mlp.experts"
    for module, (stack, outputs) in STACKS.items():
        matrix, bias = stored[f"{experts}.{stack}"][4], stored[f"{experts}.{stack}_bias"][4]
        name = f"{experts}.4.{module}"
        assert torch.equal(checkpoint.read(f"{name}.weight"), matrix[:, outputs].t())
        assert torch.equal(checkpoint.read(f"{name}.bias"), bias[outputs])
        for end in ("weight", "bias"):
            found = checkpoint.read(f"{name}.{end}")
            assert tuple(found.shape) == checkpoint.shape(f"{name}.{end}")
        before = checkpoint.read(f"{experts}.3.{module}.weight")
        assert checkpoint.read(f"{name}.weight").data_ptr() == before.data_ptr() + matrix.nbytes
        assert checkpoint.location(f"{name}.weight") is None
        place = checkpoint.location(f"{name}.bias")
        assert (place is None) == (module != "down_proj")  # the others' are there by turns
    assert place is not None
    of_file = place.path.read_bytes()[place.offset_bytes :][: place.size_bytes]
    assert of_file == stored[f"{experts}.down_proj_bias"][4].numpy().tobytes()
    assert not [n for n in checkpoint.names() if n.endswith(("_proj", "_bias"))]
    checkpoint.close()


def test_what_is_no_stack_of_the_family_stays_as_it_is(tmp_path: Path) -> None:
    """Sizes of a header are not to be believed, nor another family's order of outputs."""
    TINY.write(tmp_path)
    experts = "model.layers.0.mlp.experts"
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{experts}.gate_up_proj"] = torch.empty(1 << 40, 0, 8)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    names = checkpoint.names()
    assert f"{experts}.gate_up_proj" in names and f"{experts}.0.gate_proj.weight" not in names
    assert f"{experts}.0.down_proj.weight" in names
    stacks = [f"{experts}.{stack}" for stack in ("gate_up_proj", "down_proj", "other_proj")]
    n_parts = [len(list(parts_of(checkpoint.config, stack, 6))) for stack in stacks]
    assert n_parts == [12, 6, 0]
    assert not list(parts_of(replace(checkpoint.config, stacked=()), stacks[0], 6))
    checkpoint.close()
