"""Pages for people: plain files of app/pages, no build step, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app.problems import refuse

PAGES = Path(__file__).resolve().parent.parent / "pages"
ASKED = [
    "GET",
    "HEAD",
]  # who shows a link's preview, or watches that a site is up, asks for no more than the head
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Scripts and styles only from here; the shop may embed the page to hand over the buyer's token.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


@cache
def _file(name: str) -> tuple[bytes, str]:
    body = (PAGES / name).read_bytes()
    return body, '"' + hashlib.blake2b(body, digest_size=9).hexdigest() + '"'


def page(request: Request, name: str, policy: str = POLICY) -> Response:
    """One file of app/pages; 304 if the browser has it."""
    body, etag = _file(name)
    headers = {
        "etag": etag,
        "cache-control": "public, max-age=60",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    kind = TYPES[Path(name).suffix]
    return Response(body, headers=headers | {"content-type": f"{kind}; charset=utf-8"})


def pages(of_paths: Mapping[str, str], files: Collection[str], policy: str = POLICY) -> APIRouter:
    """The pages of one server by their paths, its /docs, and the files that they use."""
    router = APIRouter(include_in_schema=False)

    def serve(path: str, name: str) -> None:
        @router.api_route(path, methods=ASKED)
        async def one(request: Request) -> Response:
            return page(request, name, policy)

    for path, name in {**of_paths, "/docs": "docs.html", "/favicon.ico": "icon.svg"}.items():
        serve(path, name)

    @router.api_route("/pages/{name}", methods=ASKED)
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise refuse("not_found")
        return page(request, name)

    return router
