"""Everything at once, for long: does anything grow, does anything get stuck?"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil

from tests.e2e.malformed import case
from tests.e2e.serving import serving

N_CLIENTS = 24
N_SAMPLES = 40
WAIT_S = 60.0
PYTHON_BLOCK_BYTES = 64  # small objects, outside malloc: about their mean


@dataclass(frozen=True)
class Sample:
    n_requests: int
    in_use_bytes: int  # what is allocated; without what the allocator keeps for later
    resident_bytes: int
    n_files: int
    n_threads: int


@dataclass
class Soak:
    outcomes: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    n_files_left: int = 0  # more than before, when all clients have gone

    @property
    def bytes_per_request(self) -> float:
        """How memory in use grows, by least squares over the second half. Resident memory would
        not do: it is a system's to take away and the allocator's to keep in pieces."""
        half = self.samples[len(self.samples) // 2 :]
        return float(np.polyfit([s.n_requests for s in half], [s.in_use_bytes for s in half], 1)[0])

    @property
    def resident_growth(self) -> float:
        """Over the second half, as a share."""
        first, last = self.samples[len(self.samples) // 2], self.samples[-1]
        return last.resident_bytes / first.resident_bytes - 1


async def soak(
    folder: Path, n_requests: int, seed: int, on_answer: Callable[[], None] = lambda: None
) -> Soak:
    found, numbers = Soak(), iter(range(n_requests))
    with serving(folder) as (live, engine):
        n_files = psutil.Process().num_fds()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, limits=limits, timeout=WAIT_S) as client:

            async def one_client() -> None:
                for number in numbers:
                    await _one(client, seed, number, found)
                    on_answer()
                    if number % max(1, n_requests // N_SAMPLES) == 0:
                        found.samples.append(_sample(number))

            await asyncio.gather(*(one_client() for _ in range(N_CLIENTS)))
        assert await asyncio.to_thread(engine.drain, WAIT_S), "requests are stuck"
        assert engine.snapshot().kv_used_bytes == 0
        assert not live.app.state.context.jobs
        found.n_files_left = await _files_more_than(n_files)
    return found


async def _files_more_than(n_before: int) -> int:
    """Once the server has noticed who went away."""
    for _ in range(100):
        if psutil.Process().num_fds() <= n_before:
            return 0
        await asyncio.sleep(0.1)
    return psutil.Process().num_fds() - n_before


def _sample(n_requests: int) -> Sample:
    process = psutil.Process()
    resident_bytes = process.memory_info().rss
    return Sample(
        n_requests,
        _in_use_bytes() or resident_bytes,
        resident_bytes,
        process.num_fds(),
        threading.active_count(),
    )


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2`, see mallinfo(3)."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def _in_use_bytes() -> int:
    """malloc's, of all its arenas, and Python's own blocks; 0 without glibc 2.33."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    gc.collect()
    libc.mallinfo2.restype = _MallInfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd + PYTHON_BLOCK_BYTES * sys.getallocatedblocks())


async def _one(client: httpx.AsyncClient, seed: int, number: int, found: Soak) -> None:
    rng = random.Random(f"{seed},{number}")
    kind = rng.choices(["answered", "left", "refused", "tokenised"], [6, 2, 1, 1])[0]
    try:
        expected = {"answered": 200, "tokenised": 200, "left": 200, "refused": 400}[kind]
        status = await asyncio.wait_for(_send(client, kind, rng, seed, number), WAIT_S)
        if status not in (None, expected):
            found.complaints.append(f"{number}: {kind} with {status}")
    except Exception as error:
        found.complaints.append(f"{number}: {kind}: {type(error).__name__} {error}")
    found.outcomes[kind] += 1


async def _send(
    client: httpx.AsyncClient, kind: str, rng: random.Random, seed: int, number: int
) -> int | None:
    if kind == "tokenised":
        text = "x" * rng.randrange(200)
        return (await client.post("/tokenize", json={"prompt": text})).status_code
    if kind == "refused":
        odd = case(seed, number)
        status = (await client.request(odd.method, odd.path, content=odd.raw)).status_code
        return None if odd.may_pass or status < 500 else status
    body = {
        "prompt": "x" * rng.randrange(1, 60),
        "n": rng.randrange(1, 3),
        "max_tokens": rng.randrange(1, 12),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice([0, 1]),
    }
    if kind == "left":
        try:
            async with asyncio.timeout(rng.uniform(0, 0.1)):
                return (await client.post("/v1/completions", json=body)).status_code
        except TimeoutError:
            return None
    return (await client.post("/v1/completions", json=body)).status_code
