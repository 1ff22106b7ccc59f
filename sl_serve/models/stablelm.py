"""StableLM: Llama's projections with LayerNorm, rotary positions in a part of each head, and in the
12b a norm for each head's query and key, and the MLP beside attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.parts import (
    activation_name,
    add_linear,
    final_layer_norm,
    gated,
    layer_norm,
    layer_norm_heads,
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


GGUF = GgufDialect(
    "stablelm",
    {"use_parallel_residual": "use_parallel_residual"},
    rotary_share="partial_rotary_factor",
    derived=lambda fields, _tensors: {"use_qkv_bias": fields["attention_bias"]},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StableLmConfig(ModelConfig):
    activation: str
    parallel: bool  # the MLP sees what attention sees, not what it made
    qk_norm: bool


def model_config(fields: Fields, generation: Fields) -> StableLmConfig:
    fields = fields.with_defaults(partial_rotary_factor=0.25, max_position_embeddings=4096)
    return StableLmConfig(
        **decoder_fields(fields, generation) | {"norm_eps": fields.number("layer_norm_eps", 1e-5)},
        attention_bias=fields.boolean("use_qkv_bias", False),
        activation=activation_name(fields, "hidden_act", "silu"),
        parallel=fields.boolean("use_parallel_residual", False),
        qk_norm=fields.boolean("qk_layernorm", False),
    )


def layer_params(config: StableLmConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp = PREFIX + "self_attn.", PREFIX + "mlp."
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    qkv = {attn + name: size for name, size in qkv.items()}
    gate_up = {mlp + name: inner for name in ("gate_proj", "up_proj")}
    mlp_norm = layer_norm_params("mlp_norm", PREFIX + "post_attention_layernorm", hidden)
    return (
        *layer_norm_params("attention_norm", PREFIX + "input_layernorm", hidden),
        *linear_params("qkv", hidden, qkv, config.attention_bias),
        *(_head_norms(config) if config.qk_norm else ()),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, False),
        *(() if config.parallel else mlp_norm),
        *linear_params("gate_up", hidden, gate_up, False),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, False),
    )


def _head_norms(config: ModelConfig) -> list[Param]:
    """Each head has weights of its own."""
    size, params = config.head_dim, []
    for name, n in ("q", config.n_heads), ("k", config.n_kv_heads):
        module = f"{PREFIX}self_attn.{name}_layernorm.norms."
        sources = tuple(f"{module}{head}.weight" for head in range(n))
        params.append(Param(f"{name}_norm", (n * size,), sources, (size,) * n))
    return params


def static_tensors(config: ModelConfig) -> StaticTensors:
    return {
        **vocabulary_tensors(config, "model.embed_tokens"),
        **layer_norm_tensors("final_norm", "model.norm", config.hidden_size),
    }


def block(
    config: StableLmConfig,
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
            layer_norm_heads(heads, w[name], config.norm_eps)
        ops.rope_(heads, *ropes[0])
    attended = yield new
    h = mlp_input(ops, x, attended, w, config.norm_eps, config.parallel)
    add_linear(ops, "down", x, gated(ops, config.activation, linear(ops, "gate_up", h, w)), w)
