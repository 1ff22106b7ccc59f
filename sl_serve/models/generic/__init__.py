"""Decoders that have no file of their own here, but in transformers: slower than a family's own
arithmetic, since a layer's first half is computed twice, and as right.

A module of transformers is built without weights and run layer by layer with ours. Its products
are the engine's operations, so weights may be in blocks; its attention is the engine's, over our
KV. A small model of the same kind is compared with transformers before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import ModelConfig
from sl_serve.models import Block, RopeTable, StaticTensors
from sl_serve.models.generic.settings import GenericConfig, read
from sl_serve.models.generic.skeleton import Skeleton
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param


def model_config(fields: Fields, generation: Fields) -> ModelConfig:
    return read(fields, generation)


def layer_params(config: ModelConfig) -> tuple[Param, ...]:
    return _skeleton(config).layer_params()


def static_tensors(config: ModelConfig) -> StaticTensors:
    return _skeleton(config).static_tensors()


def hidden_states(
    config: ModelConfig,
    ops: Ops,
    w: LayerWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    return _skeleton(config).embedded(ops, w, tokens, positions)


def block(
    config: ModelConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    skeleton, positions = _skeleton(config), ropes[0].cos[:, 0].long()
    attended = yield skeleton.asked(ops, layer, w, x, positions)
    x.copy_(skeleton.result(ops, layer, w, x, positions, attended))


def head_input(config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    return _skeleton(config).head_input(ops, w, x)


def _skeleton(config: ModelConfig) -> Skeleton:
    assert isinstance(config, GenericConfig)
    return config.skeleton
