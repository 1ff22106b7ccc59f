"""Copies and computation of a step run beside each other, judged by the simulated clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sl_serve.device import SimDevice
from sl_serve.device.sim import HardwareProfile
from sl_serve.loader import Parts
from sl_serve.stats import StepStats
from tests.engine.running import GREEDY, config, engine, run, steps_of
from tests.models import TINY_MODELS

N_LAYERS, N_ROWS, N_SUB_BATCHES, N_OUTPUT = 12, 8, 4, 12
N_PROMPT = 60


@dataclass(frozen=True)
class Measured:
    """Of a run's middle steps, in which all rows decode."""

    step_s: float
    copy_s: float  # of everything on the load stream
    compute_s: float
    up_s: float

    @property
    def cell_s(self) -> float:
        return max(self.copy_s, self.compute_s) / (N_LAYERS * N_SUB_BATCHES)


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    TINY_MODELS[request.param](folder, num_hidden_layers=N_LAYERS)
    return folder


class Clocked:
    """Notes the virtual time after each step."""

    def __init__(self, device: SimDevice) -> None:
        self.device = device
        self.times_s: list[float] = []

    def __call__(self, _: StepStats) -> None:
        self.times_s.append(self.device.time_s)


def measure(folder: Path, profile: HardwareProfile, look_ahead: int) -> Measured:
    device = SimDevice(profile)
    clock, parts = Clocked(device), list[Parts]()
    settings = config(
        max_rows=N_ROWS,
        n_sub_batches=N_SUB_BATCHES,
        look_ahead=look_ahead,
        prefill_chunk_tokens=N_ROWS * N_PROMPT,
    )
    settings = replace(settings, kv_memory_bytes=24 << 20)
    with engine(folder, settings, device, parts.append) as running:
        steps = steps_of(running)
        running.on_step(clock)
        sampling = replace(GREEDY, max_tokens=N_OUTPUT)
        run(running, [[i] * N_PROMPT for i in range(N_ROWS)], sampling)
    return averaged(profile, parts[0], steps, clock.times_s)


def averaged(
    profile: HardwareProfile, parts: Parts, steps: Sequence[StepStats], times_s: Sequence[float]
) -> Measured:
    first, last = 2, 10
    middle = steps[first + 1 : last + 1]
    assert all(s.n_decode_tokens == N_ROWS and s.n_prefill_tokens == 0 for s in middle)
    down = sum(s.weight_bytes + s.kv_down_bytes for s in middle)
    layers = parts.store.layout.segments(0)
    n_flops = 2.0 * N_ROWS * N_LAYERS * sum(s.size_bytes // 4 for s in layers)
    return Measured(
        step_s=(times_s[last] - times_s[first]) / len(middle),
        copy_s=down / len(middle) / profile.down_bytes_per_s,
        compute_s=n_flops / profile.flops_per_s,
        up_s=sum(s.kv_up_bytes for s in middle) / len(middle) / profile.up_bytes_per_s,
    )


# FLOPs and bytes of a step of this model: about 2e7 and 5e6 to 1e7.
PROFILES = {
    "weight-bound": HardwareProfile("slow link", 1e9, 1e9, 40e9),
    "KV-bound": HardwareProfile("slower link, long contexts", 2e8, 2e9, 1e12),
    "compute-bound": HardwareProfile("slow arithmetic", 1e11, 1e11, 1e9),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_step_takes_the_longer_of_copying_and_computing(folder: Path, name: str) -> None:
    found = measure(folder, PROFILES[name], look_ahead=1)
    assert (found.compute_s > found.copy_s) == (name == "compute-bound")
    longer = max(found.copy_s, found.compute_s)
    assert longer * 0.999 <= found.step_s <= 1.03 * longer + found.cell_s


@pytest.mark.parametrize("name", PROFILES)
def test_the_serial_twin_takes_their_sum(folder: Path, name: str) -> None:
    """Nearly: with its one window free after attention, a cell's MLP runs beside the next KV."""
    found = measure(folder, PROFILES[name], look_ahead=0)
    both = found.copy_s + found.compute_s
    assert both * 0.95 <= found.step_s <= 1.03 * (both + found.up_s)
