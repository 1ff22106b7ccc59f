"""Gemma 2: Gemma with norms before and after each half, soft caps, and windows in some layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, gemma, llama
from sl_serve.models.gemma import ACTIVATION, PREFIX, norm
from sl_serve.models.parts import (
    activation_name,
    gated,
    linear,
    linear_params,
    new_tokens_of,
    vector_param,
)
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import Derived, GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import SLIDING, layer_types
from sl_serve.weights.layout import LayerWeights, Param

static_tensors = llama.static_tensors
hidden_states, head_input = gemma.hidden_states, gemma.head_input


def score_scale(n_layers_of_27b: int) -> Derived:
    """The largest scales its scores by its width for each head, the others by the head's."""

    def derived(fields: Mapping[str, Any], _tensors: Collection[str]) -> Mapping[str, Any]:
        width = fields["hidden_size"] // fields["num_attention_heads"]
        is_largest = fields["num_hidden_layers"] == n_layers_of_27b
        return {"query_pre_attn_scalar": width if is_largest else fields["head_dim"]}

    return derived


GGUF = GgufDialect(
    "gemma2",
    {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    derived=score_scale(46),
    norm_offset=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Config(ModelConfig):
    activation: str
    score_scale: float | None  # None: 1/sqrt(head_dim)
    score_softcap: float | None
    window: int
    windowed: tuple[bool, ...]  # by layer


def model_config(fields: Fields, generation: Fields) -> Gemma2Config:
    fields = fields.or_else(gemma.DEFAULTS)
    return Gemma2Config(
        **decoder_fields(fields, generation),
        **attention_fields(fields, 2),
        logit_softcap=softcap(fields, "final_logit_softcapping", 30.0),
        score_softcap=softcap(fields, "attn_logit_softcapping", 50.0),
    )


def attention_fields(fields: Fields, pattern: int) -> dict[str, Any]:
    """Arguments of a Gemma2Config. `pattern`: every so many layers one sees all."""
    fields.only("use_bidirectional_attention", False)
    types = layer_types(fields, lambda layer: (layer + 1) % pattern != 0)
    query_size = fields.number("query_pre_attn_scalar", 256)
    return {
        "activation": activation_name(fields, "hidden_activation", ACTIVATION),
        "attention_bias": fields.boolean("attention_bias", False),
        "score_scale": None if query_size == fields.integer("head_dim") else query_size**-0.5,
        "window": fields.integer("sliding_window", 4096),
        "windowed": tuple(kind == SLIDING for kind in types),
    }


def softcap(fields: Fields, key: str, default: float | None) -> float | None:
    """null says that there is none."""
    return None if fields.values.get(key, default) is None else fields.number(key, default)


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attn, mlp = PREFIX + "self_attn.", PREFIX + "mlp."
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    qkv = {attn + name: size for name, size in qkv.items()}
    gate_up = {mlp + name: inner for name in ("gate_proj", "up_proj")}

    def norm_param(name: str, module: str) -> Param:
        return vector_param(name, f"{PREFIX}{module}_layernorm.weight", hidden)

    return (
        norm_param("attention_norm", "input"),
        *linear_params("qkv", hidden, qkv, config.attention_bias),
        *linear_params("o", config.q_size, {attn + "o_proj": hidden}, config.attention_bias),
        norm_param("attended_norm", "post_attention"),
        norm_param("mlp_norm", "pre_feedforward"),
        *linear_params("gate_up", hidden, gate_up, False),
        *linear_params("down", inner, {mlp + "down_proj": hidden}, False),
        norm_param("output_norm", "post_feedforward"),
    )


def block(
    config: Gemma2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    heads = projected(config, ops, w, x)
    ops.rope_(heads[:, : config.n_heads + config.n_kv_heads], *ropes[0])
    attended = yield new_tokens_of(config, heads, scoring(config, layer))
    add_rest(config, ops, w, x, attended)


def projected(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """(T, Hq + 2 Hk, D): queries, keys and values."""
    h = norm(config, ops, x, w["attention_norm"])
    return linear(ops, "qkv", h, w).view(len(h), -1, config.head_dim)


def scoring(config: Gemma2Config, layer: int) -> Scoring:
    window = config.window if config.windowed[layer] else None
    if window or config.score_scale or config.score_softcap:
        return Scoring(config.score_scale, window, config.score_softcap)
    return CAUSAL


def add_rest(
    config: Gemma2Config, ops: Ops, w: LayerWeights, x: torch.Tensor, attended: torch.Tensor
) -> None:
    x += norm(config, ops, linear(ops, "o", attended, w), w["attended_norm"])
    h = norm(config, ops, x, w["mlp_norm"])
    h = gated(ops, config.activation, linear(ops, "gate_up", h, w))
    x += norm(config, ops, linear(ops, "down", h, w), w["output_norm"])
