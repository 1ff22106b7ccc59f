"""Llama 1 to 3.x, and what shares its shape: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable, StaticTensors
from sl_serve.models.parts import (
    add_linear,
    linear,
    linear_params,
    new_tokens_of,
    vector_param,
    vocabulary_tensors,
)
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import LLAMA_ROWS, GgufDialect
from sl_serve.weights.hf_fields import decoder_fields, refuse_partial_rotation
from sl_serve.weights.layout import LayerWeights, Param

PREFIX = "model.layers.{layer}."
GGUF = GgufDialect("llama", rows=LLAMA_ROWS)


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu")
    refuse_partial_rotation(fields)
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    return decoder_params(config, config.attention_bias, config.attention_bias)


def decoder_params(config: ModelConfig, qkv_bias: bool, o_bias: bool) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", hidden),
        *attention_params(config, qkv_bias, o_bias),
        vector_param("post_norm", PREFIX + "post_attention_layernorm.weight", hidden),
        *mlp_params(config),
    )


def attention_params(config: ModelConfig, qkv_bias: bool, o_bias: bool) -> tuple[Param, ...]:
    hidden, attn = config.hidden_size, PREFIX + "self_attn."
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return (
        *linear_params("qkv", hidden, {attn + name: n for name, n in qkv.items()}, qkv_bias),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, o_bias),
    )


def mlp_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner, mlp = config.hidden_size, config.intermediate_size, PREFIX + "mlp."
    gate_up = {mlp + name: inner for name in ("gate_proj", "up_proj")}
    return (
        *linear_params("gate_up", hidden, gate_up, config.mlp_bias),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, "model.embed_tokens"),
        "final_norm": ("model.norm.weight", (config.hidden_size,)),
    }


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    return tokens


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
    rope: RopeTable | None,
    scoring: Scoring = CAUSAL,
) -> NewTokens:
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    return rotated(config, ops, all_heads(config, ops, w, h), rope, scoring)


def all_heads(config: ModelConfig, ops: Ops, w: LayerWeights, h: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values of h (T, hidden), side by side: (T, Hq + 2 Hk, D)."""
    return linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)


def rotated(
    config: ModelConfig,
    ops: Ops,
    heads: torch.Tensor,
    rope: RopeTable | None,
    scoring: Scoring = CAUSAL,
) -> NewTokens:
    """`heads` as `all_heads` gives them, its queries and keys turned, unless `rope` is None."""
    if rope is not None:
        ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], rope.cos, rope.sin)
    return new_tokens_of(config, heads, scoring)


def second_half(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, attended: torch.Tensor
) -> None:
    """What follows attention, in place on x (T, hidden)."""
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    add_linear(ops, "down", x, gated_up(ops, w, h), w)


def gated_up(ops: Ops, w: LayerWeights, h: torch.Tensor) -> torch.Tensor:
    """The MLP of h (T, hidden) up to its last product: (T, intermediate)."""
    return ops.silu_mul(linear(ops, "gate_up", h, w))


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, w["final_norm"], config.norm_eps)
