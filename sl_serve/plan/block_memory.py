"""What a layer makes of its tokens, measured: a family's arithmetic runs over a few, with
operations that keep the buffers which the engine's keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn import functional as F

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.models import NewTokens, RopeTable, Routed, load_family, run_block
from sl_serve.ops.rounded import rounded_floats
from sl_serve.plan.activations import (
    PROBE_TOKENS,
    PeakBytes,
    ShapeOps,
    empty_weights,
    line_through,
)
from sl_serve.plan.model_sizes import LinearBytes
from sl_serve.weights.layout import Param

Attend = Callable[[NewTokens], torch.Tensor]
Ask = Callable[[Routed], torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Beside hidden states and rotary tables."""

    computed: LinearBytes  # of the sub-batch that a layer is computed for
    waiting: LinearBytes  # of one that waits for its attention or its experts
    expert: LinearBytes  # of the tokens that an expert is computed for


def block_memory(model: ModelConfig, config: EngineConfig) -> BlockMemory:
    """Upper bounds, whatever the layer: everything that a layer makes is linear in its tokens."""
    few, many = (_measured(model, config, n) for n in PROBE_TOKENS)
    return BlockMemory(*(line_through(*pair) for pair in zip(few, many, strict=True)))


def _measured(model: ModelConfig, config: EngineConfig, n_tokens: int) -> tuple[int, int, int]:
    """Bytes, in the order of BlockMemory."""
    with torch.inference_mode():
        ops = _probe(config)
        x = torch.zeros(n_tokens, model.hidden_size, dtype=ops.dtype)
        return *_of_layers(model, ops, x), _of_expert(model, _probe(config), x)


def _of_layers(model: ModelConfig, ops: _Probe, x: torch.Tensor) -> tuple[int, int]:
    """The most bytes alive at once, and those of them that are not in buffers while a layer waits.
    Layers of all kinds pass once before, since buffers are there for good."""
    family = load_family(model.family)
    params = family.layer_params(model)
    layers = {
        layer: empty_weights((p for p in params if p.is_in(layer) and not p.n_experts), ops.dtype)
        for layer in _one_of_each_kind(params, model.n_layers)
    }
    ropes = [RopeTable(*torch.zeros(2, len(x), n)) for n in model.rotated_pairs]
    from_experts = torch.zeros_like(x)

    def run(attend: Attend, ask: Ask) -> None:
        for layer, weights in layers.items():
            run_block(family.block(model, ops, layer, weights, x, ropes), attend, ask)

    run(ops.attended, lambda _: from_experts)
    known = [x, from_experts, *chain(*ropes), *chain(*(w.values() for w in layers.values()))]
    alive, waiting = PeakBytes([*known, *ops.kept]), [0]

    def attend(new: NewTokens) -> torch.Tensor:
        waiting.append(alive.alive_bytes)
        return ops.attended(new)

    def ask(_: Routed) -> torch.Tensor:
        waiting.append(alive.alive_bytes)
        return from_experts

    with alive:
        run(attend, ask)
    return sum(buffer.nbytes for buffer in ops.kept) + alive.peak_bytes, max(waiting)


def _of_expert(model: ModelConfig, ops: _Probe, x: torch.Tensor) -> int:
    family = load_family(model.family)
    weights = empty_weights((p for p in family.layer_params(model) if p.n_experts), ops.dtype)
    alive = PeakBytes([x, *weights.values()])
    with alive:
        if weights:
            family.expert(model, ops, weights, x)
    return alive.peak_bytes


def _one_of_each_kind(params: Sequence[Param], n_layers: int) -> list[int]:
    """Layers that have other tensors than those before."""
    kinds = {tuple(p.is_in(i) for p in params): i for i in reversed(range(n_layers))}
    return sorted(kinds.values())


class _Probe(ShapeOps):
    """The twins; attention's results lie in a buffer of their own."""

    def attended(self, new: NewTokens) -> torch.Tensor:
        n_tokens, n_heads, head_dim = new.q.shape
        return self._scratch("attention", n_tokens + 1, n_heads * head_dim)[:n_tokens].zero_()

    @property
    def kept(self) -> Sequence[torch.Tensor]:
        return self._scratch.buffers


class _DeviceProbe(_Probe):
    """As DeviceOps and those of Triton."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)


class _NativeProbe(_Probe):
    """As the native core: it works in place, and keeps what norms, activations and rounding
    give."""

    def round(self, x: torch.Tensor) -> None:
        self._scratch("rounded", len(x), rounded_floats(x.shape[1]))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._scratch("norm", *x.shape).zero_()

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._scratch("silu", len(gate_up), gate_up.shape[1] // 2).zero_()

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        pass


def _probe(config: EngineConfig) -> _Probe:
    """Of the operations that the engine will choose."""
    dtype = getattr(torch, config.dtype)
    if config.device != "cpu":
        return _DeviceProbe(dtype)
    rounds = config.activations == "int8"
    if config.native and dtype is torch.float32:
        return _NativeProbe(dtype, rounds=rounds)
    return _Probe(dtype, rounds=rounds)
