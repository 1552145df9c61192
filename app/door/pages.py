"""The buyer's page and the page that shows the API."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from fastapi import APIRouter

from app.errors import CannotStart
from app.serving.pages import POLICY, pages
from app.settings import Settings

# An origin, or all below a name: what a Content-Security-Policy may hold without a space or semicolon to add to it.
_ORIGIN = re.compile(r"https?://(\*\.)?[A-Za-z0-9.-]+(:[0-9]{1,5})?")


def policy_with_captcha(settings: Settings) -> str:
    """The policy, wider by the captcha's own script, frame, styles and calls where one is set.

    CannotStart: an address is none.
    """
    script = urlsplit(settings.captcha_script_url)
    origins = [f"{script.scheme}://{script.netloc}"] if settings.captcha_script_url else []
    for origin in (origins := origins + settings.captcha_origins):
        if not _ORIGIN.fullmatch(origin):
            raise CannotStart(
                f"FAIRDROP_CAPTCHA_SCRIPT_URL or FAIRDROP_CAPTCHA_ORIGINS: {origin} is no origin"
            )
    if not settings.captcha_script_url:
        return POLICY
    also = " ".join(dict.fromkeys(origins))
    wider = POLICY + "; frame-src"
    for directive in ("script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-src"):
        wider = wider.replace(directive, f"{directive} {also}")
    return wider


def buyers_pages(settings: Settings) -> APIRouter:
    """The front's pages. CannotStart: an address of the captcha is none."""
    return pages(
        {"/": "buyer.html", "/s/{sale}": "buyer.html"},
        {"buyer.js", "buyer.css", "docs.js", "docs.css", "icon.svg"},
        policy_with_captcha(settings),
    )
