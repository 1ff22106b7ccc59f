"""Attention by the processor runs beside link and arithmetic, judged by the simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sl_serve.device import SimDevice
from sl_serve.device.sim import HardwareProfile
from sl_serve.loader import Parts
from tests.engine.running import GREEDY, config, engine, run, steps_of
from tests.engine.test_overlap import Clocked
from tests.models import TINY_MODELS

N_LAYERS, N_ROWS, N_SUB_BATCHES, N_OUTPUT = 12, 16, 4, 12
N_PROMPT = 60


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    TINY_MODELS[request.param](folder, num_hidden_layers=N_LAYERS)
    return folder


@dataclass(frozen=True)
class Measured:
    """Of a run's middle steps, in which all rows decode."""

    step_s: float
    down_s: float
    up_s: float
    compute_s: float
    host_s: float

    @property
    def together_s(self) -> float:
        return self.down_s + self.up_s + self.compute_s + self.host_s

    @property
    def longest_s(self) -> float:
        return max(self.down_s, self.up_s, self.compute_s, self.host_s)

    @property
    def cell_s(self) -> float:
        """What every resource takes for one cell."""
        return self.together_s / (N_LAYERS * N_SUB_BATCHES)


def measure(folder: Path, profile: HardwareProfile, look_ahead: int) -> Measured:
    device, found = SimDevice(profile), list[Parts]()
    clock = Clocked(device)
    scheduling = config(
        max_rows=N_ROWS,
        n_sub_batches=N_SUB_BATCHES,
        look_ahead=look_ahead,
        prefill_chunk_tokens=N_ROWS * N_PROMPT,
    )
    settings = replace(scheduling, attention="host", kv_memory_bytes=24 << 20)
    with engine(folder, settings, device, found.append) as running:
        steps = steps_of(running)
        running.on_step(clock)
        sampling = replace(GREEDY, max_tokens=N_OUTPUT)
        run(running, [[i] * N_PROMPT for i in range(N_ROWS)], sampling)
    first, last = 2, 10
    middle = steps[first + 1 : last + 1]
    assert all(s.n_decode_tokens == N_ROWS and s.n_sub_batches == N_SUB_BATCHES for s in middle)
    down = sum(s.weight_bytes + s.kv_down_bytes for s in middle) / len(middle)
    up = sum(s.kv_up_bytes for s in middle) / len(middle)
    n_context = N_PROMPT + (first + 1 + last) / 2  # prompt and all tokens so far, on average
    segments = found[0].store.layout.segments(0)
    n_flops = 2.0 * N_ROWS * N_LAYERS * sum(s.size_bytes // 4 for s in segments)
    return Measured(
        step_s=(clock.times_s[last] - clock.times_s[first]) / len(middle),
        down_s=down / profile.down_bytes_per_s,
        up_s=up / profile.up_bytes_per_s,
        compute_s=n_flops / profile.flops_per_s,
        host_s=N_ROWS * n_context * found[0].plan.kv.token_bytes / profile.host_bytes_per_s,
    )


# A step of these models: about 1e7 FLOPs of each row, 2 MB down, 0.1 to 0.2 up, 7 to 13 of KV.
PROFILES = {
    "link down": HardwareProfile("slow link", 1e9, 1e9, 1e12, host_bytes_per_s=20e9),
    "host": HardwareProfile("slow memory", 10e9, 10e9, 1e12, host_bytes_per_s=2e9),
    "compute": HardwareProfile("slow arithmetic", 10e9, 10e9, 10e9, host_bytes_per_s=50e9),
    "all alike": HardwareProfile("balanced", 1e9, 10e9, 8e9, host_bytes_per_s=4e9),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_step_takes_the_longest_of_link_attention_and_arithmetic(folder: Path, name: str) -> None:
    found = measure(folder, PROFILES[name], look_ahead=1)
    bound = {"link down": found.down_s, "host": found.host_s, "compute": found.compute_s}
    if name in bound:
        assert bound[name] == found.longest_s
    assert found.longest_s * 0.999 <= found.step_s <= 1.03 * found.longest_s + found.cell_s


@pytest.mark.parametrize("name", PROFILES)
def test_the_serial_twin_takes_their_sum(folder: Path, name: str) -> None:
    found = measure(folder, PROFILES[name], look_ahead=0)
    assert found.step_s == pytest.approx(found.together_s, rel=0.03)
