"""Activation bytes of a family's layer, fitted from two probes that take next to nothing.

Everything a layer makes on its way is linear in its tokens. So its arithmetic runs twice over a
few tokens, without its products and with weights of one number, the largest sum of tensors alive
at once is noted, and a line laid through both. The pure-torch operations are probed: kernels of
our own need no more. (On torch's meta device nothing would be computed, but importing what that
needs takes two seconds.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sl_serve.config import ModelConfig
from sl_serve.models import NewTokens, RopeTable, Routed, load_family, run_block
from sl_serve.ops import TorchOps
from sl_serve.ops.rounded import rounded
from sl_serve.plan.model_sizes import LinearBytes
from sl_serve.weights.layout import LayerWeights, Param, largest_layer
from sl_serve.weights.quantised import Weight

PROBE_TOKENS = (16, 64)


def fit_activations(model: ModelConfig, dtype: torch.dtype) -> LinearBytes:
    """Of one layer's pass over a sub-batch, its hidden states and rotary tables included."""
    return line_through(*(activation_bytes(model, dtype, n) for n in PROBE_TOKENS))


def line_through(bytes_few: int, bytes_many: int) -> LinearBytes:
    """From those of each of PROBE_TOKENS."""
    few, many = PROBE_TOKENS
    per_token = (bytes_many - bytes_few) / (many - few)
    return LinearBytes(per_token, bytes_few - few * per_token)


def activation_bytes(model: ModelConfig, dtype: torch.dtype, n_tokens: int) -> int:
    """The most bytes alive at once while one layer is computed for n_tokens tokens, all of which
    may ask the same expert."""
    family, ops = load_family(model.family), ShapeOps(dtype)
    params = family.layer_params(model)
    layer = largest_layer(params, model.n_layers)
    present = [p for p in params if p.is_in(layer)]
    with torch.inference_mode():
        weights = empty_weights([p for p in present if not p.n_experts], dtype)
        expert = empty_weights([p for p in present if p.n_experts], dtype)

        def ask(routed: Routed) -> torch.Tensor:
            hidden, out = routed.hidden.clone(), torch.zeros_like(routed.hidden)
            given = family.expert(model, ops, expert, hidden.clone())
            return out.add_(given * routed.weights[:, :1].to(dtype))

        alive = PeakBytes()
        with alive:
            x = torch.zeros(n_tokens, model.hidden_size, dtype=dtype)
            ropes = [RopeTable(*torch.zeros(2, n_tokens, n)) for n in model.rotated_pairs]
            run_block(family.block(model, ops, layer, weights, x, ropes), _attend, ask)
    return alive.peak_bytes


def empty_weights(params: Iterable[Param], dtype: torch.dtype) -> LayerWeights:
    """Of any shape, in the memory of one number."""
    zero = torch.zeros((), dtype=dtype)
    return {p.name: zero.expand(p.shape) for p in params}


def _attend(new: NewTokens) -> torch.Tensor:
    n_tokens, n_heads, head_dim = new.q.shape
    return torch.zeros(n_tokens, n_heads * head_dim, dtype=new.q.dtype)


class ShapeOps(TorchOps):
    """Without products, which leave nothing beside their buffers and what they round: that is
    rounded whatever the weights."""

    def linear(
        self, name: str, x: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self.rounds:
            self.round(x)
        return self._scratch(name, len(x), w.shape[1]).zero_()

    def add_linear_(
        self, x: torch.Tensor, h: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> None:
        if self.rounds:
            self.round(h)

    def round(self, x: torch.Tensor) -> None:
        rounded(x)


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every tensor that is made, until its memory would be given back. `given`: those
    that are there before, and do not count."""

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self.alive_bytes = 0
        self._known = weakref.WeakSet(x.untyped_storage() for x in given)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler at the first operation, which takes 2 s."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        n_bytes = storage.nbytes()
        weakref.finalize(storage, self._forget, n_bytes)
        self.alive_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def _forget(self, n_bytes: int) -> None:
        self.alive_bytes -= n_bytes
