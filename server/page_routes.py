"""GET /: the status page, files that are the same for everyone and hold nothing private."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
KINDS = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Every path is named, so that no request chooses a file.
PAGE = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/icon.svg": "icon.svg",
    "/page/app.js": "app.js",
    "/page/api.js": "api.js",
    "/page/chat.js": "chat.js",
    "/page/dom.js": "dom.js",
    "/page/engine.js": "engine.js",
    "/page/jobs.js": "jobs.js",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, name in PAGE.items():
        _add(router, path, FOLDER / name)
    return router


def _add(router: APIRouter, path: str, file: Path) -> None:
    content = file.read_bytes()
    headers = HEADERS | {"Content-Type": KINDS[file.suffix]}

    async def answer() -> Response:
        return Response(content, headers=headers)

    router.add_api_route(path, answer, methods=["GET", "HEAD"])
