"""What scripts/demo shows: a server on a small model, one answer, a crowd of requests, figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from clients.answers import Completion
from clients.bulk import Outcome, run_bulk
from clients.client import Client
from clients.protocol import Call, ClientError, chat_call, completion_call
from clients.server_process import server_process
from sl_serve.errors import UserError

MODEL = "smollm2"
READY_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
N_REQUESTS = 64
QUESTION = "In two sentences: why is the sky blue?"

_SUBJECTS = ["a lighthouse", "the first train", "a clockmaker", "rain in the desert"]
_FACTS = [
    "It stood at the edge of the town, where the road ends.",
    "Nobody remembered who had built it, or when.",
    "In winter the wind came straight from the sea.",
    "The children said that it could be heard at night.",
    "An old map showed it in another place.",
    "Every visitor told a different story about it.",
]


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of the server, or of a stretch of its life."""

    prompt_tokens: float
    generated_tokens: float
    steps: float
    step_s: float
    weight_bytes: float

    def since(self, start: Counters) -> Counters:
        return Counters(
            self.prompt_tokens - start.prompt_tokens,
            self.generated_tokens - start.generated_tokens,
            self.steps - start.steps,
            self.step_s - start.step_s,
            self.weight_bytes - start.weight_bytes,
        )


def read_counters(url: str) -> Counters:
    """From the server's /metrics."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=30.0, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        raise ClientError(f"cannot read {url}/metrics: {error}") from error
    return parse_counters(text)


def parse_counters(text: str) -> Counters:
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def total(name: str, **labels: str) -> float:
        found = [
            s.value
            for s in samples
            if s.name == f"sl_serve_{name}" and labels.items() <= s.labels.items()
        ]
        if not found:
            raise ClientError(f"the server's metrics have no sl_serve_{name}")
        return sum(found)

    return Counters(
        prompt_tokens=total("prompt_tokens_total"),
        generated_tokens=total("generation_tokens_total"),
        steps=total("step_seconds_count"),
        step_s=total("step_seconds_sum"),
        weight_bytes=total("host_to_device_bytes_total", kind="weights"),
    )


def crowd() -> list[Call]:
    """Completions of unequal prompt and output length."""
    calls = []
    for i in range(N_REQUESTS):
        facts = " ".join(_FACTS[: 1 + i % len(_FACTS)])
        prompt = f"A story about {_SUBJECTS[i % len(_SUBJECTS)]}. {facts} Then, one morning,"
        max_tokens = 16 + 29 * i % 81
        calls.append(completion_call(prompt, max_tokens=max_tokens, temperature=0.7, seed=i))
    return calls


def show_chat(console: Console, url: str) -> None:
    """One answer, as it is written."""
    console.print(f"[bold]> {QUESTION}[/bold]")
    call = chat_call([{"role": "user", "content": QUESTION}], max_tokens=80, temperature=0)
    with Client(url) as client, client.stream(call) as stream:
        for piece in stream:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def show_answers(console: Console, calls: Sequence[Call], outcomes: Sequence[Outcome]) -> None:
    """The first few answers; raises ClientError if any request failed."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, ClientError)]
    if failures:
        raise ClientError(f"{len(failures)} of {len(outcomes)} requests failed: {failures[0]}")
    for call, outcome in list(zip(calls, outcomes, strict=True))[:3]:
        assert isinstance(outcome, Completion)
        console.print(f"[dim]{call.body['prompt']}[/dim]", end="")
        console.print(outcome.text, markup=False, highlight=False)


def compute_bound_s(model: Path, counters: Counters, n_requests: int) -> float:
    """Seconds that the matrix multiplications of this work take at the rate measured now."""
    from bench.bound import bound_s, measure_rates, model_matrices, read_model_config

    matrices = model_matrices(read_model_config(model))
    rates = measure_rates(matrices, [256], repeats=3)
    # The last generated token of a request is never fed back.
    layer_rows = counters.prompt_tokens + counters.generated_tokens - n_requests
    return bound_s(matrices, rates, round(layer_rows), round(counters.generated_tokens))


def figures(counters: Counters, wall_s: float, bound_s: float) -> Mapping[str, str]:
    """The last table's rows."""
    return {
        "requests": str(N_REQUESTS),
        "prompt tokens": f"{counters.prompt_tokens:.0f}",
        "generated tokens": f"{counters.generated_tokens:.0f}",
        "generated tokens/s": f"{counters.generated_tokens / wall_s:.1f}",
        "steps": f"{counters.steps:.0f}",
        "mean step": f"{1000 * counters.step_s / counters.steps:.0f} ms",
        "weight bytes per step": f"{counters.weight_bytes / counters.steps / 1e6:.1f} MB",
        "share of the compute bound": f"{bound_s / wall_s:.0%}",
    }


def run_demo(console: Console, model: Path, command: Sequence[str]) -> None:
    """Raises ClientError with the reason if any part does not work."""
    calls = crowd()
    with server_process(command) as server:
        with console.status("starting the server"):
            ready_s = server.wait_ready(READY_LIMIT_S)
        console.print(f"[green]ready[/green] at {server.url} after {ready_s:.1f} s\n")
        show_chat(console, server.url)
        console.print(f"\n[bold]{N_REQUESTS} requests at once[/bold]")
        before, start = read_counters(server.url), time.monotonic()
        outcomes = run_bulk(calls, server.url, concurrency=N_REQUESTS)
        wall_s = time.monotonic() - start
        counters = read_counters(server.url).since(before)
        show_answers(console, calls, outcomes)
        server.stop(STOP_LIMIT_S)
    console.print("\nthe server ended with exit code 0 on SIGTERM")
    with console.status("measuring the compute bound"):
        bound_s = compute_bound_s(model, counters, N_REQUESTS)
    table = Table(show_header=False)
    for name, value in figures(counters, wall_s, bound_s).items():
        table.add_row(name, value)
    console.print(table)


def main() -> None:
    from sl_serve.weights.locate import resolve_model

    console = Console(highlight=False)
    command = [str(Path(sys.executable).with_name("sl-serve")), "serve", MODEL]
    try:
        model = resolve_model(MODEL, console.print)
        run_demo(console, model, command)
    except (ClientError, UserError) as error:
        console.print(f"demo: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
