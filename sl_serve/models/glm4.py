"""GLM 4 and Z1 of 2025: GLM with norms before and after both attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, glm
from sl_serve.models.glm import model_config, new_tokens
from sl_serve.models.llama import PREFIX, gated_up, head_input, hidden_states, static_tensors
from sl_serve.models.parts import product, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect("glm4", rotary_share="partial_rotary_factor")


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    hidden = config.hidden_size
    return (
        *glm.layer_params(config),
        vector_param("attention_norm", PREFIX + "post_self_attn_layernorm.weight", hidden),
        vector_param("mlp_norm", PREFIX + "post_mlp_layernorm.weight", hidden),
    )


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x, ropes[0])
    h = product(ops, "o", attended, w)
    x += ops.rms_norm(h, w["attention_norm"], config.norm_eps)
    h = ops.rms_norm(x, w["post_norm"], config.norm_eps)
    h = product(ops, "down", gated_up(ops, w, h), w)
    x += ops.rms_norm(h, w["mlp_norm"], config.norm_eps)
