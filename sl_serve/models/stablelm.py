"""StableLM 2: Llama with LayerNorm and a quarter of each head turning. In the 12B one, MLP and
attention stand side by side, and queries and keys have norms for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, NewTokens, RopeTable
from sl_serve.models.llama import (
    PREFIX,
    all_heads,
    attention_params,
    gated_up,
    hidden_states,
    mlp_params,
    rotated,
)
from sl_serve.models.parts import add_linear, layer_norm, layer_norm_heads, layer_norm_params
from sl_serve.models.starcoder2 import head_input, static_tensors
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
    "stablelm",
    {"use_parallel_residual": "use_parallel_residual"},
    rotary_share="partial_rotary_factor",
    derived=lambda fields, _tensors: {"use_qkv_bias": fields["attention_bias"]},
)


@dataclass(frozen=True, slots=True)
class StableLMConfig(ModelConfig):
    has_head_norms: bool = False
    is_parallel: bool = False  # attention and MLP see the same


def model_config(fields: Fields, generation: Fields) -> StableLMConfig:
    fields = fields.with_defaults(max_position_embeddings=4096, partial_rotary_factor=0.25)
    fields.only("hidden_act", "silu")
    decoder = decoder_fields(fields, generation)
    return StableLMConfig(
        **decoder | {"norm_eps": fields.number("layer_norm_eps", 1e-5)},
        attention_bias=fields.boolean("use_qkv_bias", False),
        has_head_norms=fields.boolean("qk_layernorm", False),
        is_parallel=fields.boolean("use_parallel_residual", False),
    )


def layer_params(config: StableLMConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    params = [
        *layer_norm_params("input_norm", PREFIX + "input_layernorm", hidden),
        *attention_params(config, config.attention_bias, o_bias=False),
        *mlp_params(config),
    ]
    if config.has_head_norms:
        params.append(head_norm_param("q_norm", "q_layernorm", config.n_heads, config.head_dim))
        params.append(head_norm_param("k_norm", "k_layernorm", config.n_kv_heads, config.head_dim))
    if not config.is_parallel:
        params += layer_norm_params("post_norm", PREFIX + "post_attention_layernorm", hidden)
    return tuple(params)


def head_norm_param(name: str, module: str, n_heads: int, head_dim: int) -> Param:
    """One vector of a norm for each head after another."""
    sources = tuple(f"{PREFIX}self_attn.{module}.norms.{i}.weight" for i in range(n_heads))
    return Param(name, (n_heads * head_dim,), sources, (head_dim,) * n_heads)


def block(
    config: StableLMConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x, ropes[0])
    if config.is_parallel:
        h = gated_up(ops, w, layer_norm(ops, "input_norm", x, w, config.norm_eps))
        add_linear(ops, "o", x, attended, w)
    else:
        add_linear(ops, "o", x, attended, w)
        h = gated_up(ops, w, layer_norm(ops, "post_norm", x, w, config.norm_eps))
    add_linear(ops, "down", x, h, w)


def new_tokens(
    config: StableLMConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, rope: RopeTable
) -> NewTokens:
    h = layer_norm(ops, "input_norm", x, w, config.norm_eps)
    heads, n_q = all_heads(config, ops, w, h), config.n_heads
    if "q_norm" in w:
        layer_norm_heads(heads[:, :n_q], w["q_norm"], config.norm_eps)
        layer_norm_heads(heads[:, n_q : n_q + config.n_kv_heads], w["k_norm"], config.norm_eps)
    return rotated(config, ops, heads, rope)
