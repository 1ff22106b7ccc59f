"""OLMo 1: Llama whose norms have no weights, and whose queries, keys and values may be clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors, llama
from sl_serve.models.llama import (
    all_heads,
    attention_params,
    gated_up,
    hidden_states,
    mlp_params,
    rotated,
)
from sl_serve.models.parts import add_linear
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

GGUF = GgufDialect("olmo", {"attention.clamp_kqv": "clip_qkv"}, rows=LLAMA_ROWS)


@dataclass(frozen=True, slots=True)
class OlmoConfig(ModelConfig):
    clip_qkv: float | None = None  # no element is further from 0


def model_config(fields: Fields, generation: Fields) -> OlmoConfig:
    fields.only("hidden_act", "silu")
    # Its epsilon is the same in all of them, and not among the settings.
    return OlmoConfig(
        **decoder_fields(fields, generation) | {"norm_eps": 1e-5},
        attention_bias=fields.boolean("attention_bias", False),
        clip_qkv=fields.number("clip_qkv") if "clip_qkv" in fields else None,
    )


def layer_params(config: OlmoConfig) -> tuple[Param, ...]:
    bias = config.attention_bias
    return (*attention_params(config, bias, bias), *mlp_params(config))


def static_tensors(config: OlmoConfig) -> StaticTensors:
    tensors = llama.static_tensors(config)
    return {name: tensors[name] for name in ("embed", "head")}


def block(
    config: OlmoConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    heads = all_heads(config, ops, w, norm(config, x))
    if config.clip_qkv is not None:
        heads.clamp_(-config.clip_qkv, config.clip_qkv)
    attended = yield rotated(config, ops, heads, ropes[0])
    add_linear(ops, "o", x, attended, w)
    add_linear(ops, "down", x, gated_up(ops, w, norm(config, x)), w)


def norm(config: OlmoConfig, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=config.norm_eps)


def head_input(config: OlmoConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return norm(config, x)
