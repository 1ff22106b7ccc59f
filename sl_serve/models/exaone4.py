"""EXAONE 4: norms after attention and MLP and on each query and key head. Where some layers see
only the last tokens, the others do not rotate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    attention_params,
    head_input,
    hidden_states,
    mlp_params,
    static_tensors,
)
from sl_serve.models.olmo2 import norm_params_after, second_half
from sl_serve.models.parts import PartlyRotatedConfig
from sl_serve.models.qwen3 import head_norm_params, new_tokens
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import WINDOWS, GgufDialect, listed_windows
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import layer_windows, sliding_window
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect("exaone4", WINDOWS, derived=listed_windows)


def model_config(fields: Fields, generation: Fields) -> PartlyRotatedConfig:
    fields = fields.with_defaults(rms_norm_eps=1e-5)
    fields.only("hidden_act", "silu")
    decoder = decoder_fields(fields, generation)
    window = sliding_window(fields, absent=4096)
    windows = layer_windows(fields, window, lambda layer: (layer + 1) % period(fields) != 0)
    return PartlyRotatedConfig(
        **decoder,
        windows=windows,
        rotates=tuple(window is None or of_layer is not None for of_layer in windows),
    )


def period(fields: Fields) -> int:
    """Every so many layers, one sees all."""
    return fields.integer("sliding_window_pattern", 4)


def layer_params(config: PartlyRotatedConfig) -> tuple[Param, ...]:
    return (
        *attention_params(config, qkv_bias=False, o_bias=False),
        *head_norm_params(config),
        *mlp_params(config),
        *norm_params_after(config),
    )


def block(
    config: PartlyRotatedConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    rope = config.rope(layer, ropes)
    attended = yield new_tokens(config, ops, w, x, rope, config.scoring(layer))
    second_half(config, ops, w, x, attended)
