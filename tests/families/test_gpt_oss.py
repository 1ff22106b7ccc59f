from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from sl_serve.device import Device, SimDevice
from sl_serve.errors import CheckpointError
from sl_serve.weights.checkpoint import open_checkpoint
from tests.engine.running import random_prompts
from tests.families.experts import stacked_expert
from tests.families.harness import FamilyTests, Tiny, check, news_of

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


# OCP Microscaling Formats, table 5 (E2M1) and 5.4.1 (E8M0), by the bit patterns.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks (..., out, n_groups, 16), scales (..., out, n_groups) -> float64 (..., out, in)."""
    table = torch.tensor(E2M1, dtype=torch.float64)
    numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    powers = 2.0 ** (scales.double() - 127)
    return (numbers.flatten(-2) * powers[..., None]).flatten(-2)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, GptOssForCausalLM]:
    """A folder whose experts are MXFP4 with random numbers, and the reference with the same."""
    reference = TINY.write(tmp_path)
    assert isinstance(reference, GptOssForCausalLM)
    tensors = load_file(tmp_path / "model.safetensors")
    random = torch.Generator().manual_seed(3)
    parameters = reference.state_dict()
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, n_in, n_out = tensors.pop(name).shape
        shape = n_experts, n_out, n_in // 32, 16
        blocks = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        scales = torch.randint(121, 126, shape[:3], generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            parameters[name].copy_(dequantised(blocks, scales).transpose(1, 2))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "mxfp4"}}))
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
    stack = "model.layers.1.mlp.experts.down_proj"
    # Among the scales the largest and the least that there are.
    stored[f"{stack}_scales"][2, 0, :3] = torch.tensor([0, 1, 2], dtype=torch.uint8)
    stored[f"{stack}_scales"][2, 1, :2] = torch.tensor([254 - 3, 3], dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    expected = dequantised(stored[f"{stack}_blocks"][2], stored[f"{stack}_scales"][2])
    found = checkpoint.format(f"{stack}[2]").widen(checkpoint.read_blocks(f"{stack}[2]"))
    assert torch.equal(found.double(), expected)
    assert checkpoint.shape(f"{stack}[2]") == tuple(expected.shape)


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
    stack = "model.layers.2.mlp.experts.gate_up_proj"
    assert stack not in checkpoint.names()
    assert torch.equal(checkpoint.read(f"{stack}[4]"), stored[stack][4].t())
    bias, place = stored[f"{stack}_bias"][4], checkpoint.location(f"{stack}_bias[4]")
    assert torch.equal(checkpoint.read(f"{stack}_bias[4]"), bias)
    assert place is not None and checkpoint.location(f"{stack}[4]") is None
    found = place.path.read_bytes()[place.offset_bytes :][: place.size_bytes]
    assert found == bias.numpy().tobytes()
