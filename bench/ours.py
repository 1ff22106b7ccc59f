"""sl-serve itself, through its offline interface."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.cases import WARM_UP_TOKENS, Case
from bench.measurement import Measurement, check_outputs, peak_rss_bytes
from sl_serve.core import SamplingParams
from sl_serve.llm import LLM
from sl_serve.stats import EngineSnapshot


def measure(case: Case, model: Path) -> Measurement:
    """Runs the case once, after a few tokens of as many requests."""
    start = time.perf_counter()
    llm = LLM(str(model), case.engine)
    load_s = time.perf_counter() - start
    try:
        llm.generate(case.warm_up_prompts(), _greedy(WARM_UP_TOKENS))
        before = llm.engine.snapshot()
        start = time.perf_counter()
        generations = llm.generate(case.prompts(), _greedy(case.output_tokens))
        wall_s = time.perf_counter() - start
        after = llm.engine.snapshot()
    finally:
        llm.close()
    output_ids = [list(g.token_ids) for g in generations]
    check_outputs(case, output_ids)
    return Measurement(load_s, wall_s, peak_rss_bytes(), output_ids, _step_figures(before, after))


def _greedy(n_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)


def _step_figures(before: EngineSnapshot, after: EngineSnapshot) -> dict[str, Any]:
    n_steps = after.n_steps - before.n_steps
    return {
        "steps": n_steps,
        "mean_step_s": (after.step_s_total - before.step_s_total) / max(n_steps, 1),
        "weight_bytes_per_step": (after.weight_bytes_total - before.weight_bytes_total)
        / max(n_steps, 1),
        "kv_total_bytes": after.kv_total_bytes,
    }
