"""The device's operations on windows, against attention by definition in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sl_serve.core import Request, RowWork, SamplingParams, SubBatchPlan
from sl_serve.device import SimDevice
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.host import HostKV
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable
from sl_serve.ops import KVRegion, Ops, Scoring, TorchOps, choose_ops
from sl_serve.ops.device_ops import DeviceOps, DeviceTable, find_flash_attention
from sl_serve.ops.row_groups import group_rows
from tests.engine.test_ops import causal, relative_error

CHUNK_TOKENS, HEAD_DIM, LAYER, N_LAYERS = 32, 16, 1, 2

# Each case: slabs of (width, rows of (row, cached, new)).
Case = Sequence[tuple[int, Sequence[tuple[int, int, int]]]]
CASES: dict[str, Case] = {
    "one row decodes": [(1, [(0, 17, 1)])],
    "first token of all": [(4, [(i, 0, 1) for i in range(4)])],
    "equal lengths": [(8, [(i, 21, 1) for i in range(8)])],
    "unequal lengths": [(8, [(i, 3 * i, 1) for i in range(8)])],
    "out of order": [(8, [(i, (5 * i) % 11, 1) for i in (6, 0, 7, 3, 1, 2, 5, 4)])],
    "holes": [(8, [(1, 9, 1), (4, 2, 1), (5, 9, 1)])],
    "a hole beside first tokens": [(4, [(0, 0, 1), (3, 0, 1)])],
    "whole prompts side by side": [(4, [(0, 0, 13), (1, 0, 13), (2, 0, 13)])],
    "prompts apart": [(4, [(0, 0, 13), (2, 0, 13)])],
    "later chunks": [(2, [(0, 14, 9), (1, 14, 9)])],
    "chunks of unlike starts": [(2, [(0, 14, 9), (1, 3, 9)])],
    "decode between prompts": [(4, [(0, 5, 1), (1, 0, 7), (2, 40, 2), (3, 8, 1)])],
    "a prompt is longer than the decoding rows": [(4, [(0, 5, 1), (1, 20, 9), (2, 7, 1)])],
    "several slabs": [
        (1, [(0, 70, 1)]),
        (8, [(7, 9, 1), (2, 4, 1)]),
        (2, [(1, 33, 20)]),
        (16, [(i, 1, 1) for i in range(16)]),
    ],
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


class Window:
    """A sub-batch whose prefix has come down as `HostKV.prefix` says; all else is NaN."""

    def __init__(
        self, case: Case, n_kv_heads: int, group: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.random = torch.Generator().manual_seed(7)
        self.n_kv_heads, self.group, self.dtype = n_kv_heads, group, dtype
        format = KV_FORMATS[str(dtype).removeprefix("torch.")]
        self.spec = KVSpec(N_LAYERS, n_kv_heads, HEAD_DIM, format, CHUNK_TOKENS, "position")
        self.slabs: dict[int, Slab] = {}
        works: list[RowWork] = []
        n_chunks = 0
        for slab_id, (width, rows) in enumerate(case):
            slab = self.slabs[slab_id] = Slab(slab_id, width, CHUNK_TOKENS // width)
            n = slab.missing_chunks(max(start + n_new for _, start, n_new in rows))
            slab.chunks = list(reversed(range(n_chunks, n_chunks + n)))
            n_chunks += n
            for row, start, n_new in rows:
                request = Request(f"{slab_id}-{row}", [], SamplingParams(), print)
                works.append(RowWork(request, slab_id, row, start, n_new, samples=True))
        self.plan = SubBatchPlan(tuple(works))
        self.host = HostKV(self.spec, n_chunks)
        self.past = [self._numbers(w.start, 2, n_kv_heads) for w in works]
        for work, tokens in zip(works, self.past, strict=True):
            self._poke(work, tokens)
        self.memory = self._fetched(n_chunks)
        fused = self._numbers(self.plan.n_tokens, (group + 2) * n_kv_heads)
        n_q = group * n_kv_heads
        self.q, self.k, self.v = fused.split((n_q, n_kv_heads, n_kv_heads), dim=1)

    def _numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEAD_DIM, generator=self.random).to(self.dtype)

    def _poke(self, work: RowWork, tokens: torch.Tensor) -> None:
        """Put cached tokens (n, 2, Hk, D) of a row where they belong on the host, one by one."""
        width, slab = self.slabs[work.slab].width, self.slabs[work.slab]
        shape = (N_LAYERS, slab.positions_per_chunk, 2, width, self.n_kv_heads, HEAD_DIM)
        for position, token in enumerate(tokens):
            chunk, within = divmod(position, slab.positions_per_chunk)
            start = slab.chunks[chunk] * self.spec.chunk_bytes
            memory = self.host.memory[start : start + self.spec.chunk_bytes]
            memory.view(self.dtype).view(shape)[LAYER, within, :, work.row] = token

    def _fetched(self, n_chunks: int) -> torch.Tensor:
        n_bytes = n_chunks * self.spec.chunk_layer_bytes
        window = torch.full((n_bytes,), 0xFF, dtype=torch.uint8)
        offset = self.host.region(LAYER).offset_bytes
        for part in self.host.prefix(self.plan, self.slabs):
            source = self.host.memory[offset + part.host_offset_bytes :][: part.size_bytes]
            window[part.window_offset_bytes :][: part.size_bytes] = source
        return window

    @property
    def region(self) -> KVRegion:
        return KVRegion(self.memory, 0)

    @property
    def table(self) -> RowTable:
        return self.host.window_table(self.plan, self.slabs)

    def expected(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        counts = [w.n_new for w in self.plan.rows]
        new = torch.stack((self.k, self.v), dim=1).double().split(counts)
        queries = self.q.double().split(counts)
        return np.concatenate(
            [
                causal(q.numpy(), torch.cat((past.double(), tokens)).numpy())
                for q, past, tokens in zip(queries, self.past, new, strict=True)
            ]
        )

    def attended(self, ops: Ops) -> torch.Tensor:
        table = ops.prepare(self.table, self.spec)
        ops.append(self.region, table, self.k, self.v)
        return ops.attend(self.region, table, self.q, self.n_kv_heads).clone()


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cache_seqlens: torch.Tensor, causal: bool
) -> torch.Tensor:
    """What flash_attn_with_kvcache promises, row by row; it never looks beyond a row's length."""
    assert causal and cache_seqlens.dtype == torch.int32
    from tests.engine.test_ops import causal as by_definition

    rows = []
    for query, keys, values, n in zip(q, k, v, cache_seqlens.tolist(), strict=True):
        n_new = len(query)
        if n < n_new or not torch.isfinite(keys[:n].float()).all():  # takes no part
            rows.append(torch.full_like(query.reshape(n_new, -1), torch.nan))
            continue
        kv = torch.stack((keys[:n], values[:n]), dim=1).double().numpy()
        rows.append(torch.from_numpy(by_definition(query.double().numpy(), kv)).to(q.dtype))
    return torch.stack(rows).view(q.shape)


