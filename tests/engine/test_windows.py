"""New tokens on their way up: where the table says they belong is where they land."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from sl_serve.core import Request, RowWork, SamplingParams, SubBatchPlan
from sl_serve.device import SimDevice
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.host import HostKV
from sl_serve.kv.layout import HOST_STAGING_BUFFERS, KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.windows import WindowedKV
from sl_serve.ops import TorchOps
from sl_serve.ops.device_ops import DeviceOps
from tests.engine.test_cuda_ops import CASES, HEAD_DIM, LAYER, Case, Window

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scattered_tokens_lie_where_the_twin_appends_them(case: Case, dtype: torch.dtype) -> None:
    window, twin = Window(case, 2, 1, dtype), Window(case, 2, 1, dtype)
    table = window.host.table(window.plan, window.slabs)
    tokens = torch.stack((window.k, window.v), dim=1).view(-1).view(torch.uint8)
    window.host.scatter(LAYER, table.new_token_offsets(), tokens)
    TorchOps(dtype).append(twin.host.region(LAYER), table, twin.k, twin.v)
    assert torch.equal(window.host.memory, twin.host.memory)


@every_case
def test_offsets_follow_rows_chunks_and_positions(case: Case) -> None:
    window = Window(case, 3, 1)
    spec, found = window.spec, []
    for work in window.plan.rows:
        slab = window.slabs[work.slab]
        strides = spec.strides(slab.width)
        for position in range(work.start, work.stop):
            chunk, within = divmod(position, slab.positions_per_chunk)
            keys = slab.chunks[chunk] * spec.chunk_bytes + work.row * strides.row
            keys += within * strides.position
            found.append([keys, keys + strides.kv])
    table = window.host.table(window.plan, window.slabs)
    assert table.new_token_offsets().tolist() == found


N_LAYERS, N_HEADS, WIDTH = 5, 2, 4
SPEC = KVSpec(N_LAYERS, N_HEADS, HEAD_DIM, KV_FORMATS["float32"], 32, "position")


def sub_batches(slabs: Sequence[Slab], position: int) -> list[SubBatchPlan]:
    """One per slab, each row with one more token."""
    request = Request("r", [], SamplingParams(), print)
    return [
        SubBatchPlan(
            tuple(RowWork(request, s.slab_id, row, position, 1, True) for row in range(WIDTH))
        )
        for s in slabs
    ]


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("n_slabs", [1, 3])
@pytest.mark.parametrize("n_kinds", [1, 2])
def test_what_leaves_in_a_step_comes_down_in_the_next(
    look_ahead: int, n_slabs: int, n_kinds: int
) -> None:
    """More cells than staging buffers, over steps that cross a chunk."""
    assert N_LAYERS > HOST_STAGING_BUFFERS
    spec = replace(SPEC, n_kinds=n_kinds)
    shape = (N_LAYERS, 32 // WIDTH, n_kinds, WIDTH, N_HEADS, HEAD_DIM)  # of a chunk
    n_steps = 32 // WIDTH + 3
    slabs = [Slab(i, WIDTH, 32 // WIDTH) for i in range(n_slabs)]
    for slab in slabs:
        slab.chunks = [slab.slab_id, n_slabs + slab.slab_id]
    device, host = SimDevice(), HostKV(spec, 2 * n_slabs)
    ops = DeviceOps(device, torch.float32)
    kv = WindowedKV(device, ops, host, torch.float32, look_ahead, WIDTH, 2)
    random = torch.Generator().manual_seed(3)
    written: dict[
        tuple[int, int, int], torch.Tensor
    ] = {}  # (layer, slab, position) -> (kinds, rows..)
    for position in range(n_steps):
        plans = sub_batches(slabs, position)
        kv.begin(plans, {s.slab_id: s for s in slabs})
        for cell in range(N_LAYERS * n_slabs):
            layer, slab_id = divmod(cell, n_slabs)
            region, table = kv.open(cell)
            # With the prefix down, the window's slab is (positions, kinds, width, Hk, D).
            seen = region.memory.view(torch.float32).view(-1, *shape[2:])
            for earlier in range(position):
                assert torch.equal(seen[earlier], written[layer, slab_id, earlier])
            kinds = torch.randn(n_kinds, WIDTH, N_HEADS, HEAD_DIM, generator=random)
            k, v = kinds[0], kinds[-1]
            written[layer, slab_id, position] = kinds
            ops.append(region, table, k, v)
            kv.close(cell, k, v)
    kv.begin([], {})  # the last arrivals are put in their places
    memory = host.memory.view(torch.float32).view(2, n_slabs, *shape)
    for (layer, slab_id, position), tokens in written.items():
        chunk, within = divmod(position, shape[1])
        assert torch.equal(memory[chunk, slab_id, layer, within], tokens)
    token_bytes = n_kinds * N_HEADS * HEAD_DIM * 4
    assert kv.n_bytes_up == n_steps * N_LAYERS * n_slabs * WIDTH * token_bytes
    n_cached = np.arange(n_steps).sum()
    assert kv.n_bytes_down == n_cached * N_LAYERS * n_slabs * WIDTH * token_bytes
