"""Llama 1 to 3.x, and what shares its shape: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable, StaticTensors
from sl_serve.models.parts import add_linear, linear, linear_params, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.hf_fields import decoder_fields, refuse_partial_rotation
from sl_serve.weights.layout import LayerWeights, Param

PREFIX = "model.layers.{layer}."


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu")
    refuse_partial_rotation(fields)
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp = PREFIX + "self_attn.", PREFIX + "mlp."
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    qkv = {attn + name: size for name, size in qkv.items()}
    gate_up = {mlp + name: inner for name in ("gate_proj", "up_proj")}
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", hidden),
        *linear_params("qkv", hidden, qkv, config.attention_bias),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, config.attention_bias),
        vector_param("post_norm", PREFIX + "post_attention_layernorm.weight", hidden),
        *linear_params("gate_up", hidden, gate_up, config.mlp_bias),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    embed = ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head = embed if config.tie_embeddings else ("lm_head.weight", embed[1])
    return {
        "embed": embed,
        "final_norm": ("model.norm.weight", (config.hidden_size,)),
        "head": head,
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
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    h = ops.silu_mul(linear(ops, "gate_up", h, w))
    add_linear(ops, "down", x, h, w)


def new_tokens(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, rope: RopeTable
) -> NewTokens:
    h = ops.rms_norm(x, w["input_norm"], config.norm_eps)
    qkv = linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)
    n_q, n_kv = config.n_heads, config.n_kv_heads
    ops.rope_(qkv[:, : n_q + n_kv], rope.cos, rope.sin)
    return NewTokens(qkv[:, :n_q], qkv[:, n_q : n_q + n_kv], qkv[:, n_q + n_kv :])


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, w["final_norm"], config.norm_eps)
