"""The native core behind the same names: float32 on the CPU.

The kernels get raw addresses, so every shape is checked here, before the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sl_serve.kv.rows import FIELDS, RowTable
from sl_serve.ops.protocol import CAUSAL, KVRegion, Scoring
from sl_serve.ops.rounded import PART_FLOATS, rounded_floats
from sl_serve.ops.scratch import HostScratch
from sl_serve.ops.torch_ops import TorchOps
from sl_serve.weights.formats import plain
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight, Rows, Weight

if TYPE_CHECKING:
    from sl_serve._native import Dtype


MANY_POSITIONS = 1 << 62
MAX_HEAD_DIM = 640  # kMaxHeadDim in csrc/attention.inc


class NativeOps(TorchOps):
    """Raises ImportError where the core is not built, ValueError for an unknown target."""

    def __init__(self, n_threads: int, target: str | None = None, *, rounds: bool = False) -> None:
        from sl_serve._native import ROUNDED_PART_BYTES, ROW_FIELDS, Core, Dtype, targets

        assert len(FIELDS) == ROW_FIELDS, "rows.py and kernels.hpp disagree"
        assert PART_FLOATS * torch.float32.itemsize == ROUNDED_PART_BYTES
        target = target or targets()[0]
        self.name = f"native ({target})"
        super().__init__(torch.float32, HostScratch(torch.float32), rounds=rounds)
        self._core = Core(target, n_threads)
        self._weight_dtypes = {d.name: d for d in Dtype}

    def linear(
        self, name: str, x: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not _in_rows(w):
            return super().linear(name, x, w, bias)
        out = self._scratch(name, len(x), w.shape[1])
        self._product(x, w, out, accumulate=False)
        return out if bias is None else out.add_(bias)

    def add_linear_(
        self, x: torch.Tensor, h: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> None:
        if not _in_rows(w):
            super().add_linear_(x, h, w, bias)
            return
        self._product(h, w, x, accumulate=True)
        if bias is not None:
            x += bias

    def logits(self, x: torch.Tensor, head: Rows, out: torch.Tensor) -> None:
        self._gemm(x, head, out, accumulate=False)

    def _product(self, a: torch.Tensor, w: Weight, c: torch.Tensor, *, accumulate: bool) -> None:
        if not isinstance(w, QuantisedWeight):
            self._gemm(a, w.t(), c, accumulate=accumulate)
            return
        for columns, rows in w.columns():
            self._gemm(a, rows, c[:, columns], accumulate=accumulate)

    def _gemm(self, a: torch.Tensor, b: Rows, c: torch.Tensor, *, accumulate: bool) -> None:
        """c (m, n) = a (m, k) times b (n, k) transposed, or c += that; b in any format."""
        (m, k), n = a.shape, len(b)
        assert tuple(b.shape) == (n, k) and c.shape == (m, n)
        data, stride, dtype = self._blocks_of(b)
        assert data.device.type == "cpu" and data.stride(1) == 1
        _check_lines(a)
        _check_lines(c)
        self._core.gemm(
            a.data_ptr(),
            a.stride(0),
            data.data_ptr(),
            stride,
            dtype,
            c.data_ptr(),
            c.stride(0),
            accumulate,
            self.same_order,
            self._room_for_rounded(b, m, k),
            m,
            n,
            k,
        )

    def _room_for_rounded(self, b: Rows, m: int, k: int) -> int:
        """An address, or 0: a is multiplied as it is."""
        if not (self.rounds and isinstance(b, QuantisedRows) and b.format.is_narrow):
            return 0
        return self._scratch("rounded", m, rounded_floats(k)).data_ptr()

    def _blocks_of(self, b: Rows) -> tuple[torch.Tensor, int, Dtype]:
        """The memory of b, blocks from a row to the next, and what they are."""
        if not isinstance(b, QuantisedRows):
            return b, b.stride(0), self._weight_dtypes[plain(b.dtype).name]
        stride, rest = divmod(b.data.stride(0), b.format.block_bytes)
        assert rest == 0
        return b.data, stride, self._weight_dtypes[b.format.name]

    def append(self, region: KVRegion, table: RowTable, k: torch.Tensor, v: torch.Tensor) -> None:
        _check_heads(k, table)
        assert v.shape == k.shape and v.stride() == k.stride()
        self._core.append(
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            *_rows(region, table),
            k.shape[1],
            k.shape[2],
            self._weight_dtypes[table.format.blocks],
        )

    def attend(
        self,
        region: KVRegion,
        table: RowTable,
        q: torch.Tensor,
        n_kv_heads: int,
        scoring: Scoring = CAUSAL,
    ) -> torch.Tensor:
        _check_heads(q, table)
        n_tokens, n_heads, head_dim = q.shape
        assert n_heads % n_kv_heads == 0 and head_dim <= MAX_HEAD_DIM
        out = self._scratch("attention", n_tokens, n_heads * head_dim)
        self._core.attend(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            out.stride(0),
            *_rows(region, table),
            n_heads,
            n_kv_heads,
            head_dim,
            self._weight_dtypes[table.format.blocks],
            scoring.scale_for(head_dim),
            scoring.window or MANY_POSITIONS,
            scoring.softcap or 0.0,
            _of_heads(scoring.slopes, n_heads),
            _of_heads(scoring.sinks, n_heads),
        )
        return out

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        n_tokens, n_heads, head_dim = x.shape
        n_pairs = cos.shape[1]
        _check_lines(x)
        assert 2 * n_pairs <= head_dim and cos.shape == sin.shape == (n_tokens, n_pairs)
        assert cos.is_contiguous() and sin.is_contiguous()
        line, head, _ = x.stride()
        self._core.rope(
            x.data_ptr(), line, head, n_tokens, n_heads, 2 * n_pairs, cos.data_ptr(), sin.data_ptr()
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert x.is_contiguous() and weight.shape == x.shape[-1:]
        weight = weight.float().contiguous()
        _check_lines(x)
        n_lines, width = x.shape
        out = self._scratch("norm", n_lines, width)
        self._core.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), n_lines, width, eps)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        assert gate_up.is_contiguous()
        _check_lines(gate_up)
        n_lines, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._scratch("silu", n_lines, width)
        self._core.silu_mul(gate_up.data_ptr(), out.data_ptr(), n_lines, width)
        return out


def _in_rows(w: Weight) -> bool:
    """Whether each output's weights are one run of memory, as a checkpoint's rows (out, in) are:
    those the kernel reads."""
    return isinstance(w, QuantisedWeight) or w.stride(0) == 1


def _rows(region: KVRegion, table: RowTable) -> tuple[int, int, int, int]:
    base = region.memory.data_ptr() + region.offset_bytes
    return table.rows.ctypes.data, len(table.rows), table.chunks.ctypes.data, base


def _of_heads(numbers: torch.Tensor | None, n_heads: int) -> int:
    """The address of one for each head, or 0."""
    if numbers is None:
        return 0
    _check_lines(numbers)
    assert numbers.shape == (n_heads,)
    return numbers.data_ptr()


def _check_lines(x: torch.Tensor) -> None:
    assert x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1


def _check_heads(x: torch.Tensor, table: RowTable) -> None:
    _check_lines(x)
    assert x.stride(1) == x.shape[2], "heads of a token stand side by side"
    last = table.rows[-1]
    assert last[0] + last[1] == x.shape[0], "the table's tokens are those of the tensor"
