"""Lines of KV in pure torch: to bytes and back. csrc/kv_lines.inc writes the same, to the bit."""

from __future__ import annotations

import torch

from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import EXPANSION_BYTES
from sl_serve.weights.formats import BLOCK_FORMATS

LARGEST_HALF = 65504.0
# Expanded at a time: with what is made on the way, EXPANSION_BYTES at most.
PIECE_NUMBERS = EXPANSION_BYTES // 32


def write_lines(x: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """(..., D) numbers -> (..., line_bytes) uint8. Integers are those nearest with the scale as it
    is stored."""
    if format.block_elements == 1:
        numbers = x.to(getattr(torch, format.blocks))
        return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    n_blocks = -(-x.shape[-1] // format.block_elements)
    n_missing = n_blocks * format.block_elements - x.shape[-1]
    x = x.float()
    # The least number of a block does not change when its last is said again.
    padded = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], n_missing)], dim=-1)
    blocks = padded.view(-1, format.block_elements)
    is_there = torch.arange(n_blocks * format.block_elements, device=x.device) < x.shape[-1]
    write = {"q8_0": _write_q8_0, "q4_1": _write_q4_1}[format.blocks]
    numbers = write(blocks, is_there.view(n_blocks, -1).repeat(len(blocks) // n_blocks, 1))
    return numbers.view(*x.shape[:-1], n_blocks * format.block_bytes)


def read_lines(lines: torch.Tensor, format: KVFormat, head_dim: int) -> torch.Tensor:
    """(..., line_bytes) uint8 -> (..., D) float32."""
    if format.block_elements == 1:
        return lines.contiguous().view(getattr(torch, format.blocks)).float()
    numbers = BLOCK_FORMATS[format.blocks].widen(lines.reshape(-1, lines.shape[-1]))
    return numbers[:, :head_dim].reshape(*lines.shape[:-1], head_dim)


def stored(x: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """x (..., D) as it comes back from memory, in its own dtype."""
    return read_lines(write_lines(x, format), format, x.shape[-1]).to(x.dtype)


def expand(lines: torch.Tensor, format: KVFormat, to: torch.Tensor) -> None:
    """lines (n, line_bytes) uint8 -> to (n, D), in pieces so that little passes through."""
    n = max(1, PIECE_NUMBERS // to.shape[1])
    for some, there in zip(torch.split(lines, n), torch.split(to, n), strict=True):
        there.copy_(read_lines(some, format, to.shape[1]))


def _write_q8_0(x: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(dim=1, keepdim=True) / 127.0).clamp(max=LARGEST_HALF).half()
    q = (x * _inverse(scale)).clamp(-127.0, 127.0).round().where(is_there, 0.0)
    return torch.cat([scale.view(torch.uint8), q.to(torch.int8).view(torch.uint8)], dim=1)


def _write_q4_1(x: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
    lo, hi = x.aminmax(dim=1, keepdim=True)
    least = lo.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    scale = ((hi - lo) / 15.0).clamp(max=LARGEST_HALF).half()
    steps = ((x - least.float()) * _inverse(scale)).clamp(0.0, 15.0).round().where(is_there, 0.0)
    lower, upper = steps.to(torch.uint8).chunk(2, dim=1)
    halves = torch.cat([scale, least], dim=1).view(torch.uint8)
    return torch.cat([halves, lower | upper << 4], dim=1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return (1.0 / scale.float()).where(scale > 0, 0.0)
