"""Command R7B and A: Command R with a window over the last tokens in most layers; the others see
all and do not rotate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.models import Block, RopeTable
from sl_serve.models.cohere import (
    CohereConfig,
    cohere_fields,
    head_input,
    layer_params,
    new_tokens,
    second_half,
)
from sl_serve.models.llama import hidden_states, static_tensors
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_dialect import GgufDialect
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

GGUF = GgufDialect("cohere2", {"logit_scale": "logit_scale"})


def model_config(fields: Fields, generation: Fields) -> CohereConfig:
    settings = cohere_fields(fields, generation)
    window = sliding_window(fields, absent=4096)
    period = fields.integer("sliding_window_pattern", 4)
    windows = layer_windows(fields, window, lambda layer: (layer + 1) % period != 0)
    return CohereConfig(**settings, windows=windows)


def block(
    config: CohereConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    rope = None if config.windows[layer] is None else ropes[0]
    attended = yield new_tokens(config, ops, w, x, rope, config.scoring(layer))
    second_half(config, ops, w, x, attended)
