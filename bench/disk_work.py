"""One job in this process: sl-serve or a peer from disk, or the rates of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.disk_cases import WARM_UP_REQUESTS, WARM_UP_TOKENS, DiskStep, disk_case_of, stored_bytes
from bench.disk_io import drop_page_cache, read_bytes, weight_files
from bench.measurement import Measurement, check_outputs, peak_rss_bytes
from bench.runner import OURS
from sl_serve.stats import StepStats

RATES = "rates"
_RATE_LAYERS = 4  # of 1.1 billion parameters in float32: more than caches hold
_RATE_ROWS = 512  # where products reach their full rate; and the rows of a decode step


def run_job(
    system: str, model: Path, n_requests: int, host_memory_bytes: int, disk_dir: Path
) -> dict[str, Any]:
    """`system` is RATES, OURS, "sl-serve:WEIGHTS" or "accelerate:VARIANT"; the answer is
    JSON-ready. `disk_dir`: for weights that the model's own files do not have."""
    case = disk_case_of(model, n_requests, host_memory_bytes)
    name, _, variant = system.partition(":")
    if system == RATES:
        return _measure_rates(case, model)
    if name == OURS and variant:
        case = disk_case_of(model, n_requests, host_memory_bytes, variant, disk_dir)
    if name == OURS:
        return asdict(measure(case, model))
    from bench.peers import accelerate_disk

    return asdict(accelerate_disk.measure(case, model, variant))


def measure(case: Case, model: Path) -> Measurement:
    """Runs the case once, after a few tokens of a few requests, the page cache dropped."""
    from sl_serve.core import SamplingParams
    from sl_serve.llm import LLM

    def greedy(n_tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)

    start = time.perf_counter()
    llm = LLM(str(model), case.engine)
    load_s = time.perf_counter() - start
    with llm:
        llm.generate(case.warm_up_prompts()[:WARM_UP_REQUESTS], greedy(WARM_UP_TOKENS))
        drop_page_cache(weight_files(model))
        steps: list[DiskStep] = []
        llm.engine.on_step(_recorder(steps))
        start = time.perf_counter()
        generations = llm.generate(case.prompts(), greedy(case.output_tokens))
        wall_s = time.perf_counter() - start
        plan = llm.engine.plan
    stored = stored_bytes(model)
    output_ids = [list(g.token_ids) for g in generations]
    check_outputs(case, output_ids)
    extras = {
        "steps": [asdict(step) for step in steps],
        "disk_bytes": (
            plan.n_disk_layers * stored.layer + plan.head_on_disk * stored.head
            if case.engine.weights == "auto"
            else plan.disk_bytes  # the head is in memory then
        ),
        "disk_layers": plan.n_disk_layers,
        "plan": {what: n_bytes for what, n_bytes, _ in plan.table()},
        "plan_bytes": plan.total_bytes,
        "prefill_tokens": plan.prefill_tokens,
    }
    return Measurement(load_s, wall_s, peak_rss_bytes(), output_ids, extras)


def _recorder(steps: list[DiskStep]) -> Callable[[StepStats], None]:
    """A step's reads are those since the last step ended: the ring reads on between steps."""
    seen = read_bytes()

    def record(stats: StepStats) -> None:
        nonlocal seen
        before, seen = seen, read_bytes()
        steps.append(
            DiskStep(stats.wall_s, stats.n_prefill_tokens, stats.n_decode_tokens, seen - before)
        )

    return record


def _measure_rates(case: Case, model: Path) -> dict[str, Any]:
    import torch

    from bench.bound import measure_rates, model_matrices, read_model_config

    torch.manual_seed(0)
    matrices = [
        replace(m, count=min(m.count, _RATE_LAYERS))
        for m in model_matrices(read_model_config(model))
    ]
    return {"rates": measure_rates(matrices, (case.n_requests, _RATE_ROWS), repeats=3)}
