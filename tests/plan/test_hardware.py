from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_serve.plan.hardware import MatmulRates, roofline
from sl_serve.plan.profiles import PROFILES

RATES = MatmulRates(((10, 1e9), (20, 4e9)))


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        (0, 0.0),
        (1, 10.0),  # as long as ten rows: 10 rows * 1e9 FLOPs / 1e9 per s
        (10, 10.0),
        (15, 10.0),  # 20 rows take 5 s; more rows are never faster than fewer
        (20, 10.0),
        (40, 20.0),
    ],
)
def test_noise_does_not_make_more_rows_faster(rows: float, seconds: float) -> None:
    assert RATES.seconds(np.array([rows]), 1e9) == pytest.approx([seconds])


def test_time_is_interpolated_between_points() -> None:
    rates = MatmulRates(((10, 1e9), (30, 1.5e9)))  # 10 s and 20 s of 1 GFLOP rows
    assert rates.seconds(np.array([10.0, 20.0, 30.0, 60.0]), 1e9) == pytest.approx([10, 15, 20, 40])


def test_a_roofline_is_flat_up_to_its_knee() -> None:
    rates = roofline(2e12, 0.5, 100)
    assert rates.peak_flops_per_s == 1e12
    assert rates.seconds(np.array([1.0, 100.0, 200.0]), 1e10) == pytest.approx([1, 1, 2])


@given(
    st.lists(st.floats(1e6, 1e15), min_size=1, max_size=5),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
)
def test_more_rows_are_never_faster(rates: list[float], rows: float, more: float) -> None:
    found = MatmulRates(tuple((4.0**i, rate) for i, rate in enumerate(rates)))
    few, many = found.seconds(np.array([rows, rows + more]), 1.0)
    assert few <= many * (1 + 1e-9)


def test_profiles_are_named_after_themselves_and_plausible() -> None:
    for name, hardware in PROFILES.items():
        assert hardware.name == name
        assert hardware.host_bytes > 2**33
        if hardware.has_device:
            assert 10e9 < hardware.link_down_bytes_per_s < 64e9
            assert hardware.device_read_bytes_per_s > hardware.link_down_bytes_per_s
        else:
            assert hardware.link_down_bytes_per_s == 0
            assert hardware.compute_read_bytes_per_s == hardware.host_read_bytes_per_s
