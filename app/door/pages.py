"""The buyer's page and the page that shows the API: plain files, no build step, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app.problems import refuse

router = APIRouter(include_in_schema=False)

PAGES = Path(__file__).resolve().parent.parent / "pages"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = ("buyer.js", "buyer.css", "docs.js", "docs.css", "icon.svg")
# Scripts and styles only from here; the shop may embed the page to hand over the buyer's token.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


@cache
def _file(name: str) -> tuple[bytes, str]:
    body = (PAGES / name).read_bytes()
    return body, '"' + hashlib.blake2b(body, digest_size=9).hexdigest() + '"'


def page(request: Request, name: str) -> Response:
    """One file of app/pages; 304 if the browser has it."""
    body, etag = _file(name)
    headers = {
        "etag": etag,
        "cache-control": "public, max-age=60",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    kind = TYPES[Path(name).suffix]
    return Response(body, headers=headers | {"content-type": f"{kind}; charset=utf-8"})


@router.get("/")
async def sales_page(request: Request) -> Response:
    return page(request, "buyer.html")


@router.get("/s/{sale}")
async def sale_page(request: Request, sale: str) -> Response:
    return page(request, "buyer.html")


@router.get("/docs")
async def docs_page(request: Request) -> Response:
    return page(request, "docs.html")


@router.get("/pages/{name}")
async def file(request: Request, name: str) -> Response:
    if name not in FILES:
        raise refuse("not_found")
    return page(request, name)


@router.get("/favicon.ico")
async def icon(request: Request) -> Response:
    return page(request, "icon.svg")
