"""Mixtral: Llama's attention, and in every layer experts of which each token gets a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, Routed, llama
from sl_serve.models.experts import expert_params, gated_expert, likeliest, router_params
from sl_serve.models.llama import head_input, hidden_states, static_tensors
from sl_serve.models.parts import add_linear, linear
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import LLAMA_ROWS, GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "expert",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect(
    "llama",
    {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    rows=LLAMA_ROWS,
    has_experts=True,
)

MODULE = llama.PREFIX + "block_sparse_moe."


@dataclass(frozen=True, slots=True)
class MixtralConfig(ModelConfig):
    window: int | None = None


def model_config(fields: Fields, generation: Fields) -> MixtralConfig:
    fields.only("hidden_act", "silu")
    common = decoder_fields(fields, generation)
    return MixtralConfig(
        **common | {"norm_eps": fields.number("rms_norm_eps", 1e-5)},
        n_experts=fields.integer("num_local_experts", 8),
        experts_per_token=fields.integer("num_experts_per_tok", 2),
        expert_size=common["intermediate_size"],
        window=fields.integer("sliding_window") if "sliding_window" in fields else None,
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    dense = [p for p in llama.layer_params(config) if p.name not in ("gate_up", "down")]
    experts = expert_params(config, MODULE + "experts.{expert}", names=("w1", "w3", "w2"))
    return (*dense, *router_params(config, MODULE + "gate"), *experts)


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    assert isinstance(config, MixtralConfig)
    scoring = CAUSAL if config.window is None else Scoring(window=config.window)
    attended = yield llama.new_tokens(config, ops, w, x, ropes[0], scoring)
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    logits = linear(ops, "router", h, w)
    x += yield Routed(h, *likeliest(logits, config.experts_per_token, sum_to_one=True))


def expert(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return gated_expert(ops, w, x)
