"""What shorter weights and shorter KV cost: perplexity of a text, and divergence from float32.

Every variant reads the same windows of the text as prompts of one step, next to the float32 model,
so that their distributions are compared position by position and nothing is kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from bench.errors import BenchError
from bench.quality_calibrated import calibrated
from sl_serve.config import ActivationName, EngineConfig, KVDTypeName, SchedulerConfig
from sl_serve.core import Request, SamplingParams
from sl_serve.llm import open_model
from sl_serve.loader import load
from sl_serve.sched.packer import pack

BLOCK_LINES = 64  # of logits that are compared at a time, for all variants


class Variant(NamedTuple):
    weights: str
    kv: KVDTypeName
    activations: ActivationName = "float32"


REFERENCE = Variant("auto", "float32")
CALIBRATED = "int4-calibrated"  # weights, in a folder made beforehand


@dataclass
class Divergence:
    """Sums over positions, in float64."""

    n: int = 0
    log_loss: float = 0.0
    divergence: float = 0.0
    n_agreeing: int = 0

    def add(self, reference: torch.Tensor, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """Log probabilities (n, vocabulary) of both, and the ids (n,) that did follow."""
        self.n += len(targets)
        chosen = logprobs.gather(1, targets[:, None])
        self.log_loss -= chosen.sum(dtype=torch.float64).item()
        terms = reference.exp() * (reference - logprobs)
        self.divergence += terms.sum(dtype=torch.float64).item()
        self.n_agreeing += int((reference.argmax(1) == logprobs.argmax(1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.log_loss / self.n)


class Model:
    """A variant, loaded: a window of tokens to logits, through the sweep itself."""

    def __init__(self, model: str, variant: Variant, window_tokens: int) -> None:
        """`model`: for calibrated weights the folder that has them."""
        checkpoint = open_model(model)
        try:
            self.parts = load(checkpoint, engine_config(variant, window_tokens))
        finally:
            checkpoint.close()
        self.variant = variant

    def hidden(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, hidden) after the last layer."""
        residents, sampling = self.parts.residents, SamplingParams(max_tokens=0)
        request = Request("window", list(ids), sampling, lambda _: None)
        if not residents.admit(request, len(ids)):
            raise BenchError(f"a window of {len(ids)} tokens does not fit into the KV cache")
        residents.make_room()
        (states,) = self.parts.sweep.run(pack(residents, len(ids), 1, len(ids)), residents.slabs)
        residents.release(request)
        return states

    def logprobs(self, states: torch.Tensor) -> torch.Tensor:
        return self.parts.head.logits(states).log_softmax(-1)

    @property
    def weight_bytes(self) -> int:
        """Of all layers as they lie in memory."""
        return self.parts.store.layout.image_bytes * self.parts.store.n_layers

    @property
    def kv_token_bytes(self) -> int:
        return self.parts.plan.kv.token_bytes


def engine_config(variant: Variant, window_tokens: int) -> EngineConfig:
    scheduler = SchedulerConfig(max_rows=BLOCK_LINES, prefill_chunk_tokens=window_tokens)
    return EngineConfig(
        max_model_len=window_tokens,
        weights="auto" if variant.weights == CALIBRATED else variant.weights,
        kv_dtype=variant.kv,
        activations=variant.activations,
        scheduler=scheduler,
    )


def measure(
    model: str, text: str, variants: Sequence[Variant], n_tokens: int, window_tokens: int
) -> dict[str, Any]:
    """Read the first `n_tokens` of `text` with every variant; JSON-ready.

    Raises BenchError when the text is shorter, UserError when a model cannot be loaded."""
    checkpoint = open_model(model)
    try:
        ids = checkpoint.load_tokenizer().encode(text)
    finally:
        checkpoint.close()
    if len(ids) < n_tokens:
        raise BenchError(f"the text has {len(ids)} tokens, {n_tokens} are to be read")
    every = [REFERENCE, *(v for v in variants if v != REFERENCE)]
    with Progress() as progress, ExitStack() as folders:
        sources = dict.fromkeys(every, model)
        wanted = [v for v in every if v.weights == CALIBRATED]
        if wanted:
            folder = folders.enter_context(calibrated(model, progress))
            sources |= dict.fromkeys(wanted, str(folder))
        loading = progress.add_task("loading", total=len(every))
        models = []
        for variant in every:
            models.append(Model(sources[variant], variant, window_tokens))
            progress.advance(loading)
        try:
            starts = range(0, n_tokens, window_tokens)
            windows = [ids[i : min(i + window_tokens, n_tokens)] for i in starts]
            sums = [Divergence() for _ in models]
            with torch.inference_mode():
                for window in progress.track(windows, description="reading"):
                    _compare(models, sums, window)
        finally:
            for loaded in models:
                loaded.parts.close()
    return {
        "model": model,
        "tokens": n_tokens,
        "window_tokens": window_tokens,
        "variants": [_row(m, s, sums[0]) for m, s in zip(models, sums, strict=True)],
    }


def _compare(models: Sequence[Model], sums: Sequence[Divergence], window: Sequence[int]) -> None:
    targets = torch.tensor(window[1:])
    states = [model.hidden(window)[:-1] for model in models]
    for start in range(0, len(targets), BLOCK_LINES):
        block = slice(start, start + BLOCK_LINES)
        reference = models[0].logprobs(states[0][block])
        for model, of_model, total in zip(models, states, sums, strict=True):
            total.add(reference, model.logprobs(of_model[block]), targets[block])


def _row(model: Model, sums: Divergence, reference: Divergence) -> dict[str, Any]:
    return {
        **asdict(sums),
        "weights": model.variant.weights,
        "kv": model.variant.kv,
        "activations": model.variant.activations,
        "weight_bytes": model.weight_bytes,
        "kv_token_bytes": model.kv_token_bytes,
        "perplexity": sums.perplexity,
        "perplexity_ratio": sums.perplexity / reference.perplexity,
        "mean_divergence": sums.divergence / sums.n,
        "agreement": sums.n_agreeing / sums.n,
    }
