"""Mistral: Llama without biases, in version 0.1 with a window over the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    head_input,
    hidden_states,
    layer_params,
    new_tokens,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import WindowedConfig
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import sliding_window
from sl_serve.weights.layout import LayerWeights

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]


def model_config(fields: Fields, generation: Fields) -> WindowedConfig:
    fields = fields.with_defaults(max_position_embeddings=131072)
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    decoder = decoder_fields(fields, generation)
    windows = (sliding_window(fields, absent=4096),) * decoder["n_layers"]
    return WindowedConfig(**decoder, windows=windows)


def block(
    config: WindowedConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    attended = yield new_tokens(config, ops, w, x, ropes[0], config.scoring(layer))
    second_half(config, ops, w, x, attended)
