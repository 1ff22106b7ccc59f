"""More requests than the queue takes, for long: refused or served, and memory stays what it was."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from sl_serve.config import QueueConfig
from tests.e2e.serving import serving
from tests.engine.running import config

N_ROWS, QUEUE_REQUESTS = 4, 8
SETTINGS = replace(
    config(max_rows=N_ROWS, n_sub_batches=2, prefill_chunk_tokens=64),
    queue=QueueConfig(QUEUE_REQUESTS, 10_000),
)
TIMES = 10  # as many clients as ten full queues


@dataclass
class Load:
    statuses: Counter[int] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)  # after every twentieth of the requests

    @property
    def growth(self) -> float:
        """Of memory, from a quarter of the way, when all buffers exist, to the end."""
        return max(self.rss_bytes[-3:]) / max(self.rss_bytes[: len(self.rss_bytes) // 4]) - 1


async def overload(
    folder: Path, n_requests: int, on_answer: Callable[[], None] = lambda: None
) -> Load:
    load, numbers = Load(), iter(range(n_requests))
    with serving(folder, SETTINGS) as (live, engine):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, limits=limits, timeout=60) as client:

            async def one_client() -> None:
                for number in numbers:
                    await _ask(client, number, load)
                    on_answer()
                    if number % (n_requests // 20) == 0:
                        load.rss_bytes.append(psutil.Process().memory_info().rss)

            await asyncio.gather(*(one_client() for _ in range(TIMES * QUEUE_REQUESTS)))
        assert await asyncio.to_thread(engine.drain, 30)
        assert engine.snapshot().kv_used_bytes == 0
        assert not live.app.state.context.jobs
    return load


async def _ask(client: httpx.AsyncClient, number: int, load: Load) -> None:
    n_tokens = 2 + number % 5
    body = {"prompt": "abc", "max_tokens": n_tokens, "stream": number % 2 == 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    load.statuses[answer.status_code] += 1
    if answer.status_code == 429:
        wait_s = answer.headers.get("retry-after", "")
        if not (wait_s.isdecimal() and 1 <= int(wait_s) <= 120):
            load.complaints.append(f"429 with Retry-After {wait_s!r}")
    elif answer.status_code != 200:
        load.complaints.append(f"{answer.status_code}: {answer.text[:200]}")
    elif '"finish_reason":"length"' not in answer.text:
        load.complaints.append(f"unfinished: {answer.text[-200:]}")
