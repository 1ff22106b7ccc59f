"""The same bits in any company: one order of sums for few rows and many, where a seed asks for
it."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve.core import SamplingParams
from sl_serve.engine import Engine
from sl_serve.ops.native_ops import NativeOps
from sl_serve.weights.quantised import Weight
from tests.engine.running import config, engine, random_prompts, requests_for
from tests.engine.test_block_matmul import rows_of
from tests.engine.test_matmul import each_target, random
from tests.weights.blocks import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

N_IN, N_OUT = 512, 130
PROMPTS = random_prompts(40, longest=12, seed=9)
SEEDED = SamplingParams(max_tokens=6, temperature=1.0, logprobs=0, ignore_eos=True)


def weights() -> dict[str, Weight]:
    plain = random(N_OUT, N_IN)
    return {
        "float32": plain.t(),
        "bfloat16": plain.bfloat16().t(),
        "q4_1": rows_of(Kind.Q4_1, N_OUT, N_IN).t(),
        "q6_k": rows_of(Kind.Q6_K, N_OUT, N_IN).t(),
    }


@each_target
@pytest.mark.parametrize("name", weights())
def test_a_row_has_the_bits_it_has_among_many(target: str, name: str) -> None:
    ops, x, w = NativeOps(1, target), random(60, N_IN), weights()[name]
    among_many = ops.linear("x", x, w, None).clone()
    found = {}
    for same_order in (True, False):
        ops.same_order = same_order
        few = [torch.equal(ops.linear("x", x[:m], w, None), among_many[:m]) for m in (1, 4, 5, 24)]
        found[same_order] = few
        assert torch.equal(ops.linear("x", x[:25], w, None), among_many[:25])
    assert all(found[True])
    assert not all(found[False])  # or there is nothing to choose


Bits = list[tuple[tuple[int, ...], tuple[float, ...]]]


def drawn(running: Engine, first: int, n: int, sampling: SamplingParams) -> Bits:
    """Tokens and their log probabilities, of prompts that run together."""
    numbers = range(first, first + n)
    each = [replace(sampling, seed=None if sampling.seed is None else 100 + i) for i in numbers]
    requests, answers = requests_for([PROMPTS[i] for i in numbers], each, uuid.uuid4().hex)
    running.submit(requests)
    tokens = answers.wait()
    values = [[p.logprob for out in news for p in out.logprobs] for news in answers.news]
    return [(tuple(t), tuple(v)) for t, v in zip(tokens, values, strict=True)]


def in_company_of(folder: Path, n: int, sampling: SamplingParams) -> Bits:
    """Of one engine: another one's attention may be cut into blocks at other positions."""
    with engine(folder, config(max_rows=40, prefill_chunk_tokens=512)) as running:
        return [b for i in range(0, len(PROMPTS), n) for b in drawn(running, i, n, sampling)]


def test_a_seed_draws_the_same_in_any_company(folder: Path) -> None:
    seeded = replace(SEEDED, seed=1)
    alone = in_company_of(folder, 1, seeded)
    assert in_company_of(folder, 40, seeded) == alone
    assert in_company_of(folder, 8, seeded) == alone


def test_without_a_seed_few_rows_are_quick(folder: Path) -> None:
    """The order of their sums shows in the last bits."""
    best = replace(SEEDED, temperature=0.0)
    alone, crowd = in_company_of(folder, 1, best), in_company_of(folder, 40, best)
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in crowd]
    assert alone != crowd
