from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sl_serve.errors import CheckpointError, UserError
from sl_serve.weights.safetensors_file import SafetensorsFile

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def write_raw(path: Path, header: Any, data: bytes = b"", announced: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if announced is None else announced
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(x) if isinstance(x, tuple) else x for x in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_package_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.randn(3, 5) * 4).to(dtype),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "other": torch.arange(7, dtype=torch.uint8),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.entries[name].shape == tuple(tensor.shape)
        assert file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_tensors_outlive_close_and_never_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    tensor = file.read("x")
    file.close()
    tensor.add_(1)
    assert tensor.tolist() == [2, 2, 2, 2]
    assert path.read_bytes() == before


def test_unaligned_tensor(tmp_path: Path) -> None:
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (1,), (1, 5))}
    path = write_raw(tmp_path / "x", header, b"\x09" + b"\x00\x00\x80\x3f")
    assert SafetensorsFile(path).read("b").tolist() == [1.0]


BAD_HEADERS = {
    "not json": b"{",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 200_000,
    "not an object": [1, 2],
    "duplicate": b'{"a": 1, "a": 1}',
    "entry is no object": {"a": 5},
    "unknown dtype": {"a": entry("F33")},
    "dtype of another kind": {"a": entry(["F32"])},
    "negative size": {"a": entry(shape=(-1, -2))},
    "boolean size": {"a": entry(shape=(True, 2))},
    "float size": {"a": entry(shape=(2.0,))},
    "huge product": {"a": entry(shape=(2**40, 2**40, 2**40))},
    "huge size beside a zero": {"a": entry(), "b": entry(shape=(0, 2**63), offsets=(8, 8))},
    "too many sizes": {"a": entry(), "b": entry(shape=(0,) + (1,) * 70, offsets=(8, 8))},
    "shape is a text of two lines": {"a": entry(shape="a\nb")},
    "huge number": b'{"a": {"dtype": "F32", "shape": [1'
    + b"0" * 5000
    + b'], "data_offsets": [0, 8]}}',
    "offsets reversed": {"a": entry(offsets=(8, 0))},
    "offsets negative": {"a": entry(offsets=(-8, 0))},
    "three offsets": {"a": entry(offsets=(0, 8, 8))},
    "size differs": {"a": entry(shape=(3,))},
    "beyond the data": {"a": entry(shape=(4,), offsets=(0, 16))},
    "overlap": {"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))},
    "hole": {"a": entry(shape=(1,), offsets=(4, 8))},
    "data left over": {"a": entry(shape=(1,), offsets=(0, 4))},
    "extra key": {"a": entry() | {"more": 1}},
    "metadata not strings": {"a": entry(), "__metadata__": {"x": 1}},
    "metadata no object": {"a": entry(), "__metadata__": 5},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_hostile_headers_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CheckpointError, match="bad") as refusal:
        SafetensorsFile(write_raw(tmp_path / "bad", header, bytes(8)))
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("announced", [9, 2**31, 2**63, 2**64 - 1])
def test_announced_header_length_is_checked(tmp_path: Path, announced: int) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsFile(write_raw(tmp_path / "x", b"{}", announced=announced))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_agrees_with_the_package_on_damaged_files(tmp_path: Path) -> None:
    """Whatever we accept the package accepts with the same tensors."""
    path = tmp_path / "x"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    generator = random.Random(0)
    n_accepted = 0
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 2)):
            damaged[generator.randrange(len(whole) - 28)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
            shapes = {name: tuple(file.read(name).shape) for name in file.entries}
        except UserError:
            continue
        n_accepted += 1
        with safe_open(path, "pt") as reference:
            names = list(reference.keys())
            assert shapes == {n: tuple(reference.get_slice(n).get_shape()) for n in names}
    assert n_accepted > 0


def test_the_package_refuses_holes_too(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", BAD_HEADERS["hole"], bytes(8))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
