"""Arcee: Llama with a plain MLP of squared ReLUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    attention_params,
    head_input,
    hidden_states,
    new_tokens,
    static_tensors,
)
from sl_serve.models.parts import add_linear, linear, linear_params, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import LLAMA_ROWS, GgufDialect
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

GGUF = GgufDialect("arcee", rows=LLAMA_ROWS)


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields = fields.with_defaults(rms_norm_eps=1e-5, max_position_embeddings=4096)
    fields.only("hidden_act", "relu2")
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", hidden),
        *attention_params(config, config.attention_bias, config.attention_bias),
        vector_param("post_norm", PREFIX + "post_attention_layernorm.weight", hidden),
        *mlp_params(config),
    )


def mlp_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, mlp = config.hidden_size, config.intermediate_size, PREFIX + "mlp."
    return (
        *linear_params("up", hidden, {mlp + "up_proj": inner}, config.mlp_bias),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, config.mlp_bias),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x, ropes[0])
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    add_linear(ops, "down", x, squared_up(ops, w, h), w)


def squared_up(ops: Ops, w: LayerWeights, h: torch.Tensor) -> torch.Tensor:
    """The MLP of h (T, hidden) up to its last product: squared ReLUs (T, intermediate)."""
    up = linear(ops, "up", h, w)
    ops.relu_(up)
    return up.square_()
