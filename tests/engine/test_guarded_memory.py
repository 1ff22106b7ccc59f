"""The native core reads and writes nothing beside its operands: the small version of `scripts/prove
sanitizers`. All operands end where readable memory does, so that one byte too many ends the
process, which is therefore one of its own."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sl_serve.ops.native_ops import NativeOps
from sl_serve.weights.formats import BLOCK_FORMATS
from sl_serve.weights.quantised import QuantisedRows
from tests.weights.blocks import KINDS, random_rows

try:
    from sl_serve._native import targets
except ImportError:  # no compiler: the pure-torch twins are all there is
    targets = list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 40, 64), (3, 1, 5), (5, 33, 50), (7, 9, 3), (25, 7, 1), (64, 57, 101), (241, 325, 51)]
SURVIVED = "nothing beside the operands was touched"


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is followed by a page that nobody may touch."""
    n_bytes = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, n_bytes + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(start + n_bytes)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(
        area, dtype=tensor.dtype, count=tensor.numel(), offset=n_bytes - tensor.nbytes
    )
    return flat.view(tensor.shape).copy_(tensor)


def exercise(target: str) -> None:
    """Scratch memory that an operation returns is not guarded: products are written in place."""
    ops = NativeOps(1, target)
    for dtype in DTYPES:
        for m, k, n in SHAPES:
            x, w = guarded(torch.randn(m, k)), guarded(torch.randn(n, k).to(dtype))
            out = guarded(torch.zeros(m, n))
            ops.add_linear_(out, x, w.t(), None)
            expected = x.double() @ w.double().t()
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
            ops.logits(x, w, out)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for kind in KINDS:
        format = BLOCK_FORMATS[kind.name.lower()]
        for m, k, n in ((1, 512, 7), (5, 256, 1), (25, 512, 9)):
            blocks = guarded(torch.from_numpy(random_rows(kind, n, k)))
            x, rows = guarded(torch.randn(m, k)), QuantisedRows(blocks, format)
            out = guarded(torch.zeros(m, n))
            ops.logits(x, rows, out)
            expected = x.double() @ rows.widened().double().t()
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for n_tokens, width in ((1, 5), (3, 64), (2, 101)):
        x = guarded(torch.randn(n_tokens, 2 * width))
        assert ops.silu_mul(x).isfinite().all()
        assert ops.rms_norm(x, guarded(torch.ones(2 * width)), 1e-6).isfinite().all()
        heads = guarded(torch.randn(n_tokens, 3, 2 * width))
        angle = guarded(torch.rand(n_tokens, width))
        ops.rope_(heads, angle, angle)
    print(SURVIVED)


def go_too_far(target: str) -> None:
    """By one number, past the checks of shapes."""
    x = guarded(torch.ones(1, 16))
    core = NativeOps(1, target)._core
    core.rope(x.data_ptr() + x.itemsize, 16, 16, 1, 1, 16, x.data_ptr(), x.data_ptr())
    print(SURVIVED)


def run(role: Callable[[str], None], target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.engine.test_guarded_memory", role.__name__, target]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", targets())
def test_nothing_beside_the_operands_is_touched(target: str) -> None:
    done = run(exercise, target)
    assert (done.returncode, done.stdout) == (0, SURVIVED + "\n"), done.stderr


@pytest.mark.parametrize("target", targets()[:1])
def test_a_number_past_the_end_would_be_noticed(target: str) -> None:
    assert run(go_too_far, target).returncode < 0  # by a signal


if __name__ == "__main__":
    {f.__name__: f for f in (exercise, go_too_far)}[sys.argv[1]](sys.argv[2])
