"""Qwen 3: Llama with norms on each query and key head. Later layers may see only the last
tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    all_heads,
    decoder_params,
    head_input,
    hidden_states,
    rotated,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import WindowedConfig, norm_heads, vector_param
from sl_serve.models.qwen2 import windows
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

GGUF = GgufDialect("qwen3")


def model_config(fields: Fields, generation: Fields) -> WindowedConfig:
    fields = fields.with_defaults(head_dim=128, max_position_embeddings=32768)
    fields.only("hidden_act", "silu")
    return WindowedConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        windows=windows(fields),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    params = decoder_params(config, config.attention_bias, config.attention_bias)
    return (*params, *head_norm_params(config))


def head_norm_params(config: ModelConfig) -> tuple[Param, ...]:
    """One norm for all queries, one for all keys."""
    attn = PREFIX + "self_attn."
    return (
        vector_param("q_norm", attn + "q_norm.weight", config.head_dim),
        vector_param("k_norm", attn + "k_norm.weight", config.head_dim),
    )


def block(
    config: WindowedConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    attended = yield new_tokens(config, ops, w, h, ropes[0], config.scoring(layer))
    second_half(config, ops, w, x, attended)


def new_tokens(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    h: torch.Tensor,
    rope: RopeTable | None,
    scoring: Scoring = CAUSAL,
) -> NewTokens:
    """Of what enters the projections, h (T, hidden)."""
    heads, n_q = all_heads(config, ops, w, h), config.n_heads
    norm_heads(ops, heads[:, :n_q], w["q_norm"], config.norm_eps)
    norm_heads(ops, heads[:, n_q : n_q + config.n_kv_heads], w["k_norm"], config.norm_eps)
    return rotated(config, ops, heads, rope, scoring)
