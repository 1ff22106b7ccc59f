"""Serves the fake engine with files and batches.

python -m tests.batch.serve_fake FOLDER [STEP_S]
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path

from server.run import serve
from server.settings import ServerSettings
from sl_serve.core import Request
from tests.server.fake_engine import FakeEngine


def main() -> int:
    forgetful: deque[Request] = deque(maxlen=1)  # a large job's requests are not to be kept
    folder, *step = sys.argv[1:]
    engine = FakeEngine(
        max_rows=64,
        max_model_len=100_000,
        step_s=float(step[0]) if step else 0.0,
        submitted=forgetful,  # type: ignore[arg-type]
    )
    settings = ServerSettings(served_model_names=("toy",), port=0, jobs_dir=Path(folder))
    return serve(engine, settings, on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
