"""Malformed requests: 10,000 of many kinds get a 4xx in OpenAI's shape and change nothing.

Usage: scripts/prove malformed [--cases N] [--seed N] [--case N]

A server on a tiny model is sent truncated, deep, huge and mistyped bodies, numbers that are none,
token ids that do not exist, and hostile patterns, schemas and templates. It must never fail
(5xx), and a good request afterwards must be answered as before, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e.malformed import GOOD, case, complaint, without_ids
from tests.e2e.serving import serving, tiny_folder


def main() -> int:
    args = _arguments()
    console = Console()
    numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    statuses, n_failed = Counter[tuple[str, int]](), 0
    with (
        tiny_folder() as folder,
        serving(folder) as (live, _),
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        before = _good_answers(client)
        for number in track(numbers, "requests", console=console):
            odd = case(args.seed, number)
            answer = client.request(odd.method, odd.path, content=odd.raw)
            content_type = answer.headers.get("content-type", "")
            wrong = complaint(odd, answer.status_code, content_type, answer.text)
            statuses[odd.kind, answer.status_code] += 1
            if wrong is not None:
                n_failed += 1
                console.print(
                    f"case {number} ({odd.kind}): {wrong}: {odd.raw[:300]!r}", markup=False
                )
        same = _good_answers(client) == before
    for (kind, status), n in sorted(statuses.items()):
        console.print(f"{kind:20} {status} {n:6}")
    told = "the same" if same else "NOT the same"
    console.print(f"{len(numbers)} requests, {n_failed} failed; good answers are {told} as before")
    return int(n_failed > 0 or not same)


def _good_answers(client: httpx.Client) -> list[bytes]:
    return [without_ids(client.post(path, json=body).content) for path, body in GOOD.items()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove malformed")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat this one alone")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
