"""A measurement in a process of its own, that nothing measured before has warmed or filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from sl_serve.cli import OPENMP_SPINS

# As our command line starts: waiting threads leave the cores to those that work.
AS_OURS: Mapping[str, str] = {"GOMP_SPINCOUNT": OPENMP_SPINS}


def run_worker(
    who: str, arguments: Sequence[str], settings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `python -m bench ARGUMENTS --json FILE` writes. `settings`: environment variables for
    it, where they are not set. Raises BenchError with the last lines that a failed worker printed.
    """
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "bench", *arguments, "--json", str(answer)]
        environment = {**(settings or {}), **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise BenchError(f"{who} ended with exit code {done.returncode}: {tail}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result
