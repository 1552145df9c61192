"""The office's live page and the page that shows its API."""

from __future__ import annotations

from app.serving.pages import pages

router = pages(
    {"/": "live.html", "/live/{sale}": "live.html"},
    {"live.js", "live.css", "docs.js", "docs.css", "icon.svg"},
)
