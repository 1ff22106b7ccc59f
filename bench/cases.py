"""Named workloads. A case is data: a later one is one more entry of `CASES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.errors import BenchError
from sl_serve.config import EngineConfig

TINY_MODEL = "tiny-llama"  # random weights, written by bench.tiny


@dataclass(frozen=True, slots=True)
class Case:
    """`n_requests` greedy requests of equal length, all there from the start; eos is ignored."""

    name: str
    about: str
    model: str  # what sl-serve calls it, or TINY_MODEL
    n_requests: int
    prompt_tokens: int
    output_tokens: int
    token_ids: tuple[int, int]  # prompts are drawn from [low, high): the ordinary tokens
    engine: EngineConfig = field(default_factory=EngineConfig)
    peer_batches: tuple[int, ...] = (32, 64, 128, 256)  # tried by peers with static batches
    peer_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    seed: int = 0

    @property
    def generated_tokens(self) -> int:
        return self.n_requests * self.output_tokens

    def prompts(self) -> list[list[int]]:
        """The same on every machine, and no two alike."""
        return self._draw(self.n_requests, self.seed)

    def warm_up_prompts(self) -> list[list[int]]:
        """A few prompts that are not among `prompts`, so that no cache can help."""
        return self._draw(min(4, self.n_requests), self.seed + 1)

    def _draw(self, n: int, seed: int) -> list[list[int]]:
        low, high = self.token_ids
        drawn = np.random.default_rng(seed).integers(low, high, size=(n, self.prompt_tokens))
        return [[int(token) for token in row] for row in drawn]


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="smollm2-128x128-n256",
            about="SmolLM2 135M, 256 requests of 128 prompt and 128 generated tokens",
            model="smollm2",
            n_requests=256,
            prompt_tokens=128,
            output_tokens=128,
            token_ids=(100, 49152),
        ),
        Case(
            name="tiny-16x8-n8",
            about="a random two-layer Llama, 8 requests of 16 and 8 tokens; for trying things out",
            model=TINY_MODEL,
            n_requests=8,
            prompt_tokens=16,
            output_tokens=8,
            token_ids=(3, 256),
            peer_batches=(4, 8),
        ),
    )
}


def find_case(name: str) -> Case:
    if name not in CASES:
        raise BenchError(f"no case is named {name!r}; there are: {', '.join(CASES)}")
    return CASES[name]
