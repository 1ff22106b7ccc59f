"""Qwen3 with experts: Llama's layers with a norm on each head's queries and keys, and in most of
them experts instead of the one MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, Routed, llama, qwen3
from sl_serve.models.experts import (
    dense_in,
    expert_params,
    gated_expert,
    likeliest,
    n_experts,
    router_params,
    sparse_layers,
)
from sl_serve.models.llama import head_input, hidden_states, static_tensors
from sl_serve.models.parts import add_linear, linear
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "expert",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect(
    "qwen3moe",
    {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    derived=lambda _fields, _tensors: {"norm_topk_prob": True},
    has_experts=True,
)

MLP = llama.PREFIX + "mlp."


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(ModelConfig):
    sparse: tuple[int, ...] = ()  # layers with experts
    sum_to_one: bool = False  # the weights of a token's experts
    window: int | None = None


def model_config(fields: Fields, generation: Fields) -> Qwen3MoeConfig:
    fields.only("hidden_act", "silu")
    common = decoder_fields(fields, generation)
    has_window = fields.boolean("use_sliding_window", False) and "sliding_window" in fields
    return Qwen3MoeConfig(
        **common,
        attention_bias=fields.boolean("attention_bias", False),
        n_experts=n_experts(fields, "num_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        expert_size=fields.integer("moe_intermediate_size", 768),
        sparse=sparse_layers(fields, common["n_layers"]),
        sum_to_one=fields.boolean("norm_topk_prob", False),
        window=fields.integer("sliding_window") if has_window else None,
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    assert isinstance(config, Qwen3MoeConfig)
    return (
        *dense_in(config, qwen3.layer_params(config), config.sparse),
        *router_params(config, MLP + "gate", config.sparse),
        *expert_params(config, MLP + "experts.{expert}", config.sparse),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    assert isinstance(config, Qwen3MoeConfig)
    scoring = CAUSAL if config.window is None else Scoring(window=config.window)
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    attended = yield qwen3.new_tokens(config, ops, w, h, ropes[0], scoring)
    if "router" not in w:
        llama.second_half(config, ops, w, x, attended)
        return
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    logits = linear(ops, "router", h, w)
    x += yield Routed(h, *likeliest(logits, config.experts_per_token, config.sum_to_one))


def expert(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return gated_expert(ops, w, x)
