"""Jobs that run on a GPU, each in a process of its own: the link, and sl-serve itself."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.cases import WARM_UP_TOKENS, Case
from bench.gpu_cases import GIB, GpuCase
from bench.measurement import check_outputs, peak_rss_bytes
from bench.timeline import Timeline
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.device import CudaDevice, Device, Span, Stream
from sl_serve.engine import Engine
from sl_serve.errors import EngineDeadError
from sl_serve.llm import open_model
from sl_serve.loader import load
from sl_serve.stats import StepStats

LINK_BYTES = 1 << 30
LINK_REPEATS = 5
MATMUL_SIDE = 8192


def measure_link() -> dict[str, Any]:
    """The GPU's name, and bytes/s of large copies from and to pinned memory; FLOP/s of a large
    product of 16-bit numbers."""
    device = CudaDevice()
    host = [device.host_empty(LINK_BYTES) for _ in range(2)]
    there = [device.empty(LINK_BYTES) for _ in range(2)]

    def seconds(down: bool, up: bool) -> float:
        started_s = time.perf_counter()
        if down:
            device.copy(Stream.LOAD, there[0], host[0])
        if up:
            device.copy(Stream.STORE, host[1], there[1])
        for stream in (Stream.LOAD, Stream.STORE):
            device.synchronize(device.record(stream))
        return time.perf_counter() - started_s

    try:
        return {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_bytes": torch.cuda.mem_get_info()[1],
            "down_bytes_per_s": LINK_BYTES / _median(lambda: seconds(True, False)),
            "up_bytes_per_s": LINK_BYTES / _median(lambda: seconds(False, True)),
            "each_way_at_once_bytes_per_s": LINK_BYTES / _median(lambda: seconds(True, True)),
            "flops_per_s": 2 * MATMUL_SIDE**3 / _median(_product(device)),
        }
    finally:
        device.close()


def _median(run: Callable[[], float]) -> float:
    return statistics.median([run() for _ in range(LINK_REPEATS + 1)][1:])


def _product(device: Device) -> Callable[[], float]:
    shape = (MATMUL_SIDE, MATMUL_SIDE)
    a, b = (torch.randn(shape, device=device.torch_device).half() for _ in range(2))

    def seconds() -> float:
        started_s = time.perf_counter()
        torch.mm(a, b)
        device.synchronize(device.record(Stream.COMPUTE))
        return time.perf_counter() - started_s

    return seconds


def cap_memory(case: GpuCase) -> None:
    """No more of the GPU's memory than the case allows; beyond it torch says out of memory."""
    total_bytes = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, case.device_gib * GIB / total_bytes))


def measure_ours(case: GpuCase) -> dict[str, Any]:
    """One run of the case after a short one of its size, and the timeline of a late step."""
    cap_memory(case)
    workload = case.workload()
    started_s = time.perf_counter()
    checkpoint = open_model(case.shape, "dummy")
    parts = load(checkpoint, workload.engine)
    engine = Engine(parts, checkpoint.load_tokenizer(), workload.engine)
    load_s = time.perf_counter() - started_s
    try:
        _generate(engine, workload.warm_up_prompts(), WARM_UP_TOKENS)
        observed = _Observer(parts.sweep.device, workload)
        engine.on_step(observed)
        started_s = time.perf_counter()
        output_ids = _generate(engine, workload.prompts(), case.output_tokens)
        wall_s = time.perf_counter() - started_s
    finally:
        engine.close()
        checkpoint.close()
    check_outputs(workload, output_ids)
    return {
        "tokens_per_s": workload.generated_tokens / wall_s,
        "wall_s": wall_s,
        "load_s": load_s,
        "ops": parts.sweep.ops.name,
        "device_layers": parts.plan.n_device_layers,
        "planned_device_bytes": parts.plan.device_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_reserved(),
        "timeline": Timeline.of(observed.spans).as_json(),
        **observed.totals(),
    }


class _Observer:
    """Adds up what the steps say, and asks for the timeline of one of the last."""

    def __init__(self, device: Device, workload: Case) -> None:
        self._device = device
        self._steps: list[StepStats] = []
        self._n_before = max(1, workload.output_tokens // 2)  # steps, at least
        self.spans: list[Span] = []

    def __call__(self, step: StepStats) -> None:
        self._steps.append(step)
        if len(self._steps) == self._n_before:
            self._device.start_timeline()
        elif len(self._steps) == self._n_before + 1:
            self.spans = self._device.take_timeline()

    def totals(self) -> dict[str, Any]:
        steps = self._steps
        return {
            "steps": len(steps),
            "step_s": sum(s.wall_s for s in steps),
            "weight_bytes": sum(s.weight_bytes for s in steps),
            "kv_down_bytes": sum(s.kv_down_bytes for s in steps),
            "kv_up_bytes": sum(s.kv_up_bytes for s in steps),
        }


def _generate(engine: Engine, prompts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
    """Greedy continuations, all submitted at once."""
    news: queue.SimpleQueue[TokenOut] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    engine.submit([Request(str(i), p, sampling, news.put) for i, p in enumerate(prompts)])
    output_ids: list[list[int]] = [[] for _ in prompts]
    n_left = len(prompts)
    while n_left:
        out = news.get()
        output_ids[int(out.request_id)] += out.token_ids
        n_left -= out.finish_reason is not None
        if out.error is not None:
            raise EngineDeadError(out.error)
    return output_ids
