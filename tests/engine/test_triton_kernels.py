"""Triton's kernels against the formats and torch, on the processor: triton's interpreter runs them.

Whether it does is settled when triton is first imported, so they run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sl_serve.ops import choose_ops
from sl_serve.ops.device_ops import DeviceOps

pytest.importorskip("triton", reason="triton comes with Linux only")

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_the_interpreter() -> None:
    """All of interpreted_kernels.py, whose own report is shown when something fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_kernels_compile_for_an_old_card(tmp_path: Path) -> None:
    """To the card's own code, which needs no card: what the interpreter forgives shows here."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine.compiled_kernels", "75"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # Nine formats, one of them in three dtypes, six kinds of groups, and two kernels for keys and
    # values.
    assert done.stdout.split() == ["19"]


class _Gpu:
    """As much of a CUDA device as choosing operations asks for."""

    name = "cuda"
    in_place = False
    torch_device = torch.device("cuda")

    def check_dtype(self, dtype: torch.dtype) -> None:
        pass


def test_a_gpu_gets_the_kernels_where_they_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sl_serve.ops.triton_ops import TritonOps

    monkeypatch.setattr(TritonOps, "check", lambda _self: None)
    assert choose_ops("float32", 1, device=_Gpu()).name == "torch on cuda, triton"

    def fails(_self: TritonOps) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(TritonOps, "check", fails)
    found = choose_ops("float32", 1, device=_Gpu())
    assert (type(found), found.name) == (DeviceOps, "torch on cuda")
    assert caplog.messages == ["triton does not work here, torch does without: no C compiler"]
    monkeypatch.setitem(sys.modules, "sl_serve.ops.triton_ops", None)  # cannot be imported
    assert type(choose_ops("float32", 1, device=_Gpu())) is DeviceOps


def test_nothing_imports_triton_by_itself() -> None:
    """Not even the engine's loader: a machine without it, or without a GPU, does without."""
    code = "import sys, sl_serve.loader, sl_serve.llm; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
