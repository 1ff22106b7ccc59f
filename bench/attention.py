"""`python -m bench attention`: attention over KV in memory, beside a bare read of the same memory.

Rows decode one token each over full contexts, in slabs as the engine cuts them; as many layers as
no cache holds. Kernel and read take turns in one process; figures are medians. One thread is timed
by what it computes, so that other programs do not count; more threads by the clock.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.machine import about_now
from sl_serve.config import ModelConfig
from sl_serve.core import Request, RowWork, SamplingParams
from sl_serve.host_memory import host_empty
from sl_serve.kv.formats import KV_FORMATS, KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable, row_table
from sl_serve.ops import KVRegion, choose_ops
from sl_serve.plan.pools import KVPools

N_ROWS, CONTEXT_TOKENS = 64, 1024
LEAST_BYTES = 192 << 20  # of all layers: more than caches hold
SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3-8b": (32, 8, 128)}  # heads, KV heads, head size
FORMATS = ("float32", "bfloat16", "int8", "int4")


def run(
    shapes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SHAPES),
    formats: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(FORMATS),
    threads: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Of kernel and read, in turns.")] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
) -> None:
    """Measure attention over KV in memory against reading that memory."""
    cases = [
        measure(shape, format, int(n_threads), rounds)
        for shape in shapes.split(",")
        for format in formats.split(",")
        for n_threads in threads.split(",")
    ]
    Console().print(_table(cases))
    if json_path is not None:
        json_path.write_text(json.dumps(about_now() | {"cases": cases}, indent=2) + "\n")


def measure(shape: str, format: str, n_threads: int, rounds: int) -> dict[str, Any]:
    n_heads, n_kv_heads, head_dim = SHAPES[shape]
    spec = _spec(n_kv_heads, head_dim, KV_FORMATS[format])
    table, memory = _rows(spec)
    ops = choose_ops("float32", n_threads)
    q = torch.randn(N_ROWS, n_heads, head_dim)
    numbers = memory.view(torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        attend_s, read_s = _medians(
            lambda: _attend_layers(ops, spec, table, memory, q),
            numbers.sum,
            rounds,
            time.thread_time if n_threads == 1 else time.perf_counter,
        )
    finally:
        torch.set_num_threads(before)
    n_tokens = spec.n_layers * N_ROWS * CONTEXT_TOKENS
    return {
        "shape": shape,
        "kv": format,
        "threads": n_threads,
        "kernel": ops.name,
        "attend_bytes_per_s": memory.nbytes / attend_s,
        "read_bytes_per_s": memory.nbytes / read_s,
        "share": read_s / attend_s,
        "row_tokens_per_s": n_tokens / attend_s,
    }


def _attend_layers(ops: Any, spec: KVSpec, table: RowTable, memory: torch.Tensor, q: Any) -> None:
    for layer in range(spec.n_layers):
        region = KVRegion(memory, layer * spec.chunk_layer_bytes)
        ops.attend(region, table, q, spec.n_kv_heads)


def _spec(n_kv_heads: int, head_dim: int, format: KVFormat) -> KVSpec:
    """As the engine would cut a pool for these rows."""
    layer_bytes = N_ROWS * CONTEXT_TOKENS * 2 * n_kv_heads * format.line_bytes(head_dim)
    model = ModelConfig(
        family="llama",
        n_layers=-(-LEAST_BYTES // layer_bytes),
        hidden_size=1,
        intermediate_size=1,
        n_heads=n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=1,
        max_positions=CONTEXT_TOKENS,
    )
    pools = KVPools(model, format, "row", format)
    return pools.spec(model.n_layers * layer_bytes)


def _rows(spec: KVSpec) -> tuple[RowTable, torch.Tensor]:
    width = spec.width_for(CONTEXT_TOKENS, N_ROWS)
    positions = spec.positions(width)
    n_chunks = -(-CONTEXT_TOKENS // positions)
    request = Request("", [], SamplingParams(), print)
    works: list[RowWork] = []
    slabs: dict[int, Slab] = {}
    for i in range(N_ROWS):
        slab = slabs.setdefault(i // width, Slab(i // width, width, positions))
        works.append(RowWork(request, slab.slab_id, i % width, CONTEXT_TOKENS - 1, 1, True))
    offsets = {s: [(s * n_chunks + c) * spec.chunk_bytes for c in range(n_chunks)] for s in slabs}
    memory = host_empty(len(slabs) * n_chunks * spec.chunk_bytes)
    memory.fill_(0x11)  # small numbers in any format
    return row_table(spec, works, slabs, offsets), memory


def _medians(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Seconds of each, in turns; a first round, which touches what is new, does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for act, found in zip((first, second), seconds, strict=True):
            start = clock()
            act()
            if i:
                found.append(clock() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _table(cases: list[dict[str, Any]]) -> Table:
    table = Table("shape", "KV", "threads", "GB/s", "read GB/s", "share", "row tokens/s")
    for case in cases:
        table.add_row(
            case["shape"],
            case["kv"],
            str(case["threads"]),
            f"{case['attend_bytes_per_s'] / 1e9:.1f}",
            f"{case['read_bytes_per_s'] / 1e9:.1f}",
            f"{case['share']:.2f}",
            f"{case['row_tokens_per_s'] / 1e6:.0f} M",
        )
    return table
