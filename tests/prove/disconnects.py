"""Clients that leave: 200 of them, queued, in prefill or decoding; rows are free within 2 steps.

Usage: scripts/prove disconnects [--clients N] [--seed N]

The engine is made to take one step at a time. After each client's connection is closed it may take
two more; by then the row must be free, the memory given back, and nothing of the request be left
in the server.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e.disconnects import departures
from tests.e2e.serving import tiny_folder


def main() -> int:
    args = _arguments()
    console = Console()
    seen = Counter[tuple[str, bool, int]]()
    with tiny_folder() as folder:
        left = departures(folder, args.clients, args.seed)
        for phase, is_stream, n_steps in track(left, "clients", args.clients, console=console):
            seen[phase, is_stream, n_steps] += 1
    for (phase, is_stream, n_steps), n in sorted(seen.items()):
        how = "streamed" if is_stream else "whole"
        console.print(f"{phase:8} {how:8} free after {n_steps} steps: {n:4}")
    return int(any(n_steps > 2 for _, _, n_steps in seen))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove disconnects")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
