"""OLMo 2: Llama with norms after attention and MLP instead of before, and norms over all queries
and all keys of a token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    all_heads,
    attention_params,
    gated_up,
    head_input,
    hidden_states,
    mlp_params,
    rotated,
    static_tensors,
)
from sl_serve.models.parts import product, vector_param
from sl_serve.ops import CAUSAL, Ops, Scoring
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


def has_window(settings: Mapping[str, Any], _tensors: Collection[str]) -> bool:
    """Of a GGUF file: it is one of OLMo 3, which has the same architecture there."""
    return "olmo2.attention.sliding_window" in settings


GGUF = GgufDialect("olmo2", belongs=lambda settings, tensors: not has_window(settings, tensors))


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields = fields.with_defaults(rms_norm_eps=1e-5)
    fields.only("hidden_act", "silu")
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    attn = PREFIX + "self_attn."
    return (
        *attention_params(config, config.attention_bias, config.attention_bias),
        vector_param("q_norm", attn + "q_norm.weight", config.q_size),
        vector_param("k_norm", attn + "k_norm.weight", config.kv_size),
        *mlp_params(config),
        *norm_params_after(config),
    )


def norm_params_after(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        vector_param("attention_norm", PREFIX + "post_attention_layernorm.weight", hidden),
        vector_param("mlp_norm", PREFIX + "post_feedforward_layernorm.weight", hidden),
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
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    x: torch.Tensor,
    rope: RopeTable,
    scoring: Scoring = CAUSAL,
) -> NewTokens:
    heads, n_q = all_heads(config, ops, w, x), config.n_heads
    norm_together(ops, heads[:, :n_q], w["q_norm"], config.norm_eps)
    norm_together(ops, heads[:, n_q : n_q + config.n_kv_heads], w["k_norm"], config.norm_eps)
    return rotated(config, ops, heads, rope, scoring)


def norm_together(ops: Ops, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """RMSNorm of all heads of x (T, heads, D) as one line, in place."""
    x.copy_(ops.rms_norm(x.flatten(1).contiguous(), weight, eps).view(x.shape))


def second_half(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, attended: torch.Tensor
) -> None:
    """What follows attention, in place on x (T, hidden)."""
    h = product(ops, "o", attended, w)
    x += ops.rms_norm(h, w["attention_norm"], config.norm_eps)
    h = product(ops, "down", gated_up(ops, w, x), w)
    x += ops.rms_norm(h, w["mlp_norm"], config.norm_eps)
