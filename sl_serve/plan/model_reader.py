"""From a model's settings to the numbers that the planner computes with. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from sl_serve.config import DTypeName, ModelConfig
from sl_serve.kv.formats import KVFormat
from sl_serve.models import load_family
from sl_serve.plan.activations import fit_activations
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.host import expected_shapes, static_bytes
from sl_serve.weights.layout import LayerLayout, Param, largest_layer


def torch_dtype(name: DTypeName) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def stored_dtype(checkpoint: Checkpoint) -> DTypeName:
    """What weights are held in: as short as the settings say, unless the files say otherwise."""
    config, short = checkpoint.config, checkpoint.config.dtype
    family = load_family(config.family)
    used = set(expected_shapes(family.layer_params(config), config.n_layers))
    used.update(dict(family.static_tensors(config).values()))
    # Old folders have masks and frequencies too, in dtypes of their own.
    found = (checkpoint.location(name) for name in checkpoint.names() if name in used)
    kinds = {place.dtype for place in found if place is not None and place.dtype is not None}
    return short if kinds <= {torch_dtype(short)} else "float32"


def stored_formats(checkpoint: Checkpoint, has_device: bool = False) -> dict[str, Format]:
    """Of every matrix, by its name there, as the processor computes with it; for a device only
    those in blocks, the others come to it in the dtype that it computes with."""
    names = (n for n in checkpoint.names() if len(checkpoint.shape(n)) == 2)
    formats = {name: checkpoint.format(name) for name in names}
    return {n: f for n, f in formats.items() if f.dtype is None or not has_device}


def layer_flops_per_token(model: ModelConfig, params: Sequence[Param]) -> float:
    """Of the matrix products of a layer with the most elements: of its experts, those that a token
    is given."""
    layer = largest_layer(params, model.n_layers)
    return 2.0 * sum(
        math.prod(p.shape) * (model.experts_per_token if p.n_experts else 1)
        for p in params
        if p.is_matrix and p.is_in(layer)
    )


def compute_dtype(stored: DTypeName, has_device: bool) -> DTypeName:
    """An accelerator computes in what is stored, the processor in float32."""
    return stored if has_device else "float32"


def read_sizes(
    name: str,
    model: ModelConfig,
    stored: torch.dtype,
    compute: torch.dtype,
    formats: Mapping[str, Format] = MappingProxyType({}),
    has_device: bool = False,
    kv: KVFormat | None = None,
) -> ModelSizes:
    """`stored`: of weights in memory and on disk, but for those with a format of their own, by the
    checkpoint's name; on a device all are computed with in it. `compute`: of activations. `kv`: of
    K and V; None: as `compute`."""
    family = load_family(model.family)
    params, static = family.layer_params(model), family.static_tensors(model)
    static_formats = {} if has_device else formats
    sizes = {
        source: static_bytes(shape, static_formats.get(source, plain(stored)))
        for source, shape in static.values()  # equal checkpoint names share one tensor
    }
    head, head_shape = static["head"]
    layout = LayerLayout(params, stored, formats, model.n_layers)
    return ModelSizes(
        name=name,
        n_layers=model.n_layers,
        layer_bytes=layout.image_bytes,
        head_bytes=sizes[head],
        static_bytes=sum(sizes.values()),
        layer_flops_per_token=layer_flops_per_token(model, params),
        head_flops_per_token=2.0 * math.prod(head_shape),
        hidden_size=model.hidden_size,
        q_size=model.q_size,
        kv_size=model.kv_size,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        itemsize=compute.itemsize,
        activations=fit_activations(model, compute),
        expanded_layer_bytes=layout.expanded_bytes if has_device else 0,
        stored_kv_bytes=model.n_kv_lines * kv.line_bytes(model.head_dim) if kv else None,
        n_kv_kinds=model.n_kv_kinds,
        experts_bytes=model.n_experts * layout.expert_bytes,
        n_experts=model.n_experts,
        experts_per_token=model.experts_per_token,
    )
