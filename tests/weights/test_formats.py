"""Blocks become the very numbers that the gguf package makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from sl_serve.weights.formats import BLOCK_FORMATS, Format, plain
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight
from tests.weights.blocks import KINDS, SPECIAL_HALVES, Kind, put_special_scales, random_rows

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def format_of(kind: Kind) -> Format:
    return BLOCK_FORMATS[kind.name.lower()]


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Any NaN is as good as any other."""
    assert actual.dtype == torch.float32
    ours = actual.numpy()
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(ours), is_nan)
    assert np.array_equal(ours.view(np.int32)[~is_nan], expected.view(np.int32)[~is_nan])


@each_kind
def test_sizes_are_those_of_the_file_format(kind: Kind) -> None:
    format = format_of(kind)
    assert (format.block_elements, format.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert format.elements(format.row_bytes(1024)) == 1024


@each_kind
def test_random_blocks(kind: Kind) -> None:
    rows = random_rows(kind, 50, 1024)
    widened = format_of(kind).widen(torch.from_numpy(rows))
    assert widened.shape == (50, 1024)
    assert_same_bits(widened, gguf.dequantize(rows, kind))
    assert 0.05 < float(widened.abs().max()) < 1


@each_kind
@pytest.mark.parametrize("fill", [0x00, 0x80, 0xFF, None], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy: 0 times infinity
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_special_scales(kind: Kind, fill: int | None) -> None:
    """Each of the halves zero, largest, subnormal, infinite or no number, over all and any bits."""
    rows = random_rows(kind, len(SPECIAL_HALVES) ** 2, 256)
    if fill is not None:
        rows[:] = fill
    put_special_scales(rows, kind)
    assert_same_bits(format_of(kind).widen(torch.from_numpy(rows)), gguf.dequantize(rows, kind))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_every_code_of_mxfp4_with_every_power_of_two() -> None:
    """Among them those whose results are subnormal, and those that are infinite."""
    blocks = np.empty((256, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) | np.arange(16)[::-1] << 4
    found = format_of(Kind.MXFP4).widen(torch.from_numpy(blocks))
    assert_same_bits(found, gguf.dequantize(blocks, Kind.MXFP4))
    magnitudes = found.abs()
    assert float(magnitudes[magnitudes > 0].min()) == 2.0**-128
    assert int(found.isinf().sum()) == 2 * 2 * (2 + 4 + 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_numbers_are_blocks_of_one(dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    format = plain(dtype)
    assert format.row_bytes(7) == 7 * dtype.itemsize
    assert torch.equal(format.widen(numbers.view(torch.uint8)), numbers.float())


def test_a_row_of_no_whole_blocks_has_no_size() -> None:
    with pytest.raises(AssertionError):
        BLOCK_FORMATS["q4_k"].row_bytes(128)


def test_a_weight_of_parts_has_the_shape_and_columns_of_them_together() -> None:
    rows = [
        QuantisedRows(torch.from_numpy(random_rows(kind, n, 256)), format_of(kind))
        for kind, n in ((Kind.Q4_0, 3), (Kind.Q6_K, 5))
    ]
    weight = QuantisedWeight(tuple(rows))
    assert weight.shape == (256, 8) and weight.numel() == 256 * 8 and len(weight) == 256
    assert [(c.start, c.stop) for c, _ in weight.columns()] == [(0, 3), (3, 8)]
    assert torch.equal(rows[1][1:3].widened(), rows[1].widened()[1:3])
    assert rows[0].t().shape == (256, 3)
