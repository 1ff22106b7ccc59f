"""SmolLM 3: Llama whose layers do not all rotate; those that do not may see only the last
tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import (
    head_input,
    hidden_states,
    layer_params,
    new_tokens,
    second_half,
    static_tensors,
)
from sl_serve.models.parts import PartlyRotatedConfig
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.gguf_dialect import LLAMA_ROWS, GgufDialect
from sl_serve.weights.hf_fields import decoder_fields
from sl_serve.weights.hf_windows import layer_windows, sliding_window
from sl_serve.weights.layout import LayerWeights

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

GGUF = GgufDialect("smollm3", rows=LLAMA_ROWS)


def model_config(fields: Fields, generation: Fields) -> PartlyRotatedConfig:
    fields = fields.with_defaults(
        max_position_embeddings=32768, rope_theta=2e6, tie_word_embeddings=True
    )
    fields.only("hidden_act", "silu")
    decoder = decoder_fields(fields, generation)
    rotates = layers_with_rope(fields, decoder["n_layers"])
    is_used = fields.boolean("use_sliding_window", False)
    window = sliding_window(fields) if is_used else None
    return PartlyRotatedConfig(
        **decoder,
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        windows=layer_windows(fields, window, lambda layer: not rotates[layer]),
        rotates=rotates,
    )


def layers_with_rope(fields: Fields, n_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` has a 1 for a layer that rotates, in spite of its name."""
    marks = fields.get("no_rope_layers")
    if marks is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(n_layers))
    usable = isinstance(marks, list) and all(mark in (0, 1) for mark in marks)
    if not usable or len(marks) < n_layers:
        raise ModelError(
            f"{fields.source}: no_rope_layers must be {n_layers} times 0 or 1, not {shown(marks)}"
        )
    return tuple(bool(mark) for mark in marks[:n_layers])


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
