"""From a loaded engine to a served port, and back: bind, serve, drain, close.

On SIGTERM or SIGINT: new requests get 503, the running ones finish within the timeout, what is
left after it ends with an error event, the connections close, the engine closes. Uvicorn is told
to stop only after that, as its own shutdown knows nothing of the engine. A second signal skips the
waiting.

Where the engine fails, its requests have heard so; the server stops and its exit code is 1, for
whoever restarts it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.context import ServerContext
from server.engine_port import EnginePort
from server.errors import ApiError
from server.logs import configure_logging
from server.protocol import GuardedProtocol
from server.settings import ServerSettings
from sl_serve.errors import UserError
from sl_serve.stats import EngineState

log = structlog.get_logger(__name__)

FLUSH_S = 3  # for the last bytes of answers, after the engine is done
EXIT_S = 2  # for threads that do not end by themselves, after everything is closed
KEEP_ALIVE_S = 75  # longer than the pools of common clients keep a connection
TICKS_PER_LOOK = 5  # of uvicorn's, a tenth of a second each
ENGINE_DEAD = 1  # exit code
SIGNALLED = 128  # plus the signal's number: exit code of a process ended by it


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; UserError where that is not possible.

    To be called before a model is loaded, which takes minutes that a taken port would waste.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UserError(f"host {host!r} is not known: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(_explain(error, host, port)) from None
    return listener


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken; choose another port or stop what listens there"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def serve(
    engine: EnginePort,
    settings: ServerSettings,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serves until a signal comes; returns the exit code. Closes the engine.

    `listener`: from `bind`; made here if None. `on_ready` gets the URL once requests are taken.
    """
    configure_logging(settings.log_json)
    if listener is None:
        listener = bind(settings.host, settings.port)
    app = create_app(engine, settings)
    server = build_server(app, on_ready)
    if not settings.on_loopback and not settings.api_keys:
        log.warning("anyone who reaches this port may use it; set an API key", host=settings.host)
    try:
        server.run(sockets=[listener])
    finally:
        app.state.context.close()
        engine.close()
    return server.exit_code


def end_within(seconds: float, code: int) -> None:
    """The process ends by then at the latest: a thread that tokenises a book, or hangs, must not
    keep it from being restarted."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def build_server(app: FastAPI, on_ready: Callable[[str], None] | None = None) -> DrainingServer:
    """For an app made by `create_app`; run it with a socket from `bind`."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=GuardedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
    )
    return DrainingServer(config, app.state.context, on_ready)


class DrainingServer(uvicorn.Server):
    """Uvicorn, whose stop begins with the engine's."""

    def __init__(
        self,
        config: uvicorn.Config,
        context: ServerContext,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._context = context
        self._on_ready = on_ready
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which stop at once and raise the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop, number)
        yield  # closing the loop removes the handlers

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        url = _url(sockets[0])
        log.info(f"ready on {url}", models=self._context.settings.served_model_names)
        if self._on_ready is not None:
            self._on_ready(url)

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_PER_LOOK == 0:
            self._look_after_engine()
        return await super().on_tick(counter)

    def _look_after_engine(self) -> None:
        snapshot = self._context.engine.snapshot()
        if snapshot.state is EngineState.DEAD and self.exit_code == 0:
            log.critical("engine_dead", reason=snapshot.reason)
            self.exit_code = ENGINE_DEAD
            if self._draining is None:
                self.should_exit = True

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """On the loop: begins to drain; called while draining it ends that now."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            log.warning("interrupted", unfinished=len(self._context.jobs))
            self.exit_code = SIGNALLED + number
            self._end_jobs()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        timeout_s = self._context.settings.drain_timeout_s
        log.info("draining", unfinished=len(self._context.jobs), timeout_s=timeout_s)
        self._context.pause_batches()
        if not await _drained(self._context, timeout_s):
            log.warning("drain_timeout", unfinished=len(self._context.jobs))
            self._end_jobs()
        self.should_exit = True

    def _end_jobs(self) -> None:
        error = ApiError(503, "The server has been shut down.", code="shutting_down")
        for job in list(self._context.jobs):
            job.fail(error)


async def _drained(context: ServerContext, timeout_s: float) -> bool:
    """engine.drain on a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def settle(drained: bool) -> None:
        if not done.done():
            done.set_result(drained)

    def drain() -> None:
        drained = False
        try:
            drained = context.engine.drain(timeout_s)
        finally:
            with suppress(RuntimeError):  # interrupted: the loop is closed
                loop.call_soon_threadsafe(settle, drained)

    threading.Thread(target=drain, name="sl-serve-drain", daemon=True).start()
    return await done


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
