from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sl_serve.config import ModelConfig
from sl_serve.models import load_family
from sl_serve.plan.activations import PROBE_TOKENS, activation_bytes, fit_activations
from sl_serve.plan.model_reader import read_sizes, stored_dtype
from sl_serve.weights.dummy import open_dummy

SHAPES = ["opt-125m", "opt-350m", "tinyllama-1.1b", "llama-3-8b"]


def settings(shape: str) -> ModelConfig:
    return open_dummy(shape).config


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 77, 4000])
def test_two_probes_foretell_a_third(shape: str, n_tokens: int) -> None:
    assert n_tokens not in PROBE_TOKENS
    fit = fit_activations(settings(shape), torch.float32)
    third = activation_bytes(settings(shape), torch.float32, n_tokens)
    assert fit.at(n_tokens) == pytest.approx(third, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_needs_at_least_its_widest_values(shape: str) -> None:
    config = settings(shape)
    fit = fit_activations(config, torch.float16)
    hidden_and_widest = config.hidden_size + config.intermediate_size
    assert fit.per_token >= 2 * hidden_and_widest
    assert fit.per_token <= 2 * 12 * hidden_and_widest
    assert fit_activations(config, torch.float32).per_token == pytest.approx(
        2 * fit.per_token, rel=0.05
    )


def test_alive_is_what_is_counted_not_all_that_was_made() -> None:
    config = settings("tinyllama-1.1b")
    one_layer = activation_bytes(config, torch.float32, 100)
    # ten layers' worth of temporaries would be far more than the peak of one
    assert one_layer < 100 * 4 * 6 * (config.hidden_size + config.intermediate_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_against_the_tensors_of_the_family(shape: str) -> None:
    checkpoint = open_dummy(shape)
    config, family = checkpoint.config, load_family(checkpoint.config.family)
    sizes = read_sizes(shape, config, torch.float16, torch.float32)
    in_layers = [n for n in checkpoint.names() if ".layers." in n]
    n_elements = sum(math.prod(checkpoint.shape(n)) for n in in_layers) / config.n_layers
    assert 0 <= sizes.layer_bytes - 2 * n_elements < 16 * 4096  # the rest is alignment
    outside = [n for n in checkpoint.names() if ".layers." not in n]
    assert sizes.static_bytes == 2 * sum(math.prod(checkpoint.shape(n)) for n in outside)
    assert sizes.head_flops_per_token == 2 * math.prod(family.static_tensors(config)["head"][1])
    assert sizes.kv_token_bytes == 4 * 2 * config.n_layers * config.n_kv_heads * config.head_dim
    assert 0.98 < sizes.layer_flops_per_token / (2 * n_elements) <= 1
    assert stored_dtype(checkpoint) == config.dtype


EXPERT_SHAPES = ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"]


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_sizes_of_models_with_experts(shape: str) -> None:
    """Bytes are those of all experts, arithmetic that of those which a token is given."""
    checkpoint = open_dummy(shape)
    config = checkpoint.config
    sizes = read_sizes(shape, config, torch.bfloat16, torch.bfloat16)
    in_layers = {n: math.prod(checkpoint.shape(n)) for n in checkpoint.names() if ".layers.0." in n}
    experts = sum(size for name, size in in_layers.items() if ".experts." in name)
    assert sizes.layer_bytes == pytest.approx(2 * sum(in_layers.values()), rel=0.01)
    assert sizes.experts_bytes == pytest.approx(2 * experts, rel=0.01)
    share = config.experts_per_token / config.n_experts
    flops = 2 * (sum(in_layers.values()) - (1 - share) * experts)
    assert sizes.layer_flops_per_token == pytest.approx(flops, rel=0.01)
    tokens = np.array([0.0, 1.0, 1e6])
    fetched = sizes.fetched_layer_bytes(tokens)
    own = sizes.layer_bytes - sizes.experts_bytes
    assert fetched == pytest.approx([own, own + share * sizes.experts_bytes, sizes.layer_bytes])


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_activations_of_experts_are_linear_too(shape: str) -> None:
    fit = fit_activations(settings(shape), torch.bfloat16)
    third = activation_bytes(settings(shape), torch.bfloat16, 1500)
    assert fit.at(1500) == pytest.approx(third, rel=0.01)
    config = settings(shape)
    assert fit.per_token > 2 * (4 * config.hidden_size + 3 * config.expert_size)
