"""Ministral: Mistral with a window in some layers."""

from __future__ import annotations

from sl_serve.models.llama import head_input, hidden_states, layer_params, static_tensors
from sl_serve.models.mistral import block
from sl_serve.models.parts import WindowedConfig
from sl_serve.weights.fields import Fields
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import layer_windows, sliding_window

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
    windows = layer_windows(fields, sliding_window(fields, absent=4096), lambda _: True)
    return WindowedConfig(**decoder_fields(fields, generation), windows=windows)
