"""accelerate's disk offload: every layer on disk, one static batch through `generate`.

A variant is a dtype, or a dtype and ":uncached". Without the latter the kernel keeps the weights
in whatever memory the machine has to spare, once they have been read: accelerate reads through
the page cache. With it they are dropped from there after every pass, as they would be on a machine
that has no memory to spare.

The settings are its best: layers are read from the checkpoint's own file rather than from copies;
embedding and head, which could not be kept under a tight ceiling, stay in memory.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from bench.cases import Case
from bench.disk_cases import WARM_UP_REQUESTS, WARM_UP_TOKENS, DiskStep, stored_bytes
from bench.disk_io import drop_page_cache, read_bytes, weight_files
from bench.measurement import Measurement, check_outputs, peak_rss_bytes
from bench.peers.hf import generate, without_ends

VARIANTS = ("bfloat16", "float32", "bfloat16:uncached", "float32:uncached")
_DEVICES = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


class _Recorder(StoppingCriteria):
    """Notes each pass; stops nothing."""

    def __init__(self, n_prompt_tokens: int, uncached: list[Path]) -> None:
        self.steps: list[DiskStep] = []
        self.dropping_s = 0.0  # spent on `uncached`, files to drop from the page cache
        self._n_prompt_tokens, self._uncached = n_prompt_tokens, uncached
        self._begin()

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        wall_s = time.perf_counter() - self._start_s
        n_read = read_bytes() - self._read_bytes
        n_prefill = 0 if self.steps else self._n_prompt_tokens
        self.steps.append(DiskStep(wall_s, n_prefill, 0 if n_prefill else len(input_ids), n_read))
        start = time.perf_counter()
        drop_page_cache(self._uncached)
        self.dropping_s += time.perf_counter() - start
        self._begin()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _begin(self) -> None:
        self._start_s, self._read_bytes = time.perf_counter(), read_bytes()


def measure(case: Case, model: Path, variant: str) -> Measurement:
    """Runs the case once, after a few tokens of a few requests, the page cache dropped."""
    dtype, _, uncached = variant.partition(":")
    files = weight_files(model)
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        start = time.perf_counter()
        network = _load(model, dtype, folder)
        load_s = time.perf_counter() - start
        generate(network, case.warm_up_prompts()[:WARM_UP_REQUESTS], WARM_UP_TOKENS)
        drop_page_cache(files)
        recorder = _Recorder(case.n_requests * case.prompt_tokens, files if uncached else [])
        start = time.perf_counter()
        output_ids = generate(network, case.prompts(), case.output_tokens, recorder)
        wall_s = time.perf_counter() - start - recorder.dropping_s
    check_outputs(case, output_ids)
    stored = stored_bytes(model)
    extras = {
        "steps": [asdict(step) for step in recorder.steps],
        "disk_bytes": stored.n_layers * stored.layer,
        "threads": torch.get_num_threads(),
    }
    return Measurement(load_s, wall_s, peak_rss_bytes(), output_ids, extras)


def _load(model: Path, dtype: str, folder: str) -> Any:
    network: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, dtype),
        device_map=_DEVICES,
        offload_folder=folder,
        offload_state_dict=True,
        attn_implementation="sdpa",
    )
    return without_ends(network)
