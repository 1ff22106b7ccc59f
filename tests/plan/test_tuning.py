"""The planner's choice as settings, and that the engine's own plan takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sl_serve import cli_load, stored_model, tuning
from sl_serve.cli import app
from sl_serve.config import AttentionPlacement, EngineConfig, SchedulerConfig
from sl_serve.errors import UserError
from sl_serve.plan.placement import Workload
from sl_serve.plan.planner import Budgets, choose
from sl_serve.plan.profiles import PROFILES
from sl_serve.tuning import Tuned, tune
from sl_serve.weights.dummy import open_dummy

GIB = 1 << 30


def tuned(monkeypatch: pytest.MonkeyPatch, shape: str, profile: str, config: EngineConfig) -> Tuned:
    hardware = PROFILES[profile]
    monkeypatch.setattr(tuning, "probe", lambda *_: hardware)
    monkeypatch.setattr(stored_model, "host_budget_bytes", lambda most: most or hardware.host_bytes)
    for room in (stored_model, tuning):
        monkeypatch.setattr(
            room, "device_budget_bytes", lambda _, most: most or hardware.device_bytes
        )
    return tune(open_dummy(shape), config, lambda _: None)


@pytest.mark.parametrize("profile", ["t4", "l4", "rtx4090", "h200"])
@pytest.mark.parametrize("shape", ["opt-1.3b", "opt-6.7b", "llama-3.1-8b"])
def test_the_engine_takes_what_the_planner_chose(
    monkeypatch: pytest.MonkeyPatch, shape: str, profile: str
) -> None:
    found = tuned(monkeypatch, shape, profile, EngineConfig(device="cuda", dtype="float16"))
    plan = stored_model.plan_checkpoint(open_dummy(shape), found.config)
    placement = found.plan.placement
    assert plan.max_rows >= 0.8 * placement.total_rows
    assert plan.n_sub_batches == placement.n_sub_batches
    assert plan.prefill_tokens == placement.prefill_tokens
    kv_rows = plan.kv_bytes // (plan.kv.token_bytes * (512 + 128))
    assert kv_rows >= plan.max_rows, "every row of the common length has its KV"
    assert plan.n_disk_layers == 0


def test_ceilings_and_explicit_settings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        device="cuda",
        dtype="float16",
        device_memory_bytes=4 * GIB,
        host_memory_bytes=40 * GIB,
        max_model_len=100,
        scheduler=SchedulerConfig(prefill_chunk_tokens=77, look_ahead=2),
    )
    found = tuned(monkeypatch, "opt-6.7b", "t4", config)
    scheduler = found.config.scheduler
    assert (scheduler.prefill_chunk_tokens, scheduler.look_ahead) == (77, 2)
    used = {"device": 0, "host": 0, "disk": 0}
    for part in found.plan.parts:
        used[part.tier] += part.n_bytes
    assert used["device"] <= 4 * GIB and used["host"] <= 40 * GIB


def test_it_is_the_planners_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from sl_serve.plan.model_reader import read_sizes

    hardware = PROFILES["l4"]
    found = tuned(monkeypatch, "opt-1.3b", "l4", EngineConfig(device="cuda", dtype="float16"))
    settings = open_dummy("opt-1.3b").config
    sizes = read_sizes("opt-1.3b", settings, torch.float16, torch.float16)
    best = choose(sizes, hardware, Budgets.of(hardware), Workload(512, 128, 1024))
    assert found.plan.placement == best.placement


@pytest.mark.parametrize("attention", ["device", "host"])
def test_attention_is_where_it_is_told_to_be(
    monkeypatch: pytest.MonkeyPatch, attention: AttentionPlacement
) -> None:
    config = EngineConfig(device="cuda", dtype="float16", attention=attention)
    found = tuned(monkeypatch, "opt-6.7b", "t4", config)
    assert found.config.attention == found.plan.placement.attention == attention
    assert found.plan.placement.kv_device_share < 1
    plan = stored_model.plan_checkpoint(open_dummy("opt-6.7b"), found.config)
    assert plan.host_attends == (attention == "host") == (plan.windows_bytes == 0)


def test_a_device_that_is_not_there_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuning, "probe", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="cuda"):
        tune(open_dummy("opt-125m"), EngineConfig(device="cuda", dtype="float16"), lambda _: None)


def test_serve_tunes_unless_it_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(*_: object, tuned: bool) -> None:
        asked.append(tuned)
        raise UserError("enough")

    monkeypatch.setattr(cli_load, "load_engine", load)
    for given in ([], ["--max-rows", "8"], ["--sub-batches", "2"], ["--device", "cpu"]):
        arguments = ["serve", "opt-125m", "--port", "0", "--device", "cuda", *given]
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, UserError) and str(found.exception) == "enough"
    assert asked == [True, False, False, False]


def test_the_folder_to_measure(tmp_path: Path) -> None:
    from sl_serve.plan.probe import measurable_folder

    file = tmp_path / "model.gguf"
    file.write_bytes(b"x")
    assert measurable_folder("/elsewhere", file) == Path("/elsewhere")
    assert measurable_folder(None, file) == tmp_path
    assert measurable_folder(None, tmp_path) == tmp_path
    assert measurable_folder(None, tmp_path / "a-shape's-name") is None
