"""GLM 4 (9B) and GLM Edge: Llama with half of each head turning, as neighbours, and a fused MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    all_heads,
    attention_params,
    head_input,
    hidden_states,
    rotated,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import halves_apart, vector_param
from sl_serve.models.phi3 import mlp_params
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

GGUF = GgufDialect("chatglm", rotary_share="partial_rotary_factor")


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields = fields.with_defaults(
        head_dim=128,
        partial_rotary_factor=0.5,
        rms_norm_eps=1.5625e-7,
        max_position_embeddings=131072,
        eos_token_id=[151329, 151336, 151338],
    )
    fields.only("hidden_act", "silu")
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", True),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", hidden),
        *attention_params(config, config.attention_bias, o_bias=False),
        vector_param("post_norm", PREFIX + "post_attention_layernorm.weight", hidden),
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
    attended = yield new_tokens(config, ops, w, x, ropes[0])
    second_half(config, ops, w, x, attended)


def new_tokens(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, rope: RopeTable
) -> NewTokens:
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    heads = all_heads(config, ops, w, h)
    halves_apart(heads[:, : config.n_heads + config.n_kv_heads], 2 * rope.cos.shape[1])
    return rotated(config, ops, heads, rope)
