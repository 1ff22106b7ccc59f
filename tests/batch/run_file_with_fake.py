"""`run-batch` on the fake engine, in a process of its own that may be killed.

python -m tests.batch.run_file_with_fake INPUT OUTPUT STEP_S {sound|poison}

Prints the number of lines ended, time and again. With `poison` the process dies of every line
whose prompt is "poison".
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from server.batch.file_run import RunPaths, clear, run_file
from server.batch.service import BatchService
from server.context import ServerContext
from server.logs import configure_logging
from sl_serve.core import Request
from tests.batch.jobs import SETTINGS
from tests.server.fake_engine import FakeEngine

MAX_ROWS = 4
POISON = [256, *b"poison"]


class PoisonedEngine(FakeEngine):
    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        if any(request.prompt_ids == POISON for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    source, output, step_s, kind = sys.argv[1:]
    configure_logging(as_json=True)
    engine_kind = PoisonedEngine if kind == "poison" else FakeEngine
    engine = engine_kind(step_s=float(step_s), max_rows=MAX_ROWS)
    paths = RunPaths(Path(source), Path(output))
    paths.is_done(resume=True)
    context = ServerContext(engine, SETTINGS)
    service = context.batches = BatchService(context, paths.folder)
    print("ready", flush=True)
    batch = run_file(service, engine, paths, 3, lambda b: print(b["progress"]["lines"], flush=True))
    context.close()
    engine.close()
    clear(paths)
    return int(batch.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
