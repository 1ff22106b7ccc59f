from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.simulate import simulation
from tests.models import TINY_MODELS


@pytest.mark.parametrize("family", TINY_MODELS)
@pytest.mark.parametrize("profile", ["t4", "h100"])
def test_the_planners_formulas_agree_with_the_engine_on_the_virtual_clock(
    tmp_path: Path, family: str, profile: str
) -> None:
    TINY_MODELS[family](tmp_path, num_hidden_layers=8)
    for row in simulation(str(tmp_path), profile)["rows"]:
        assert row["ratio"] == pytest.approx(1, abs=0.05), row
        if row["attention"] == "device":
            assert row["binds"] == "link down"


def test_attention_by_the_processor_can_bind(tmp_path: Path) -> None:
    TINY_MODELS["opt"](tmp_path, num_hidden_layers=8)
    rows = simulation(str(tmp_path), "t4", look_aheads=(1,))["rows"]
    assert [r["attention"] for r in rows] == ["device", "host"]
    assert [r["binds"] for r in rows] == ["link down", "host memory"]
    assert rows[1]["simulated_step_s"] < rows[0]["simulated_step_s"]


def test_an_unknown_profile_names_the_known() -> None:
    with pytest.raises(BenchError, match="t4-flexgen"):
        simulation("opt-125m", "abacus")
