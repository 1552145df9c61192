"""The office's live page and the page that shows its API: plain files, nothing from elsewhere."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.door.pages import page
from app.problems import refuse

router = APIRouter(include_in_schema=False)
FILES = ("live.js", "live.css", "docs.js", "docs.css", "icon.svg")


@router.get("/")
@router.get("/live/{sale}")
async def live_page(request: Request) -> Response:
    return page(request, "live.html")


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
