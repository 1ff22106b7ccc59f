"""Command R: attention and MLP side by side after one norm, neighbours that turn together, scaled
logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

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
    static_tensors,
)
from sl_serve.models.parts import (
    WindowedConfig,
    add_linear,
    halves_apart,
    layer_norm_heads,
    vector_param,
)
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

GGUF = GgufDialect(
    "command-r",
    {"logit_scale": "logit_scale"},
    derived=lambda _fields, tensors: {"use_qk_norm": "blk.0.attn_q_norm.weight" in tensors},
)


@dataclass(frozen=True, slots=True)
class CohereConfig(WindowedConfig):
    logit_scale: float = 1.0  # logits are multiplied with it
    has_head_norms: bool = False


def model_config(fields: Fields, generation: Fields) -> CohereConfig:
    settings = cohere_fields(fields.with_defaults(rope_theta=500000.0), generation)
    return CohereConfig(
        **settings,
        windows=(None,) * settings["n_layers"],
        has_head_norms=fields.boolean("use_qk_norm", False),
    )


def cohere_fields(fields: Fields, generation: Fields) -> dict[str, Any]:
    """Arguments of a CohereConfig, but for windows."""
    fields = fields.with_defaults(max_position_embeddings=8192, tie_word_embeddings=True)
    fields.only("hidden_act", "silu")
    return decoder_fields(fields, generation) | {
        "norm_eps": fields.number("layer_norm_eps", 1e-5),
        "attention_bias": fields.boolean("attention_bias", False),
        "logit_scale": fields.number("logit_scale", 0.0625),
    }


def layer_params(config: CohereConfig) -> tuple[Param, ...]:
    return (
        vector_param("input_norm", PREFIX + "input_layernorm.weight", config.hidden_size),
        *attention_params(config, config.attention_bias, config.attention_bias),
        *(head_norm_params(config) if config.has_head_norms else ()),
        *mlp_params(config),
    )


def head_norm_params(config: CohereConfig) -> tuple[Param, ...]:
    """A line for each head."""
    attn, line = PREFIX + "self_attn.", config.head_dim
    sizes = {"q_norm": config.q_size, "k_norm": config.kv_size}
    return tuple(
        Param(name, (size,), (f"{attn}{name}.weight",), (size,), line)
        for name, size in sizes.items()
    )


def block(
    config: CohereConfig,
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
    heads = all_heads(config, ops, w, norm("input_norm", config, x, w))
    n_q, n_turning = config.n_heads, config.n_heads + config.n_kv_heads
    if "q_norm" in w:
        layer_norm_heads(heads[:, :n_q], w["q_norm"], config.norm_eps)
        layer_norm_heads(heads[:, n_q:n_turning], w["k_norm"], config.norm_eps)
    if rope is not None:
        halves_apart(heads[:, :n_turning], 2 * rope.cos.shape[1])
    return rotated(config, ops, heads, rope, scoring)


def second_half(
    config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor, attended: torch.Tensor
) -> None:
    h = gated_up(ops, w, norm("input_norm", config, x, w))
    add_linear(ops, "o", x, attended, w)
    add_linear(ops, "down", x, h, w)


def norm(name: str, config: ModelConfig, x: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    """LayerNorm without a bias."""
    weight = w[name].to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, eps=config.norm_eps)


def head_input(config: CohereConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return norm("final_norm", config, x, w).mul_(config.logit_scale)
