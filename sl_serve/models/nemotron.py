"""Nemotron 3 and 4, Minitron: LayerNorm whose weights lack a one, half of each head turning, a
plain MLP of squared ReLUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable
from sl_serve.models.arcee import mlp_params, squared_up
from sl_serve.models.llama import PREFIX, all_heads, attention_params, hidden_states, rotated
from sl_serve.models.parts import add_linear, layer_norm_params
from sl_serve.models.starcoder2 import static_tensors
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect(
    "nemotron",
    {"attention.layer_norm_epsilon": "norm_eps"},
    rotary_share="partial_rotary_factor",
    norm_offset=1,
)


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields = fields.with_defaults(max_position_embeddings=4096, partial_rotary_factor=0.5)
    fields.only("hidden_act", "relu2")
    decoder = decoder_fields(fields, generation)
    return ModelConfig(
        **decoder | {"norm_eps": fields.number("norm_eps", 1e-5)},
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        *layer_norm_params("input_norm", PREFIX + "input_layernorm", hidden),
        *attention_params(config, config.attention_bias, config.attention_bias),
        *layer_norm_params("post_norm", PREFIX + "post_attention_layernorm", hidden),
        *mlp_params(config),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = norm("input_norm", config, ops, x, w)
    attended = yield rotated(config, ops, all_heads(config, ops, w, h), ropes[0])
    add_linear(ops, "o", x, attended, w)
    h = norm("post_norm", config, ops, x, w)
    add_linear(ops, "down", x, squared_up(ops, w, h), w)


def norm(
    name: str, config: ModelConfig, ops: Ops, x: torch.Tensor, w: LayerWeights
) -> torch.Tensor:
    weight = w[name].float() + 1  # in float32: in a shorter dtype most of it would be lost
    return ops.layer_norm(x, weight, w[f"{name}_bias"], config.norm_eps)


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return norm("final_norm", config, ops, x, w)
