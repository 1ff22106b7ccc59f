"""Qwen2 with experts, and Qwen1.5: Llama's layers with biases on queries, keys and values, and in
most of them experts, beside one that every token passes, as much as a gate of its own lets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, Routed, llama
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
from sl_serve.models.parts import add_linear, linear, linear_params
from sl_serve.ops import Ops
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
    "qwen2moe",
    {
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "expert_used_count": "num_experts_per_tok",
    },
    derived=lambda fields, _tensors: {
        "norm_topk_prob": False,
        "qkv_bias": fields["attention_bias"],
    },
    has_experts=True,
)

MLP = llama.PREFIX + "mlp."
SHARED = MLP + "shared_expert."


@dataclass(frozen=True, slots=True)
class Qwen2MoeConfig(ModelConfig):
    sparse: tuple[int, ...] = ()  # layers with experts
    sum_to_one: bool = False  # the weights of a token's experts
    shared_size: int = 0  # intermediate size of the expert that all tokens pass


def model_config(fields: Fields, generation: Fields) -> Qwen2MoeConfig:
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    common = decoder_fields(fields, generation)
    return Qwen2MoeConfig(
        **common,
        attention_bias=fields.boolean("qkv_bias", True),
        n_experts=n_experts(fields, "num_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok", 4),
        expert_size=fields.integer("moe_intermediate_size", 1408),
        shared_size=fields.integer("shared_expert_intermediate_size", 5632),
        sparse=sparse_layers(fields, common["n_layers"]),
        sum_to_one=fields.boolean("norm_topk_prob", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    assert isinstance(config, Qwen2MoeConfig)
    own = llama.decoder_params(config, config.attention_bias, False)
    hidden, inner = config.hidden_size, config.shared_size
    gate_up = {SHARED + "gate_proj": inner, SHARED + "up_proj": inner}
    shared = (
        *linear_params("shared_gate_up", hidden, gate_up, False),
        *linear_params("shared_down", inner, {SHARED + "down_proj": hidden}, False),
        *linear_params("shared_gate", hidden, {MLP + "shared_expert_gate": 1}, False),
    )
    return (
        *dense_in(config, own, config.sparse),
        *router_params(config, MLP + "gate", config.sparse),
        *(replace(p, layers=config.sparse, is_exact=p.name == "shared_gate") for p in shared),
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
    assert isinstance(config, Qwen2MoeConfig)
    attended = yield llama.new_tokens(config, ops, w, x, ropes[0])
    if "router" not in w:
        llama.second_half(config, ops, w, x, attended)
        return
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    routed = likeliest(linear(ops, "router", h, w), config.experts_per_token, config.sum_to_one)
    shared = linear(ops, "shared_down", ops.silu_mul(linear(ops, "shared_gate_up", h, w)), w)
    x += linear(ops, "shared_gate", h, w).sigmoid() * shared
    x += yield Routed(h, *routed)


def expert(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return gated_expert(ops, w, x)
