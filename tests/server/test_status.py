"""GET /status against the engine's own numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import LlamaForCausalLM

from server.settings import ServerSettings
from server.status import WINDOW_S, RecentSteps
from sl_serve.config import EngineConfig
from sl_serve.stats import StepStats
from tests.engine.running import config, engine
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine

STEP = StepStats(0.5, 2, 3, 10, 20, 1000, 100, 50, 0.25, 8, 4)
NAMES = ServerSettings(served_model_names=("tiny",))


async def test_before_the_first_step(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/status")).json()
    assert answer["step"] is None
    assert set(answer["rates"].values()) == {0.0}
    assert answer["models"] == ["toy/one", "alias"]
    assert answer["state"] == "running"
    assert answer["jobs"] is False


async def test_numbers_are_the_engines(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    answer = (await client.get("/status")).json()
    step = answer["step"]
    assert (step["wall_s"], step["compute_s"], step["stall_s"]) == (0.5, 0.25, 0.25)
    assert (step["prefill_tokens"], step["decode_tokens"]) == (10, 20)
    assert (step["down_bytes"], step["up_bytes"]) == (1100, 50)
    assert step["bytes"]["kv_down_bytes"] == 100
    assert step["sub_batches"] == [
        {"rows": 1, "max_rows": 8, "tokens": 28},
        {"rows": 0, "max_rows": 8, "tokens": 2},
    ]
    assert answer["rates"]["decode_tokens_per_s"] == 2 * answer["rates"]["prefill_tokens_per_s"] > 0
    assert answer["kv"] == {"used_bytes": 25, "total_bytes": 100}
    assert answer["requests"]["max_running"] == 16
    assert answer["requests"]["waiting"] == 2
    host, disk = answer["memory"]
    assert (host["planned_bytes"], host["budget_bytes"]) == (700, 1000)
    assert host["parts"][0] == {"name": "layers", "bytes": 600}
    assert (disk["tier"], disk["budget_bytes"]) == ("disk", None)


def test_why_an_engine_died_is_not_told(engine: FakeEngine) -> None:
    with LiveServer(engine, NAMES) as live:
        engine.reason = "the disk is gone"
        assert "the disk is gone" not in httpx.get(f"{live.url}/status").text


def test_rates_are_over_the_latest_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = RecentSteps()
    for end_s in (100.0, 150.0, 151.0):
        monkeypatch.setattr("time.monotonic", lambda now=end_s: now)
        steps.add(STEP)
    rates = steps.rates(152.5)  # two steps since 149.5
    assert rates["decode_tokens_per_s"] == pytest.approx(40 / 3)
    assert rates["down_bytes_per_s"] == pytest.approx(2 * 1108 / 3)
    assert rates["up_bytes_per_s"] == pytest.approx(2 * 54 / 3)
    assert set(steps.rates(151.0 + WINDOW_S).values()) == {0.0}


def test_steps_longer_than_the_window_still_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = RecentSteps()
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    steps.add(replace(STEP, wall_s=60.0))
    assert steps.rates(1060.0)["decode_tokens_per_s"] == pytest.approx(20 / 120)


@pytest.mark.parametrize(
    "settings",
    [
        config(max_rows=4, n_sub_batches=2),
        replace(config(max_rows=4, n_sub_batches=2), device="sim"),
        replace(config(max_rows=4), device="sim", device_memory_bytes=2 << 20),
    ],
)
def test_a_real_engine(tiny: tuple[Path, LlamaForCausalLM], settings: EngineConfig) -> None:
    with engine(tiny[0], settings) as running, LiveServer(running, NAMES) as live:
        asked = {"prompt": ["a", "bc", "def"], "max_tokens": 3, "ignore_eos": True}
        httpx.post(f"{live.url}/v1/completions", json=asked, timeout=60).raise_for_status()
        answer = httpx.get(f"{live.url}/status", timeout=60).json()
        tiers = {tier["tier"]: tier for tier in answer["memory"]}
        plan = running.plan
        assert tiers["host"]["planned_bytes"] == plan.host_bytes
        assert tiers["host"]["budget_bytes"] == plan.available_bytes
        assert tiers.keys() == {"host", "device"} if plan.device_bytes else {"host"}
        if plan.device_bytes:
            assert tiers["device"]["planned_bytes"] == plan.device_bytes
            assert tiers["device"]["budget_bytes"] == plan.device_available_bytes
        fills = answer["step"]["sub_batches"]
        assert sum(fill["rows"] for fill in fills) == 3
        assert sum(fill["tokens"] for fill in fills) == answer["step"]["decode_tokens"] == 3
        assert answer["requests"]["generated_tokens_total"] == 9
        assert answer["step"]["down_bytes"] >= plan.weights_bytes
