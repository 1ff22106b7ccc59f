"""Hugging Face transformers: static batches through `generate`, the best size and type found by
trying them. A variant is "dtype:batch", such as "float32:64".

Weights of a GGUF file are loaded as transformers itself prefers: left packed where it has kernels
for them, otherwise expanded to dense matrices of the type asked for."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.cases import WARM_UP_TOKENS, Case
from bench.measurement import Measurement, check_outputs, peak_rss_bytes
from bench.peers import Probe

_PROBE_TOKENS = 8
# A type this far behind the first one's best estimate is not run in full, and a type this far
# behind at one batch size is not tried at larger ones.
_WORTH_RUNNING = 0.8
_WORTH_TRYING = 0.5


class _Clock(StoppingCriteria):
    """Notes the time after each generated token; stops nothing."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def probe(case: Case, model: Path) -> Probe:
    """Times one batch of each type and size over a few tokens."""
    estimates: dict[str, float] = {}
    skipped: dict[str, str] = {}
    best: dict[str, str] = {}
    for dtype in case.peer_dtypes:
        network = _load(model, dtype)
        generate(network, case.warm_up_prompts()[:4], 2)
        for batch in case.peer_batches:
            variant = f"{dtype}:{batch}"
            estimates[variant] = _estimate(case, network, batch)
            leader = estimates[f"{case.peer_dtypes[0]}:{batch}"]
            if estimates[variant] < _WORTH_TRYING * leader:
                skipped[dtype] = f"sizes above {batch}: less than half of {case.peer_dtypes[0]}"
                break
        tried = [v for v in estimates if v.startswith(f"{dtype}:")]
        best[dtype] = max(tried, key=estimates.__getitem__)
        del network
    leader = estimates[best[case.peer_dtypes[0]]]
    variants = [v for v in best.values() if estimates[v] >= _WORTH_RUNNING * leader]
    return Probe(variants, estimates, skipped)


def measure(case: Case, model: Path, variant: str) -> Measurement:
    """Runs the case once, batch after batch, after a few tokens of one batch."""
    dtype, _, batch = variant.partition(":")
    start = time.perf_counter()
    network = _load(model, dtype)
    load_s = time.perf_counter() - start
    generate(network, case.warm_up_prompts()[: int(batch)], WARM_UP_TOKENS)
    prompts, output_ids = case.prompts(), list[list[int]]()
    start = time.perf_counter()
    for first in range(0, case.n_requests, int(batch)):
        output_ids += generate(network, prompts[first : first + int(batch)], case.output_tokens)
    wall_s = time.perf_counter() - start
    check_outputs(case, output_ids)
    extras = {"dtype": dtype, "batch": int(batch), "threads": torch.get_num_threads()}
    return Measurement(load_s, wall_s, peak_rss_bytes(), output_ids, extras)


def _load(model: Path, dtype: str) -> Any:
    folder, file = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    network: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", **file
    )
    return without_ends(network)


def without_ends(network: Any) -> Any:
    """Each request runs to its length, and no token is ruled out on the way."""
    network.eval()
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    return network


def generate(
    network: Any, prompts: list[list[int]], n_tokens: int, observer: StoppingCriteria | None = None
) -> list[list[int]]:
    """Greedy continuations. Prompts of one length, so that there is no padding."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([observer] if observer else []),
        )
    tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return tokens


def _estimate(case: Case, network: Any, batch: int) -> float:
    """Tokens per second of the whole case at this batch size, from a few steps of one batch."""
    clock = _Clock()
    start = time.perf_counter()
    generate(network, case.prompts()[:batch], min(_PROBE_TOKENS, case.output_tokens), clock)
    first_token_s = clock.ticks[0] - start
    step_s = statistics.median(b - a for a, b in zip(clock.ticks, clock.ticks[1:], strict=False))
    n_batches = -(-case.n_requests // batch)
    wall_s = n_batches * (first_token_s + (case.output_tokens - 1) * step_s)
    return case.generated_tokens / wall_s
