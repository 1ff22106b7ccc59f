"""Granite 3: Llama with numbers that embedding, attention, residuals and logits are multiplied
with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, llama
from sl_serve.models.llama import gated_up, layer_params, new_tokens, static_tensors
from sl_serve.models.parts import product
from sl_serve.ops import Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import LLAMA_ROWS, GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect(
    "granite",
    {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    rows=LLAMA_ROWS,
)


@dataclass(frozen=True, slots=True)
class GraniteConfig(ModelConfig):
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # of products of queries and keys
    residual_multiplier: float = 1.0  # of what attention and MLP add
    logits_scaling: float = 1.0  # logits are divided by it


def model_config(fields: Fields, generation: Fields) -> GraniteConfig:
    fields.only("hidden_act", "silu")
    return GraniteConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        attention_multiplier=fields.number("attention_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        logits_scaling=fields.number("logits_scaling", 1.0),
    )


def hidden_states(
    config: GraniteConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    return tokens.mul_(config.embedding_multiplier)


def block(
    config: GraniteConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    scoring, share = Scoring(scale=config.attention_multiplier), config.residual_multiplier
    attended = yield new_tokens(config, ops, w, x, ropes[0], scoring)
    x.add_(product(ops, "o", attended, w), alpha=share)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    x.add_(product(ops, "down", gated_up(ops, w, h), w), alpha=share)


def head_input(config: GraniteConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return llama.head_input(config, ops, w, x).div_(config.logits_scaling)
