"""Groups hold what they are made of, and quantising loses little."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sl_serve.weights.groups import GROUP_FORMATS, group_format, keeps_scales
from sl_serve.weights.quantise import quantise
from tests.weights.groups import NAMES, e4m3fn, in_float64, random_grouped

each_name = pytest.mark.parametrize("name", NAMES)


@each_name
def test_packed_rows_are_scale_times_number_minus_zero(name: str) -> None:
    """Exactly, in float32; or plus a minimum, rounded once."""
    rows, groups = random_grouped(name, 20, 1024), GROUP_FORMATS[name]
    packed = groups.pack(rows)
    assert packed.shape == (20, groups.format.row_bytes(1024))
    widened = groups.format.widen(packed)
    assert widened.dtype == torch.float32
    expected = in_float64(name, rows)
    if rows.minima is not None:
        expected = expected.astype(np.float32)
    assert np.array_equal(widened.double().numpy(), expected)
    assert 0.1 < float(widened.abs().max()) < 1


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("_min")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_of_either_half_precision_are_kept(name: str, dtype: torch.dtype) -> None:
    """The smallest ones too."""
    bits = torch.randint(1, 0x7000, (4, 8), generator=torch.Generator().manual_seed(0))
    scales = bits.to(torch.int16).view(dtype).float()
    assert keeps_scales(scales)
    n_in = 8 * GROUP_FORMATS[name].group
    rows = random_grouped(name, 4, n_in)._replace(scales=scales)
    widened = GROUP_FORMATS[name].format.widen(GROUP_FORMATS[name].pack(rows))
    assert np.array_equal(widened.numpy(), in_float64(name, rows).astype(np.float32))


def test_a_scale_of_more_bits_needs_a_header_of_its_own() -> None:
    assert not keeps_scales(torch.tensor([1 / 3]))
    rows = random_grouped("int8_g32_sym", 2, 64)._replace(scales=torch.full((2, 2), 1 / 3))
    groups = GROUP_FORMATS["int8_g32_sym"]
    expected = rows.numbers.view(torch.int8).float() * torch.tensor(1 / 3)
    assert torch.equal(groups.format.widen(groups.pack(rows)), expected)


def test_eight_bit_floats_are_those_of_torch() -> None:
    every = np.arange(256, dtype=np.uint8)
    ours = torch.from_numpy(every).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(ours, e4m3fn(every), equal_nan=True)


@pytest.mark.parametrize(("name", "share"), [("int4_g128", 0.27), ("int4_g64", 0.2813)])
def test_bytes_beside_bfloat16(name: str, share: float) -> None:
    assert GROUP_FORMATS[name].format.row_bytes(4096) / (2 * 4096) <= share


@pytest.mark.parametrize(
    ("n_in", "largest", "found"), [(1536, 128, 128), (1536, 64, 64), (576, 128, 64), (96, 64, 32)]
)
def test_the_largest_group_that_divides_a_row(n_in: int, largest: int, found: int) -> None:
    groups = group_format("int4", n_in, largest)
    assert groups is not None and groups.group == found


def test_no_group_divides_every_row() -> None:
    assert group_format("int4", 80, 128) is None


# Quantising. Errors are shares of the rows' norm.


def quantised(name: str, rows: torch.Tensor) -> torch.Tensor:
    format = GROUP_FORMATS[name].format
    out = torch.empty(len(rows), format.row_bytes(rows.shape[1]), dtype=torch.uint8)
    quantise(rows, GROUP_FORMATS[name], out)
    return format.widen(out)


def error(name: str, rows: torch.Tensor) -> float:
    return float((quantised(name, rows) - rows.float()).norm() / rows.float().norm())


def normal_rows(n_rows: int = 64, n_in: int = 1024) -> torch.Tensor:
    return torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(0)) * 0.02


WORST = {
    "int4": 0.096,
    "int4_min": 0.094,
    "int4_sym": 0.103,
    "int8": 0.006,
    "int8_sym": 0.007,
    "fp8": 0.026,
}


@each_name
def test_normal_numbers_lose_little(name: str) -> None:
    assert error(name, normal_rows()) < WORST[GROUP_FORMATS[name].kind]


@each_name
def test_products_of_our_own_scales_are_exact(name: str) -> None:
    groups = GROUP_FORMATS[name]
    out = torch.empty(4, groups.format.row_bytes(256), dtype=torch.uint8)
    quantise(normal_rows(4, 256), groups, out)
    heads = out.view(-1, groups.format.block_bytes)[:, :4].contiguous().view(torch.int32)
    if groups.kind != "int4_min":  # those are halves
        assert groups.has_zeros or keeps_scales(heads.view(torch.float32))
    assert torch.equal(quantised(name, normal_rows(4, 256)), groups.format.widen(out))


def test_four_bits_lose_less_than_without_a_search() -> None:
    """Beside steps of a fifteenth of each group's whole range."""
    rows = normal_rows()
    for group in (64, 128):
        x = rows.view(-1, group).double()
        low = x.amin(1, keepdim=True)
        step = (x.amax(1, keepdim=True) - low) / 15
        plain = float((((x - low) / step).round() * step + low - x).norm() / x.norm())
        assert error(f"int4_g{group}", rows) < 0.98 * plain


def test_four_bits_are_near_the_best_there_is() -> None:
    """Beside a fine search over both ends of the range, group by group."""
    rows = normal_rows(4, 256)
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    x = rows.view(-1, 64).double()
    for low in torch.linspace(0.5, 1, 21):
        for high in torch.linspace(0.5, 1, 21):
            bottom = x.amin(1, keepdim=True) * low
            step = (x.amax(1, keepdim=True) * high - bottom) / 15
            zero = (-bottom / step).round()
            found = ((x / step).round() + zero).clamp(0, 15).sub(zero).mul(step) - x
            best = torch.minimum(best, found.square().sum(1))
    for name, share in (("int4_g64", 1.08), ("int4_g64_min", 1)):
        ours = (quantised(name, rows).view(-1, 64).double() - x).square().sum(1)
        assert float(ours.sum()) < share * float(best.sum())


@each_name
def test_groups_of_zeros_constants_and_single_large_numbers(name: str) -> None:
    groups = GROUP_FORMATS[name]
    rows = torch.zeros(4, 2 * groups.group)
    rows[1] = 0.75
    rows[2] = -0.75
    rows[3, 5] = 1000.0
    widened = quantised(name, rows)
    assert (widened[0] == 0).all()
    coarse = 0.07 if groups.n_bits == 4 else 0.004
    assert (widened[1:3] - rows[1:3]).abs().max() < 0.75 * coarse
    assert abs(float(widened[3, 5]) - 1000) < 1000 * coarse and abs(float(widened[3, 6])) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_float_dtype_is_quantised_as_float32(dtype: torch.dtype) -> None:
    rows = normal_rows().to(dtype)
    assert torch.equal(quantised("int4_g64", rows), quantised("int4_g64", rows.float()))


def test_parts_of_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantised("int4_g64", normal_rows())
    monkeypatch.setattr("sl_serve.weights.quantise.PART_ELEMENTS", 3000)
    assert torch.equal(quantised("int4_g64", normal_rows()), whole)


def test_what_is_no_number_is_seen() -> None:
    rows = normal_rows(2, 128)
    rows[0, 3] = torch.nan
    for name in NAMES:
        assert quantised(name, rows)[0].isnan().any() and quantised(name, rows)[1].isfinite().all()
