"""A batch job killed again and again: every line ends once, and says what it says undisturbed.

Usage: scripts/prove kills [--kills N] [--lines N] [--rows N] [--seed N]

Runs `sl-serve run-batch smollm2 --resume` on short requests and ends it with SIGKILL at random
moments, 50 times: while it loads, checks its input, runs, commits. Then lets it finish. Fails when
a line is missing, doubled or torn in the output, when a life had to do again more than what was in
flight, or when a sample of the lines differs from a run of those lines alone, undisturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from server.batch.feeder import ROWS_IN_FLIGHT  # noqa: E402

PROGRAM = "from sl_serve.cli import main; main()"
SAMPLE = 100
RECOVERED = re.compile(r"batch_lines_recovered.*lines=(\d+)")
WORDS = [
    "river",
    "stone",
    "winter",
    "lamp",
    "garden",
    "letter",
    "bridge",
    "music",
    "silver",
    "morning",
]


def requests(n: int, rng: random.Random) -> list[dict[str, Any]]:
    """Prompts of unequal length, some lines with a seed of their own."""
    entries = []
    for i in range(n):
        body: dict[str, Any] = {
            "model": "smollm2",
            "prompt": " ".join(rng.choices(WORDS, k=rng.randrange(2, 24))),
            "max_tokens": rng.randrange(2, 13),
        }
        if i % 3 == 0:
            body["seed"] = i
        entry = {"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions"}
        entries.append(entry | {"body": body})
    return entries


class Job:
    """One command, life after life."""

    def __init__(self, folder: Path, name: str, entries: list[dict[str, Any]], rows: int) -> None:
        source = folder / f"{name}-in.jsonl"
        source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        self.output = folder / f"{name}.jsonl"
        options = ["-i", str(source), "-o", str(self.output), "--resume", "--seed", "11"]
        small = ["--max-rows", str(rows), "--kv-memory", "256MiB"]
        arguments = ["run-batch", "smollm2", *options, *small]
        self._command = [sys.executable, "-c", PROGRAM, *arguments]
        self._database = folder / f"{name}.jsonl.run" / "jobs.sqlite"
        self._log = folder / f"{name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)

    def n_ended(self) -> int:
        """Lines with a result, as the disk has them."""
        try:
            with sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=1) as database:
                (n,) = database.execute("SELECT count(*) FROM results").fetchone()
            return int(n)
        except sqlite3.Error:
            return 0  # not there yet

    def kill(self, rng: random.Random, more_lines: int) -> None:
        """SIGKILL at a random moment after so many lines more have ended."""
        with self.start() as process:
            target = self.n_ended() + more_lines
            while self.n_ended() < target and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 8 if more_lines == 0 else 0.3))
            assert process.poll() is None, f"it ended by itself: {self.log()[-2000:]}"
            process.send_signal(signal.SIGKILL)

    def finish(self) -> list[dict[str, Any]]:
        with self.start() as process:
            code = process.wait()
        assert code == 0, self.log()[-2000:]
        raw = self.output.read_bytes()
        assert raw.endswith(b"\n")
        return [json.loads(entry) for entry in raw.splitlines()]

    def log(self) -> str:
        return self._log.read_text(errors="replace")


def texts(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {e["custom_id"]: e["response"]["body"]["choices"][0]["text"] for e in entries}


def main() -> int:
    args = _arguments()
    rng, console = random.Random(args.seed), Console()
    entries = requests(args.lines, rng)
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as bar:
        job = Job(Path(scratch), "killed", entries, args.rows)
        task = bar.add_task("kills", total=args.kills)
        for n_left in range(args.kills, 0, -1):
            share = (args.lines - job.n_ended()) / (n_left + 1)
            job.kill(rng, rng.randrange(int(share) + 1))
            bar.advance(task)
        bar.update(task, description="the rest")
        ended = job.finish()
        sample = rng.sample(entries, min(SAMPLE, len(entries)))
        bar.update(task, description="a sample, undisturbed")
        alone = Job(Path(scratch), "sample", sample, 2 * args.rows).finish()
        recovered = [int(n) for n in RECOVERED.findall(job.log())]
    failures = []
    if [e["custom_id"] for e in ended] != [e["custom_id"] for e in entries]:
        failures.append(f"{len(ended)} lines came out, in another order or not those that went in")
    if max(recovered, default=0) > ROWS_IN_FLIGHT * args.rows:
        failures.append(f"a life did {max(recovered)} lines again")
    said, expected = texts(ended), texts(alone)
    differing = [name for name, text in expected.items() if said.get(name) != text]
    if differing:
        failures.append(
            f"{len(differing)} of {len(expected)} sampled lines differ: {differing[:5]}"
        )
    console.print(
        f"{args.kills} kills, {len(ended)} lines each once, {sum(recovered)} done again in "
        f"{len(recovered)} lives (at most {max(recovered, default=0)} of "
        f"{ROWS_IN_FLIGHT * args.rows} in flight), {len(expected) - len(differing)} of "
        f"{len(expected)} sampled lines equal to an undisturbed run"
    )
    for failure in failures:
        console.print(failure, style="bold red")
    return int(bool(failures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
