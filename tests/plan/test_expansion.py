"""Layers in blocks on a device: stored bytes cross the link, expanding takes its memory's time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import simulate
from sl_serve.cli import app
from sl_serve.ops.torch_ops import EXPANDED_ELEMENTS
from sl_serve.plan import step_memory
from sl_serve.plan.hardware import MatmulRates
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import Workload, memory_parts
from sl_serve.plan.planner import Budgets, choose
from sl_serve.plan.predict import busy
from sl_serve.plan.profiles import PROFILES
from sl_serve.plan.schedule import decode_step
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.formats import WIDENING_BYTES
from tests.engine.test_gguf_weights import TOKENIZER, TOKENS
from tests.plan.examples import MB, hardware, model, placement
from tests.weights.blocks import Kind
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

WORK = Workload(100, 100, 8)


def in_blocks(**changes: object) -> ModelSizes:
    """A third of what is computed with."""
    return model(layer_bytes=30 * MB, expanded_layer_bytes=90 * MB, **changes)


def test_the_link_carries_stored_bytes_and_the_device_expands_once_for_all_sub_batches() -> None:
    free = MatmulRates(((1, 1e18),))  # products cost no more than reading the layer
    machine = hardware(device_read_bytes_per_s=1e9, matmul=free)
    steps = decode_step(WORK, 8)
    for n_sub_batches in (1, 4):
        placed = placement(n_sub_batches=n_sub_batches, rows=8 // n_sub_batches)
        plain = busy(model(layer_bytes=90 * MB), placed, machine, steps).seconds
        found = busy(in_blocks(), placed, machine, steps).seconds
        assert found["link down"] == pytest.approx(10 * 0.030)
        assert plain["link down"] == pytest.approx(10 * 0.090)
        # 30 MB read and 90 MB written at 1 GB/s, in each of ten layers.
        assert found["compute"] - plain["compute"] == pytest.approx(10 * 0.120)


def test_device_memory_has_slots_as_stored_and_one_layer_expanded() -> None:
    parts = {p.what: p.n_bytes for p in memory_parts(in_blocks(), placement(), WORK, True)}
    assert parts["layer slots"] == 2 * 30 * MB
    assert parts["expanded layer"] == 90 * MB + EXPANDED_ELEMENTS * WIDENING_BYTES
    plain = {p.what for p in memory_parts(model(), placement(), WORK, True)}
    assert "expanded layer" not in plain


@pytest.mark.parametrize(
    ("device_mb", "layer_bytes", "n_device_layers"),
    [(450, 30 * MB, 6), (650, 30 * MB, 10), (2000, 90 * MB, 10)],
)
def test_layers_are_expanded_for_good_where_all_fit(
    device_mb: int, layer_bytes: int, n_device_layers: int
) -> None:
    machine = hardware(device_bytes=device_mb * MB)
    budgets = replace(Budgets.of(machine), device=device_mb * MB)
    plan = choose(in_blocks(), machine, budgets, WORK)
    assert plan.model.layer_bytes == layer_bytes
    assert plan.placement.n_device_layers >= n_device_layers
    assert sum(p.n_bytes for p in plan.parts if p.tier == "device") <= device_mb * MB


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    reference = tiny_llama(vocab_size=len(TOKENS), max_position_embeddings=256, **sizes)
    write_tiny_gguf(path, reference, quantisation=Kind.Q4_1, settings=TOKENIZER)
    return path


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_the_engine_on_the_virtual_clock_takes_the_predicted_time(
    path: Path, look_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With expansions slower than the link."""
    monkeypatch.setattr(simulate, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(simulate, "OUTPUT_TOKENS", 6)
    memory_bytes_per_s = 3e9
    machine = simulate.as_simulated(PROFILES["t4"])
    machine = replace(machine, device_read_bytes_per_s=memory_bytes_per_s)
    checkpoint = open_checkpoint(path)
    simulated_s = simulate._simulated_decode_s(checkpoint, machine, look_ahead, "device")
    sizes = simulate._sizes(checkpoint)
    predicted = simulate._predicted_decode(checkpoint, machine, look_ahead, "device")
    checkpoint.close()
    # The clock knows no time for reading expanded layers again, once per sub-batch.
    reading_s = 4 * simulate.SUB_BATCHES * sizes.computed_layer_bytes / memory_bytes_per_s
    predicted_s = predicted.step_s - reading_s
    assert np.isclose(predicted_s, simulated_s, rtol=0.15), (predicted, simulated_s)


def test_plan_shows_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "EXPANDED_ELEMENTS", 1 << 14)
    command = ["plan", str(path), "--profile", "t4", "--prompt", "40", "--gen", "20"]
    budgets = ["--device-memory", "6MiB", "--requests", "4"]
    report = json.loads(CliRunner().invoke(app, [*command, *budgets, "--json"]).stdout)
    sizes = report["model"]
    assert 0 < sizes["layer_bytes"] < sizes["expanded_layer_bytes"]
    assert "expanded layer" in {part["what"] for part in report["memory"]}
    ample = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert "expanded layer" not in {part["what"] for part in ample["memory"]}
