"""The probes run and yield numbers; how large they are is the machine's business."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sl_serve.errors import UserError
from sl_serve.ops import TorchOps
from sl_serve.plan import probe as probing
from sl_serve.plan import probe_compute
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.probe import disk_read_bytes_per_s, probe
from sl_serve.plan.probe_compute import Shapes, matmul_rates
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.extents import Extent
from sl_serve.weights.readers import PythonReaders, Reading
from tests.plan.examples import shorten_probes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_probes(monkeypatch)


def shapes(name: str = "opt-125m") -> Shapes:
    return Shapes(open_dummy(name).config, torch.float32, "float32")


def test_the_whole_machine(tmp_path: Path) -> None:
    said: list[str] = []
    found = probe(shapes(), tmp_path, 1, said.append)
    assert isinstance(found, Hardware)
    assert not found.has_device
    assert min(found.host_bytes, found.disk_bytes) > 0
    assert min(found.host_read_bytes_per_s, found.disk_read_bytes_per_s) > 0
    assert [rows for rows, _ in found.matmul.points] == [1, 8]
    assert [rows for rows, _ in found.head.points] == [1, 2]
    assert min(found.attention) > 0 and found.elementwise_bytes_per_s > 0
    assert found.cell_overhead_s > 0
    assert said == ["host memory", f"disk at {tmp_path}", "matrix products", "attention"]
    assert list(tmp_path.iterdir()) == []


def test_no_disk_is_asked_for() -> None:
    found = probe(shapes(), None, 1, lambda _: None)
    assert (found.disk_bytes, found.disk_read_bytes_per_s) == (0, 0)


def test_every_byte_of_the_file_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []

    class Watched(PythonReaders):
        def begin(self, extents: Sequence[Extent], address: int) -> Reading:
            read.extend((e.offset_bytes, e.size_bytes) for e in extents)
            return super().begin(extents, address)

    monkeypatch.setattr(probing, "make_readers", Watched)
    assert disk_read_bytes_per_s(tmp_path) > 0
    n = probing.PIECE_BYTES
    once = [(i * n, n) for i in range(17 * MIB // n)]
    assert sorted(read[: len(once)]) == sorted(read[len(once) :]) == once


def test_a_weights_file_that_lies_there_is_read_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class Reader(probing.DirectFile):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(probing, "DirectFile", Reader)
    monkeypatch.setattr(probing, "_file_on", lambda _: pytest.fail("a file was made"))
    for name, n_mib in (("a.safetensors", 18), ("b.gguf", 19), ("c.txt", 20)):
        (tmp_path / name).write_bytes(bytes(n_mib * MIB))
    assert disk_read_bytes_per_s(tmp_path) > 0
    assert opened == [tmp_path / "b.gguf"]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--disk-dir .*nowhere: No such file"):
        probe(shapes(), tmp_path / "nowhere", 1, lambda _: None)


def test_products_are_those_of_the_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, int, int]] = set()

    class Watched(TorchOps):
        def linear(
            self, name: str, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            seen.add((len(x), *w.shape))
            assert w.stride(0) == 1  # as layers lie in memory
            return super().linear(name, x, w, bias)

    monkeypatch.setattr(probe_compute, "SWEEP_BYTES", 100 * MIB)
    matmul_rates(Watched(), shapes())
    matrices = {(768, 3 * 768), (768, 768), (768, 3072), (3072, 768)}
    assert seen == {(rows, *m) for rows in (1, 8) for m in matrices}


def test_wide_layers_are_timed_in_part() -> None:
    assert all(rate > 0 for _, rate in matmul_rates(TorchOps(), shapes("llama-3.1-405b")).points)


def test_the_file_is_no_larger_than_a_quarter_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_free_disk_bytes", lambda _: 33 * MIB)
    with probing._file_on(tmp_path) as file:
        assert (
            os.fstat(file.fileno()).st_size == 8 * MIB // probing.PIECE_BYTES * probing.PIECE_BYTES
        )
