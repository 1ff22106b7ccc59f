"""A server run for as long as a block lasts, with its log kept aside."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from clients.protocol import ClientError

_POLL_S = 0.2


class ServerProcessError(ClientError):
    """The server did not start or did not stop as it should; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_ready(self, limit_s: float) -> float:
        """Seconds until /ready answered well. Raises ServerProcessError if it never does."""
        start = time.monotonic()
        while not self._is_ready():
            if self.process.poll() is not None:
                raise self._error(f"the server ended with exit code {self.process.returncode}")
            if time.monotonic() - start > limit_s:
                raise self._error(f"the server was not ready within {limit_s:.0f} s")
            time.sleep(_POLL_S)
        return time.monotonic() - start

    def stop(self, limit_s: float) -> None:
        """SIGTERM, and exit code 0 within `limit_s`; anything else raises ServerProcessError."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise self._error(f"the server did not stop within {limit_s:.0f} s") from None
        if code != 0:
            raise self._error(f"the server ended with exit code {code} on SIGTERM")

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def _error(self, message: str) -> ServerProcessError:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return ServerProcessError("\n".join([f"{message}; its log ends:", *lines]))


@contextmanager
def server_process(command: Sequence[str]) -> Iterator[ServerProcess]:
    """Runs `command` with --host and --port of a free loopback port added; killed at the latest
    at the end of the block."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sl-serve-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield ServerProcess(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
