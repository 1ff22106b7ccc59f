"""Phi 1 to 2: LayerNorm, MLP beside attention behind one norm, biases everywhere, on logits too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    activation_name,
    add_mlp,
    final_layer_norm,
    layer_norm,
    layer_norm_params,
    layer_norm_tensors,
    linear,
    linear_params,
    mlp_input,
    new_tokens_of,
    vocabulary_tensors,
)
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

PREFIX = "model.layers.{layer}."

hidden_states, head_input = llama.hidden_states, final_layer_norm


GGUF = GgufDialect("phi2", rotary_share="partial_rotary_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiConfig(ModelConfig):
    activation: str
    qk_norm: bool  # a LayerNorm for each head's query and key


def model_config(fields: Fields, generation: Fields) -> PhiConfig:
    fields = fields.or_else({"partial_rotary_factor": 0.5})
    return PhiConfig(
        **decoder_fields(fields, generation) | {"norm_eps": fields.number("layer_norm_eps", 1e-5)},
        attention_bias=True,
        mlp_bias=True,
        activation=activation_name(fields, "hidden_act", "gelu_new"),
        qk_norm=fields.boolean("qk_layernorm", False),
    )


def layer_params(config: PhiConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp = PREFIX + "self_attn.", PREFIX + "mlp."
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    qkv = {attn + name: size for name, size in qkv.items()}
    norms = [
        param
        for name in ("q", "k")
        for param in layer_norm_params(f"{name}_norm", f"{attn}{name}_layernorm", config.head_dim)
    ]
    return (
        *layer_norm_params("attention_norm", PREFIX + "input_layernorm", hidden),
        *linear_params("qkv", hidden, qkv, config.attention_bias),
        *(norms if config.qk_norm else ()),
        *linear_params("o", config.q_size, {attn + "dense": hidden}, config.attention_bias),
        *linear_params("fc1", hidden, {mlp + "fc1": inner}, config.mlp_bias),
        *linear_params("fc2", inner, {mlp + "fc2": hidden}, config.mlp_bias),
    )


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, "model.embed_tokens"),
        **layer_norm_tensors("final_norm", "model.final_layernorm", config.hidden_size),
        "head_bias": ("lm_head.bias", (config.vocab_size,)),
    }


def block(
    config: PhiConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = layer_norm(ops, "attention_norm", x, w, config.norm_eps)
    new = new_tokens_of(config, linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim))
    for name, heads in ("q_norm", new.q), ("k_norm", new.k):
        if config.qk_norm:
            flat = heads.reshape(-1, config.head_dim)
            heads.copy_(layer_norm(ops, name, flat, w, config.norm_eps).view(heads.shape))
        ops.rope_(heads, *ropes[0])
    attended = yield new
    h = mlp_input(ops, x, attended, w, config.norm_eps, parallel=True)
    add_mlp(ops, config.activation, x, h, w)
