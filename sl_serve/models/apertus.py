"""Apertus: Llama with norms on each query and key head and a plain MLP, whose activation is
learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable
from sl_serve.models.arcee import mlp_params
from sl_serve.models.llama import (
    PREFIX,
    attention_params,
    head_input,
    hidden_states,
    static_tensors,
)
from sl_serve.models.parts import add_linear, linear, vector_param
from sl_serve.models.qwen3 import head_norm_params, new_tokens
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

THETA = 12e6
ROPE = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Of its activation: not learnt, and the same in all of them.
BETA, EPSILON = 0.5, -1e-6

ACTIVATION = PREFIX + "mlp.act_fn."
GGUF = GgufDialect(
    "apertus",
    # Without a scaling in the file there is none, other than in a config.json.
    derived=lambda fields, _tensors: {
        "rope_parameters": fields.get("rope_scaling") or {"rope_type": "default"}
    },
    numbers={f"{ACTIVATION}alpha_p": "xielu.alpha_p", f"{ACTIVATION}alpha_n": "xielu.alpha_n"},
    constants={"xielu.beta": BETA, "xielu.eps": EPSILON},
)


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    fields = fields.with_defaults(
        rms_norm_eps=1e-5,
        max_position_embeddings=65536,
        rope_theta=THETA,
        rope_parameters=fields.get("rope_scaling") or ROPE,
    )
    fields.only("hidden_act", "xielu")
    return ModelConfig(
        **decoder_fields(fields, generation),
        attention_bias=fields.boolean("attention_bias", False),
    )


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        vector_param("attention_norm", PREFIX + "attention_layernorm.weight", hidden),
        *attention_params(config, config.attention_bias, config.attention_bias),
        *head_norm_params(config),
        vector_param("mlp_norm", PREFIX + "feedforward_layernorm.weight", hidden),
        vector_param("alpha_p", ACTIVATION + "alpha_p", 1),
        vector_param("alpha_n", ACTIVATION + "alpha_n", 1),
        *mlp_params(config),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    h = ops.rms_norm(x, w["attention_norm"], config.norm_eps)
    attended = yield new_tokens(config, ops, w, h, ropes[0])
    add_linear(ops, "o", x, attended, w)
    h = ops.rms_norm(x, w["mlp_norm"], config.norm_eps)
    h = xielu(linear(ops, "up", h, w), w["alpha_p"], w["alpha_n"])
    add_linear(ops, "down", x, h, w)


def xielu(x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
    """xIELU, arXiv 2411.13010: a parabola for what is positive, else the integral of an ELU."""
    above = F.softplus(alpha_p.to(x.dtype)) * x * x
    below = torch.expm1(x.clamp(max=EPSILON)).sub_(x).mul_(BETA + F.softplus(alpha_n.to(x.dtype)))
    return torch.where(x > 0, above, below).add_(x, alpha=BETA)
