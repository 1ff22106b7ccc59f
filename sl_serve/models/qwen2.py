"""Qwen 1.5 to 2.5: Llama with biases on queries, keys and values alone. Later layers may see only
the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    decoder_params,
    head_input,
    hidden_states,
    new_tokens,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import WindowedConfig
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import Windows, layer_windows, sliding_window
from sl_serve.weights.layout import LayerWeights, Param

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect("qwen2")


def model_config(fields: Fields, generation: Fields) -> WindowedConfig:
    fields = fields.with_defaults(max_position_embeddings=32768)
    fields.only("hidden_act", "silu")
    return WindowedConfig(**decoder_fields(fields, generation), windows=windows(fields))


def windows(fields: Fields) -> Windows:
    is_used = fields.boolean("use_sliding_window", False)
    first = fields.integer("max_window_layers", 28, low=0)
    window = sliding_window(fields, absent=4096) if is_used else None
    return layer_windows(fields, window, lambda layer: layer >= first)


def layer_params(config: WindowedConfig) -> tuple[Param, ...]:
    return decoder_params(config, qkv_bias=True, o_bias=False)


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