MAKERS = {
    "sdpa": lambda dtype: DeviceOps(SimDevice(), dtype),
    "flash": lambda dtype: DeviceOps(SimDevice(), dtype, flash),
}
every_kernel = pytest.mark.parametrize("kernel", MAKERS)


@every_case
@every_kernel
@pytest.mark.parametrize(("n_kv_heads", "group"), [(3, 1), (2, 4)])
def test_attention_is_exact_whatever_lies_beside_the_rows(
    case: Case, kernel: str, n_kv_heads: int, group: int
) -> None:
    window = Window(case, n_kv_heads, group)
    found = window.attended(MAKERS[kernel](torch.float32))
    assert relative_error(found, window.expected()) <= 1e-5


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_they_are(case: Case, dtype: torch.dtype) -> None:
    window = Window(case, 2, 2, dtype)
    found = window.attended(DeviceOps(SimDevice(), dtype))
    assert found.dtype == dtype
    assert relative_error(found, window.expected()) <= 4 * torch.finfo(dtype).eps


@every_case
def test_the_torch_twin_agrees(case: Case) -> None:
    expected = Window(case, 2, 2).attended(TorchOps())
    found = Window(case, 2, 2).attended(DeviceOps(SimDevice(), torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_case
def test_append_leaves_what_is_cached_alone(case: Case) -> None:
    window, ops = Window(case, 2, 1), DeviceOps(SimDevice(), torch.float32)
    expected = Window(case, 2, 1)
    TorchOps().append(expected.region, expected.table, expected.k, expected.v)
    ops.append(window.region, ops.prepare(window.table, window.spec), window.k, window.v)
    known = ~expected.memory.view(torch.float32).isnan()
    assert torch.equal(
        window.memory.view(torch.float32)[known], expected.memory.view(torch.float32)[known]
    )


def test_cached_rows_beside_short_ones_are_not_cleared() -> None:
    """The longest decoding row ends where another row's cache goes on."""
    window = Window(CASES["a prompt is longer than the decoding rows"], 1, 1)
    assert not any(g.has_unwritten for g in group_rows(window.table, window.spec))


@every_case
def test_every_token_is_in_one_group(case: Case) -> None:
    window = Window(case, 1, 1)
    groups = group_rows(window.table, window.spec)
    n_tokens = window.plan.n_tokens
    tokens = np.concatenate([g.results for g in groups])
    assert sorted(tokens[tokens < n_tokens].tolist()) == list(range(n_tokens))
    for group in groups:
        takes_part = group.results < n_tokens
        assert (group.queries == group.results)[takes_part].all()
        assert takes_part.all() or group.n_new == 1


GROUPS_OF = {
    "equal lengths": [(8, 1, 22)],
    "holes": [(5, 1, 10)],
    "whole prompts side by side": [(3, 13, 13)],
    "prompts apart": [(1, 13, 13), (1, 13, 13)],
    "chunks of unlike starts": [(1, 9, 12), (1, 9, 23)],
    "decode between prompts": [(4, 1, 9), (1, 2, 42), (1, 7, 7)],
}


@pytest.mark.parametrize("name", GROUPS_OF)
def test_groups_are_as_large_as_may_be(name: str) -> None:
    window = Window(CASES[name], 1, 1)
    groups = group_rows(window.table, window.spec)
    assert [(g.n_rows, g.n_new, g.n_context) for g in groups] == GROUPS_OF[name]


def is_view(index: slice | torch.Tensor) -> bool:
    return isinstance(index, slice)


def test_rows_in_order_are_taken_without_a_gather() -> None:
    ops = DeviceOps(SimDevice(), torch.float32)
    window = Window(CASES["equal lengths"], 1, 1)
    (batch,) = ops.prepare(window.table, window.spec).batches
    assert is_view(batch.queries) and is_view(batch.results) and batch.bias is None
    window = Window(CASES["out of order"], 1, 1)
    (batch,) = ops.prepare(window.table, window.spec).batches
    assert not is_view(batch.queries) and not is_view(batch.results)


class CountingDevice(SimDevice):
    n_uploads = 0

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        self.n_uploads += 1
        return super().upload(tensor)


@every_case
def test_a_table_goes_to_the_device_in_one_copy(case: Case) -> None:
    device = CountingDevice()
    ops, window = DeviceOps(device, torch.float32), Window(case, 1, 1)
    table = ops.prepare(window.table, window.spec)
    ops.append(window.region, table, window.k, window.v)
    ops.attend(window.region, table, window.q, 1)
    assert isinstance(table, DeviceTable)
    assert device.n_uploads == 1


def test_a_slab_in_pieces_is_a_mistake() -> None:
    window = Window([(1, [(0, 70, 1)])], 1, 1)
    table = window.table
    broken = RowTable(table.rows, table.chunks * np.array([1, 2, 1]), table.format)
    with pytest.raises(AssertionError, match="in one piece"):
        group_rows(broken, window.spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_twins(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    found = DeviceOps(SimDevice(), dtype).rms_norm(x, weight, 1e-5)
    expected = TorchOps(torch.float64).rms_norm(x.double(), weight.double(), 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-2)


def test_the_ops_of_a_device_are_chosen() -> None:
    ops = choose_ops("bfloat16", 1, device=SimDevice())
    assert isinstance(ops, DeviceOps) and ops.dtype == torch.bfloat16
    assert ops.name == "torch on sim"


def test_flash_attention_is_for_gpus_and_16_bits() -> None:
    assert find_flash_attention(torch.device("cpu"), torch.bfloat16) is None
    assert find_flash_attention(torch.device("cuda"), torch.float32) is None


def scored(scoring: Scoring, case: Case, ops: DeviceOps) -> tuple[torch.Tensor, torch.Tensor]:
    """What is found and what is right, in float64 by definition."""
    window = Window(case, 2, 3)
    table = ops.prepare(window.table, window.spec)
    ops.append(window.region, table, window.k, window.v)
    found = ops.attend(window.region, table, window.q, 2, scoring)
    counts = [w.n_new for w in window.plan.rows]
    new = torch.stack((window.k, window.v), dim=1).double().split(counts)
    rows = zip(window.q.double().split(counts), window.past, new, strict=True)
    expected = [
        causal(q.numpy(), torch.cat((past.double(), tokens)).numpy(), scoring)
        for q, past, tokens in rows
    ]
    return found, torch.from_numpy(np.concatenate(expected))


SLOPES = torch.tensor([0.5, 0.03, -0.1, 0.0, 1.0, 0.2])
SCORINGS = {
    "scale": Scoring(scale=0.3),
    "window": Scoring(window=6),
    "softcap": Scoring(softcap=0.7),
    "slopes": Scoring(slopes=SLOPES),
    "everything": Scoring(scale=0.2, window=9, softcap=2.0, slopes=SLOPES),
}
every_scoring = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=list(SCORINGS))


@every_case
@every_scoring
def test_scores_are_those_of_the_definition(case: Case, scoring: Scoring) -> None:
    found, expected = scored(scoring, case, DeviceOps(SimDevice(), torch.float32))
    assert relative_error(found, expected.numpy()) <= 1e-5


@every_scoring
def test_flash_attention_is_told_what_scores_are(scoring: Scoring) -> None:
    """Its window counts tokens to the left of the query's own, and 0 is no cap."""

    def flash_like(q, k, v, *, cache_seqlens, causal, **told):  # type: ignore[no-untyped-def]
        left, right = told.pop("window_size")
        assert right == (0 if left >= 0 else -1)
        understood = Scoring(
            scale=told.pop("softmax_scale"),
            window=None if left < 0 else left + 1,
            softcap=told.pop("softcap") or None,
            slopes=told.pop("alibi_slopes"),
        )
        assert not told
        rows = [
            by_definition(
                query.double().numpy(),
                torch.stack((keys[:n], values[:n]), dim=1).double().numpy(),
                understood,
            )
            for query, keys, values, n in zip(q, k, v, cache_seqlens.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(q.dtype).view(q.shape)

    by_definition = causal
    ops = DeviceOps(SimDevice(), torch.float32, flash_like)
    found, expected = scored(scoring, CASES["unequal lengths"], ops)
    assert relative_error(found, expected.numpy()) <= 1e-5
