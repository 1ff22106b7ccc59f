"""The server's own schema: 2,000 generated requests, fitting and not; answers are as described.

Usage: scripts/prove schema [--cases N] [--seed N]

schemathesis makes requests from /openapi.json, half of them against it, and compares status,
content type and body of every answer with what is described there. The engine is a toy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from server.app import create_app
from server.settings import ServerSettings
from tests.e2e.serving import quiet
from tests.server.fake_engine import FakeEngine
from tests.server.schema_cases import check_schema


def main() -> int:
    args = _arguments()
    console = Console()
    quiet()
    engine = FakeEngine(max_model_len=24)
    app = create_app(engine, ServerSettings(served_model_names=("toy",), host="0.0.0.0", max_n=2))
    try:
        with Progress(console=console) as bar:
            task = bar.add_task("requests", total=args.cases)
            statuses = check_schema(app, args.cases, args.seed, lambda: bar.advance(task))
    finally:
        engine.close()
        app.state.context.close()
    shares = ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))
    console.print(f"{statuses.total()} answers as described ({shares})")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/prove schema")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
