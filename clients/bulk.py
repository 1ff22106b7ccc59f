"""Many calls at once: bounded concurrency, answers in the order of the calls, no call lost.

calls = [completion_call(prompt, max_tokens=50) for prompt in prompts]
for outcome in run_bulk(calls, url="http://127.0.0.1:8000"):
    print(outcome.text if isinstance(outcome, Completion) else f"failed: {outcome}")
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from clients.answers import Completion
from clients.async_client import AsyncClient
from clients.protocol import Call, ClientError

Outcome = Completion | ClientError


async def gather_calls(
    client: AsyncClient,
    calls: Sequence[Call],
    *,
    concurrency: int = 256,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """One outcome per call, in order; a call that failed has its error in its place.

    At most `concurrency` calls are open at once; a batching server wants many. Raises ClientError
    only before the first call: when the server cannot be asked for its model.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
    await client.model()  # once, rather than by every worker
    outcomes: dict[int, Outcome] = {}
    numbered = iter(enumerate(calls))

    async def work() -> None:
        for index, call in numbered:  # shared: every worker takes the next call
            outcomes[index] = await _outcome(client, call)
            if on_done is not None:
                on_done(outcomes[index])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(work())
    return [outcomes[index] for index in range(len(calls))]


def run_bulk(
    calls: Sequence[Call],
    url: str | None = None,
    *,
    concurrency: int = 256,
    progress: bool = True,
    **settings: Any,
) -> list[Outcome]:
    """`gather_calls` for a synchronous program, with a progress bar; `settings` as for `Client`."""

    async def run() -> list[Outcome]:
        with _progress_bar(len(calls), shown=progress) as on_done:
            async with AsyncClient(url, **settings) as client:
                return await gather_calls(client, calls, concurrency=concurrency, on_done=on_done)

    return asyncio.run(run())


async def _outcome(client: AsyncClient, call: Call) -> Outcome:
    try:
        return await client.send(call)
    except ClientError as error:
        return error


@contextmanager
def _progress_bar(n_calls: int, *, shown: bool) -> Iterator[Callable[[Outcome], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[failed]} failed"),
    )
    tokens = failed = 0
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("requests", total=n_calls, tokens=0, failed=0)

        def on_done(outcome: Outcome) -> None:
            nonlocal tokens, failed
            if isinstance(outcome, Completion):
                tokens += outcome.completion_tokens
            else:
                failed += 1
            bar.update(task, advance=1, tokens=tokens, failed=failed)

        yield on_done
