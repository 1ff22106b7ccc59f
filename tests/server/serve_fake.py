"""Serves the fake engine in a process of its own, for tests that send signals.

python -m tests.server.serve_fake DRAIN_TIMEOUT_S {open|held|stuck} {console|json}
"""

from __future__ import annotations

import sys

from server.run import serve
from server.settings import ServerSettings
from tests.server.fake_engine import FakeEngine


def main() -> int:
    timeout_s, gate, log_format = sys.argv[1:]
    engine = FakeEngine(step_s=0.02)
    engine.stuck = gate == "stuck"
    if gate == "held":
        engine.gate.clear()
    settings = ServerSettings(
        served_model_names=("toy",),
        port=0,
        drain_timeout_s=float(timeout_s),
        log_json=log_format == "json",
    )
    code = serve(engine, settings, on_ready=lambda url: print(url, flush=True))
    assert engine.closed
    return code


if __name__ == "__main__":
    sys.exit(main())
