"""gpt-oss: Llama's attention with biases and a learned sink for each head, every other layer within
a window; and in every layer experts, whose SwiGLU is clamped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, Routed, llama
from sl_serve.models.experts import expert_params, likeliest, router_params
from sl_serve.models.llama import head_input, hidden_states, static_tensors
from sl_serve.models.parts import add_linear, linear, vector_param
from sl_serve.ops import Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import layer_windows
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


def _untruncated(fields: Mapping[str, Any], _tensors: Collection[str]) -> Mapping[str, Any]:
    """The ends of YaRN's ramp are no whole numbers in the published models, which no file says."""
    scaling = fields.get("rope_scaling")
    return {"rope_scaling": {**scaling, "truncate": False}} if scaling else {}


GGUF = GgufDialect(
    "gpt-oss",
    {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    derived=_untruncated,
    has_experts=True,
)

MLP = llama.PREFIX + "mlp."
STACKED = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))


@dataclass(frozen=True, slots=True)
class GptOssConfig(ModelConfig):
    windows: tuple[int | None, ...] = ()  # of each layer
    gate_gain: float = 1.702
    limit: float = 7.0


def model_config(fields: Fields, generation: Fields) -> GptOssConfig:
    fields.only("hidden_act", "silu")
    common = decoder_fields(fields, generation)
    if "dtype" not in fields and "torch_dtype" not in fields:
        common["dtype"] = "bfloat16"  # of the published ones, which do not say it
    window = fields.integer("sliding_window", 128)
    return GptOssConfig(
        **common | {"norm_eps": fields.number("rms_norm_eps", 1e-5)},
        attention_bias=fields.boolean("attention_bias", True),
        n_experts=fields.integer("num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok", 4),
        expert_size=common["intermediate_size"],
        windows=layer_windows(fields, window, lambda layer: layer % 2 == 0),
        gate_gain=fields.number("swiglu_alpha", 1.702),
        limit=fields.number("swiglu_limit", 7.0),
        stacked=STACKED,
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    own = [p for p in llama.layer_params(config) if p.name not in ("gate_up", "down")]
    sinks = vector_param("sinks", llama.PREFIX + "self_attn.sinks", config.n_heads)
    return (
        *own,
        sinks,
        *router_params(config, MLP + "router", bias=True),
        *expert_params(config, MLP + "experts.{expert}", bias=True),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    assert isinstance(config, GptOssConfig)
    new = llama.new_tokens(config, ops, w, x, ropes[0])
    scoring = Scoring(window=config.windows[layer], sinks=w["sinks"].float())
    attended = yield new._replace(scoring=scoring)
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    logits = linear(ops, "router", h, w)
    x += yield Routed(h, *likeliest(logits, config.experts_per_token, sum_to_one=True))


def expert(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(config, GptOssConfig)
    gate, up = linear(ops, "gate_up", x, w).chunk(2, dim=-1)
    gate = gate.clamp(max=config.limit)
    up = up.clamp(-config.limit, config.limit)
    return linear(ops, "down", (gate * config.gate_gain).sigmoid_().mul_(gate).mul_(up + 1), w)
