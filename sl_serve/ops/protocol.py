"""The operations a model is made of. Each has a pure-torch twin.

Results lie in scratch buffers: one is overwritten by the next call of the same operation (of the
same name, for `linear`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.rows import RowTable
from sl_serve.weights.quantised import Rows, Weight


class KVRegion(NamedTuple):
    """One layer's KV: bytes of `memory` from `offset_bytes` on, laid out as the table says."""

    memory: torch.Tensor  # uint8
    offset_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """How a query weighs keys: softmax over softcap * tanh(scale * q k / softcap) + bias, where
    the bias of a head is its slope times (the key's position - the query's)."""

    scale: float | None = None  # None: 1/sqrt(D)
    window: int | None = None  # a token sees the last so many positions, its own included
    softcap: float | None = None  # None: scores as they are
    slopes: torch.Tensor | None = None  # (Hq,) float32, on the device (ALiBi, arXiv 2108.12409)
    # (Hq,) float32, on the device: of each head a score beside those of keys, which takes weight
    # and gives no value (attention sinks, arXiv 2309.17453, as gpt-oss learns them).
    sinks: torch.Tensor | None = None

    def to(self, device: torch.device) -> Scoring:
        """In float32."""
        slopes, sinks = (
            None if x is None else x.to(device, torch.float32) for x in (self.slopes, self.sinks)
        )
        return replace(self, slopes=slopes, sinks=sinks)

    def scale_for(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


CAUSAL = Scoring()


class Ops(Protocol):
    """Shapes: T tokens of a sub-batch, Hq query heads, Hk KV heads, D head size."""

    name: str
    dtype: torch.dtype  # of activations; weights may be shorter
    # Sums of matrix products are to be in one order for any number of rows, which is slower for
    # few. The native core obeys; libraries choose for themselves.
    same_order: bool

    def linear(
        self, name: str, x: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x (T, in) @ w (in, out) + bias (out), in the scratch buffer `name`."""

    def add_linear_(
        self, x: torch.Tensor, h: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> None:
        """x (T, out) += h (T, in) @ w (in, out) + bias (out)."""

    def logits(self, x: torch.Tensor, head: Rows, out: torch.Tensor) -> None:
        """out (n, vocabulary) = x (n, hidden) @ head (vocabulary, hidden) transposed."""

    def expand(self, w: Weight, out: torch.Tensor) -> None:
        """out = w, of whatever format, rounded to the compute dtype: vectors, or matrices
        (in, out) whose columns are contiguous."""

    def pack_kv(self, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """out (T, 2, Hk, D) = k and v (T, Hk, D), side by side for each token."""

    def prepare(
        self,
        table: RowTable,
        spec: KVSpec,
        is_window: bool = True,
        stored: KVFormat | None = None,
    ) -> RowTable:
        """The table of device memory with all that is looked up in it once per step; `append` and
        `attend` get it for every layer. Tables of memory used in place are not prepared.

        `is_window`: what the host has not sent and nobody has written may be anything there, and
        what is written is for this step alone; otherwise all of the memory is numbers, to stay.
        `stored`: what is appended is first made what comes back from this format, so that a token
        sees itself as later ones will see it.
        """

    def append(self, region: KVRegion, table: RowTable, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v (T, Hk, D) of the new tokens into their rows."""

    def attend(
        self,
        region: KVRegion,
        table: RowTable,
        q: torch.Tensor,
        n_kv_heads: int,
        scoring: Scoring = CAUSAL,
    ) -> torch.Tensor:
        """Causal attention of q (T, Hq, D) over each row's KV, new tokens included (they are
        appended first). Returns (T, Hq * D)."""

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the pairs (i, i + n/2) of the first n elements of each head of x (T, heads, D) in
        place; cos, sin: (T, n/2)."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (T, H) / sqrt(mean(x^2) + eps) * weight (H)."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each line times the second: (T, 2 I) -> (T, I)."""

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x - mean) / sqrt(variance + eps) * weight (H) + bias (H), over lines of x (T, H)."""

    def relu_(self, x: torch.Tensor) -> None:
        """max(x, 0), in place."""
