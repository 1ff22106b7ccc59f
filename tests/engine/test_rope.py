from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sl_serve.config import RopeConfig
from sl_serve.models.rope import inverse_frequencies, rope_table

KINDS = {
    "default": RopeConfig(theta=10000.0),
    "default-large-theta": RopeConfig(theta=500000.0),
    "linear": RopeConfig(theta=10000.0, kind="linear", factor=4.0),
    "linear-odd": RopeConfig(theta=1e6, kind="linear", factor=2.5),
    "llama3.1": RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    "llama3.2": RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
    "llama3-short": RopeConfig(10000.0, "llama3", 3.0, 2.0, 3.0, 256),
}


def reference(rope: RopeConfig, head_dim: int) -> LlamaRotaryEmbedding:
    parameters = {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    taken = {"default": 1, "linear": 2, "llama3": 5}[rope.kind]
    values: dict[str, Any] = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rope_theta": rope.theta,
        "rope_scaling": dict(list(parameters.items())[:taken]),
    }
    return LlamaRotaryEmbedding(LlamaConfig(**values))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_frequencies_are_those_of_transformers_to_the_last_bit_but_one(
    kind: str, head_dim: int
) -> None:
    expected = reference(KINDS[kind], head_dim).inv_freq.numpy()
    actual = inverse_frequencies(KINDS[kind], head_dim).numpy()
    assert actual.dtype == np.float32 and actual.shape == (head_dim // 2,)
    assert (np.abs(actual - expected) <= np.spacing(expected)).all()


def test_the_llama3_cases_have_long_short_and_blended_waves() -> None:
    rope = KINDS["llama3.1"]
    plain = inverse_frequencies(RopeConfig(theta=rope.theta), 128)
    ratio = plain / inverse_frequencies(rope, 128)
    assert ratio.min() == 1.0
    assert ratio.max() == rope.factor
    assert ((ratio > 1.01) & (ratio < rope.factor - 0.01)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_cos_and_sin_of_a_position_are_those_of_transformers(kind: str) -> None:
    positions = torch.tensor([0, 1, 2, 77, 4095, 100_000])
    cos, sin = rope_table(inverse_frequencies(KINDS[kind], 64), positions)
    expected = reference(KINDS[kind], 64)(torch.empty(1, dtype=torch.float32), positions[None])
    for actual, both_halves in zip((cos, sin), expected, strict=True):
        torch.testing.assert_close(actual, both_halves[0, :, :32], rtol=1e-6, atol=1e-6)
