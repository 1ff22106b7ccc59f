"""Everything at once for long: 100,000 requests; nothing grows, nothing gets stuck.

Usage: scripts/prove soak [--requests N] [--seed N] [--bytes-per-request N]

Streams and whole answers, clients that leave, malformed requests and tokenising, 24 at a time, on a
tiny model. Told are outcomes, memory, open files and threads. Over the second half memory in use
may grow by so many bytes per request, resident memory by a fifth, threads by two; when all clients
have gone, no more files may be open than before.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e.serving import tiny_folder
from tests.e2e.soak import Soak, soak


def main() -> int:
    args = _arguments()
    console = Console()
    with tiny_folder() as folder, Progress(console=console) as bar:
        task = bar.add_task("requests", total=args.requests)
        found = asyncio.run(soak(folder, args.requests, args.seed, lambda: bar.advance(task)))
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for complaint in found.complaints[:20]:
        tell(complaint)
    for sample in found.samples[:: max(1, len(found.samples) // 10)]:
        tell(
            f"{sample.n_requests:8} requests: {sample.in_use_bytes / 2**20:7.2f} MiB in use, "
            f"{sample.resident_bytes / 2**20:7.1f} MiB resident, "
            f"{sample.n_files:3} files, {sample.n_threads:3} threads"
        )
    outcomes = ", ".join(f"{n} {kind}" for kind, n in sorted(found.outcomes.items()))
    tell(f"{outcomes}; {len(found.complaints)} went wrong")
    tell(
        f"memory in use grows by {found.bytes_per_request:.1f} bytes per request, resident memory "
        f"by {100 * found.resident_growth:.1f} % over the second half; {found.n_files_left} files "
        "are left open"
    )
    grows = found.bytes_per_request > args.bytes_per_request or found.resident_growth > 0.2
    return int(bool(found.complaints) or grows or _leaks(found))


def _leaks(found: Soak) -> bool:
    first, last = found.samples[len(found.samples) // 2], found.samples[-1]
    return found.n_files_left > 0 or last.n_threads > first.n_threads + 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove soak")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes-per-request", type=float, default=100.0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
