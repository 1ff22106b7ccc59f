"""Damaged checkpoint headers: 100,000 are opened or refused with one sentence, whatever they hold.

Usage: scripts/prove headers [--cases N] [--seed N] [--processes N] [--case N]

Small valid checkpoints (safetensors folders and GGUF files) are damaged: bits, lengths, offsets,
shapes, types, names, texts, JSON, whole files. Each is then opened as a start of the engine does,
every tensor is read, memory is planned and the tokenizer loaded. A case fails when this ends in
anything but success or a UserError of one printable line, takes more than 10 s or 1 GiB, or ends
the process. Failures are printed with their number; `--case N` repeats one and keeps its files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.weights.fuzz.case import damaged, judge
from tests.weights.fuzz.processes import verdicts


def main() -> int:
    from tests.weights.fuzz.make_samples import make_samples

    args = _arguments()
    console = Console()
    samples = make_samples()
    numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    if args.case is not None:
        folder = Path(tempfile.mkdtemp(prefix=f"case-{args.case}-"))
        sample = damaged(samples, args.seed, args.case)
        console.print(f"a damaged {sample.name} in {sample.write(folder)}", soft_wrap=True)
    n_accepted = n_failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        judged = verdicts(
            partial(judge, samples, args.seed, Path(scratch)), numbers, args.processes
        )
        for verdict in track(judged, "cases", len(numbers), console=console):
            n_accepted += verdict.accepted
            n_failed += bool(verdict.failure)
            if verdict.failure:
                console.print(f"case {verdict.number} (seed {args.seed}):", style="bold red")
                console.print(verdict.failure, markup=False, highlight=False, soft_wrap=True)
    n_refused = len(numbers) - n_accepted - n_failed
    console.print(
        f"{len(numbers)} cases: {n_accepted} accepted, {n_refused} refused, {n_failed} failed"
    )
    return int(n_failed > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove headers")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--case", type=int, help="repeat this one alone, and keep its files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
