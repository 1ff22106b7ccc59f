"""Serves the fake engine in a process of its own, for tests that send signals.

python -m tests.server.serve_fake DRAIN_TIMEOUT_S ENGINE {console|json}

ENGINE is open, held (steps wait for SIGUSR2, aborts are heard), stuck (nothing is) or
slow-tokenizer (a prompt takes an hour). On SIGUSR1 the engine dies.
"""

from __future__ import annotations

import signal
import sys

from server.run import EXIT_S, end_within, serve
from server.settings import ServerSettings
from tests.server.fake_engine import FakeEngine


def main() -> int:
    timeout_s, kind, log_format = sys.argv[1:]
    engine = FakeEngine(step_s=0.02)
    engine.stuck = kind == "stuck"
    if kind == "held":
        engine.gate.clear()
    if kind == "slow-tokenizer":
        engine.tokenizer.encode_s = 3600.0
    signal.signal(signal.SIGUSR1, lambda *_: engine.die("the bus fell asleep"))
    signal.signal(signal.SIGUSR2, lambda *_: engine.gate.set())
    settings = ServerSettings(
        served_model_names=("toy",),
        port=0,
        drain_timeout_s=float(timeout_s),
        log_json=log_format == "json",
    )
    code = serve(engine, settings, on_ready=lambda url: print(url, flush=True))
    assert engine.closed
    end_within(EXIT_S, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
