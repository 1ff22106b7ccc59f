"""Who may come in. Default-deny: every path that is not listed here needs a key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.page_routes import PAGE

# The page is the same for everyone; what it shows it asks for with the reader's key.
PUBLIC_PATHS = frozenset({"/live", "/ready", "/health", "/ping"}) | PAGE.keys()
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class ApiKeys:
    """Compares digests in constant time, against all keys, on `scope["path"]`: the very path that
    is routed, never one rebuilt from the Host header."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "The API key is missing or wrong; send it as 'Authorization: Bearer KEY' or "
            "'X-Api-Key: KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [bearer.strip()] if scheme.lower() == "bearer" else []
        offered += headers.getlist("x-api-key")
        digests = [_digest(key.encode("latin-1")) for key in offered]  # the bytes as they came
        # no early exit: the time must not tell which key came close
        matches = [hmac.compare_digest(d, known) for d in digests for known in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class LoopbackGuard:
    """Keeps foreign web pages away from a server that trusts everyone on this machine.

    A page may point its own name at 127.0.0.1 (DNS rebinding) or post blindly across origins;
    both show in Host and Origin, which a page cannot forge.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in hosts}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (problem := self._problem(Headers(scope=scope))) is None:
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            403,
            f"{problem} is not served here; allow its host name in the settings or use an API key.",
            code="host_not_allowed",
        )
        await refusal.response()(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _host_name(hosts[0]) not in self._hosts:
            return f"Host {', '.join(hosts)[:200]!r}"
        for origin in headers.getlist("origin"):
            if origin not in self._origins and _origin_host(origin) not in self._hosts:
                return f"Origin {origin[:200]!r}"
        return None


def _host_name(host: str) -> str:
    """The name without port and brackets."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _origin_host(origin: str) -> str:
    try:
        return _host_name(urlsplit(origin).netloc)
    except ValueError:  # an unbalanced bracket
        return ""
