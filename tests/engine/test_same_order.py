"""The same bits in any company: one order of sums for few rows and many, where a seed asks for
it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve.core import Request, RowWork, SamplingParams
from sl_serve.engine import Engine
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import row_table
from sl_serve.ops import KVRegion, Ops, Scoring
from sl_serve.ops.native_ops import NativeOps
from sl_serve.ops.protocol import CAUSAL
from sl_serve.weights.quantised import Weight
from tests.engine.running import config, engine, random_prompts, requests_for
from tests.engine.test_block_matmul import rows_of
from tests.engine.test_matmul import each_target, random
from tests.weights.blocks import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

N_IN, N_OUT = 512, 130
CHUNK_TOKENS = 64
PROMPTS = random_prompts(40, longest=12, seed=9)
LONG = random_prompts(8, longest=150, seed=10)  # blocks of attention, and chunks, end within them
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


N_HEADS, N_KV_HEADS, HEAD_DIM, N_POSITIONS = 6, 2, 128, 150


def attended(ops: Ops, width: int, n_new: int, scoring: Scoring) -> torch.Tensor:
    """A row's tokens over themselves, so many at a time, in a slab of `width` rows."""
    spec = KVSpec(1, N_KV_HEADS, HEAD_DIM, KV_FORMATS["float32"], CHUNK_TOKENS, "row")
    slab = Slab(0, width, spec.positions(width))
    slab.chunks = list(range(slab.missing_chunks(N_POSITIONS)))
    offsets = {0: [c * spec.chunk_bytes for c in slab.chunks]}
    region = KVRegion(torch.zeros(len(slab.chunks) * spec.chunk_bytes, dtype=torch.uint8), 0)
    request = Request("", [0] * N_POSITIONS, SamplingParams(), print)
    q, k, v = random(N_POSITIONS, N_HEADS + 2 * N_KV_HEADS, HEAD_DIM).split(
        [N_HEADS, N_KV_HEADS, N_KV_HEADS], dim=1
    )
    found = []
    for start in range(0, N_POSITIONS, n_new):
        n = min(n_new, N_POSITIONS - start)
        table = row_table(
            spec, [RowWork(request, 0, 0, start, n, samples=True)], {0: slab}, offsets
        )
        new = slice(start, start + n)
        ops.append(region, table, k[new], v[new])
        found.append(ops.attend(region, table, q[new], N_KV_HEADS, scoring).clone())
    return torch.cat(found)


@each_target
@pytest.mark.parametrize("window", [None, 37])
def test_a_token_attends_in_the_same_bits_however_many_come_with_it(
    target: str, window: int | None
) -> None:
    """Blocks of 32 positions: shorter than what a cut could take."""
    ops, scoring = NativeOps(1, target), Scoring(window=window)
    whole = attended(ops, 1, N_POSITIONS, scoring)
    for n_new in (1, 7, 40):
        assert torch.equal(attended(ops, 1, n_new, scoring), whole)


@each_target
@pytest.mark.parametrize("n_new", [1, 40])
def test_how_a_row_is_stored_shows_in_no_sum(target: str, n_new: int) -> None:
    ops = NativeOps(1, target)
    expected = attended(ops, 1, n_new, CAUSAL)
    for width in (2, 16, CHUNK_TOKENS):
        assert torch.equal(attended(ops, width, n_new, CAUSAL), expected)


Bits = list[tuple[tuple[int, ...], tuple[float, ...]]]


def drawn(
    running: Engine, prompts: Sequence[list[int]], first: int, n: int, sampling: SamplingParams
) -> Bits:
    """Tokens and their log probabilities, of n prompts that run together."""
    numbers = range(first, first + n)
    each = [replace(sampling, seed=None if sampling.seed is None else 100 + i) for i in numbers]
    requests, answers = requests_for([prompts[i] for i in numbers], each, uuid.uuid4().hex)
    running.submit(requests)
    tokens = answers.wait()
    values = [[p.logprob for out in news for p in out.logprobs] for news in answers.news]
    return [(tuple(t), tuple(v)) for t, v in zip(tokens, values, strict=True)]


def in_company_of(
    folder: Path,
    n: int,
    sampling: SamplingParams,
    prompts: Sequence[list[int]] = PROMPTS,
    **settings: int,
) -> Bits:
    fields = {"max_rows": 40, "prefill_chunk_tokens": 512} | settings
    with engine(folder, config(**fields)) as running:
        starts = range(0, len(prompts), n)
        return [bits for i in starts for bits in drawn(running, prompts, i, n, sampling)]


def test_a_seed_draws_the_same_in_any_company(folder: Path) -> None:
    seeded = replace(SEEDED, seed=1)
    alone = in_company_of(folder, 1, seeded)
    assert in_company_of(folder, 40, seeded) == alone
    assert in_company_of(folder, 8, seeded) == alone


@pytest.mark.parametrize("chunk_tokens", [8, 9, 200])
def test_a_seed_draws_the_same_wherever_its_prompt_is_cut(folder: Path, chunk_tokens: int) -> None:
    """Eight rows with 8 tokens a step have one each, as rows that decode; with 9, one has two."""
    seeded = replace(SEEDED, seed=1)
    whole = in_company_of(folder, 8, seeded, LONG, prefill_chunk_tokens=4096)
    assert in_company_of(folder, 8, seeded, LONG, prefill_chunk_tokens=chunk_tokens) == whole


def test_a_seed_draws_the_same_in_chunks_of_any_size(folder: Path) -> None:
    """Rows that are alone lie in chunks of their own, others share them."""
    seeded = replace(SEEDED, seed=1, max_tokens=40)
    expected = in_company_of(folder, 8, seeded, LONG)
    assert in_company_of(folder, 8, seeded, LONG, max_rows=3) == expected
    assert in_company_of(folder, 1, seeded, LONG, max_rows=1) == expected


def test_without_a_seed_few_rows_are_quick(folder: Path) -> None:
    """The order of their sums shows in the last bits."""
    best = replace(SEEDED, temperature=0.0)
    alone, crowd = in_company_of(folder, 1, best), in_company_of(folder, 40, best)
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in crowd]
    assert alone != crowd
