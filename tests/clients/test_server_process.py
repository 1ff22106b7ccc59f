from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from clients.server_process import ServerProcessError, server_process

FAKE = [sys.executable, str(Path(__file__).with_name("serve_fake.py"))]


def test_started_answering_and_stopped() -> None:
    with server_process(FAKE) as server:
        assert server.wait_ready(limit_s=30) > 0
        assert httpx.get(f"{server.url}/v1/models").json()["data"] == [{"id": "fake"}]
        server.stop(limit_s=30)
        assert server.process.returncode == 0


def test_a_server_that_fails_shows_its_log() -> None:
    with (
        server_process([*FAKE, "--fail"]) as server,
        pytest.raises(ServerProcessError, match="error: no such model"),
    ):
        server.wait_ready(limit_s=30)


def test_a_bad_end_is_told() -> None:
    with server_process([*FAKE, "--bad-end"]) as server:
        server.wait_ready(limit_s=30)
        with pytest.raises(ServerProcessError, match="exit code 3 on SIGTERM"):
            server.stop(limit_s=30)


def test_limits_and_no_process_left_behind() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with server_process([sys.executable, "-c", deaf]) as server:
        with pytest.raises(ServerProcessError, match="not ready within 1 s"):
            server.wait_ready(limit_s=1)
        with pytest.raises(ServerProcessError, match="did not stop within 0 s"):
            server.stop(limit_s=0.1)
    assert server.process.returncode == -9
