"""New keys and values: side by side into staging, and to their lines in a window.

A line is all heads of the keys, or of the values, of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024  # numbers of a program


@triton.jit
def _pack(k, v, out, k_stride, v_stride, line, tile: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = at < line
    out += token * 2 * line
    tl.store(out + at, tl.load(k + token * k_stride + at, mask=inside), mask=inside)
    tl.store(out + line + at, tl.load(v + token * v_stride + at, mask=inside), mask=inside)


@triton.jit
def _scatter(k, v, targets, lines, n_tokens, k_stride, v_stride, line, tile: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = at < line
    key_line, value_line = tl.load(targets + token), tl.load(targets + n_tokens + token)
    key = tl.load(k + token * k_stride + at, mask=inside)
    tl.store(lines + key_line * line + at, key, mask=inside)
    value = tl.load(v + token * v_stride + at, mask=inside)
    tl.store(lines + value_line * line + at, value, mask=inside)


def pack(k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """out (T, 2, Hk, D) = k, v (T, Hk, D)."""
    line = _line(k, v)
    assert out.is_contiguous() and out.shape == (len(k), 2, *k.shape[1:])
    _pack[_grid(k, line)](k, v, out, k.stride(0), v.stride(0), line, TILE)


def scatter(k: torch.Tensor, v: torch.Tensor, targets: torch.Tensor, lines: torch.Tensor) -> None:
    """lines (n, Hk, D) get k and v (T, Hk, D) at the numbers in targets (2, T) int64."""
    line = _line(k, v)
    assert lines.is_contiguous() and lines.shape[1:] == k.shape[1:]
    assert targets.is_contiguous() and targets.shape == (2, len(k))
    strides = k.stride(0), v.stride(0)
    _scatter[_grid(k, line)](k, v, targets, lines, len(k), *strides, line, TILE)


def _line(k: torch.Tensor, v: torch.Tensor) -> int:
    _, n_heads, head_dim = k.shape
    for tensor in (k, v):
        assert tensor.shape == k.shape and tensor.stride()[1:] == (head_dim, 1)
    return n_heads * head_dim


def _grid(k: torch.Tensor, line: int) -> tuple[int, int]:
    return len(k), triton.cdiv(line, TILE)
