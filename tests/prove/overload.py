"""Ten times as many clients as the queue takes: 200 or 429, all accepted finish, memory is steady.

Usage: scripts/prove overload [--requests N] [--growth SHARE]

Memory is that of the whole process, clients included, from a quarter of the way to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e.overload import overload
from tests.e2e.serving import tiny_folder


def main() -> int:
    args = _arguments()
    console = Console()
    with tiny_folder() as folder, Progress(console=console) as bar:
        task = bar.add_task("requests", total=args.requests)
        load = asyncio.run(overload(folder, args.requests, lambda: bar.advance(task)))
    for complaint in load.complaints[:20]:
        console.print(complaint, markup=False)
    shares = ", ".join(f"{status}: {n}" for status, n in sorted(load.statuses.items()))
    console.print(f"{load.statuses.total()} answers ({shares}), {len(load.complaints)} wrong")
    console.print(f"memory grew by {load.growth:.2%} to {max(load.rss_bytes) / 2**20:.0f} MiB")
    return int(bool(load.complaints) or load.growth > args.growth)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove overload")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--growth", type=float, default=0.05, help="the most that passes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
