"""HTTP to suppliers: one pooled client an adapter, and what each failure of the transport means for money.

`NotDone` only where the request certainly never reached the supplier. After the first byte it may have been read.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import ssl
import sys
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import httpx

from app.providers.answer import MaybeDone, NotDone

# No connection, so nothing was sent. (PoolTimeout: our own pool; ProxyError: the proxy never reached the supplier.)
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
# httpx logs every URL at level info. Aliyun's carry phone numbers, page links carry signatures: not into any log.
logging.getLogger("httpx").setLevel(logging.WARNING)

# httpcore asks `import sniffio` several times a request. Where it is not installed (anyio needs it no longer), each
# searches the whole path on disk: a third of a request's CPU. Told once that there is none, Python looks no more.
if find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment]

BODY_MAX_BYTES = 4 * 1024 * 1024  # a day's bill of a sandbox; no answer of a payment call is near it


@cache
def _trust() -> ssl.SSLContext:
    """Reading the certificate authorities takes 20 ms: once, not for every supplier."""
    return httpx.create_ssl_context(trust_env=False)


# A bill is slow to come, and its supplier is not ill for it: the guard around it says how long it may take.
PATIENCE_S: ContextVar[float | None] = ContextVar("patience_s", default=None)


async def _be_patient(request: httpx.Request) -> None:
    if (patience_s := PATIENCE_S.get()) is not None:
        request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": patience_s}


def client(base_url: str, *, deadline_s: float, connections_max: int) -> httpx.AsyncClient:
    """A client that follows no redirect (a payment call has none), never retries, reads no proxy from the shell."""
    return httpx.AsyncClient(
        base_url=base_url,
        verify=_trust(),
        timeout=httpx.Timeout(deadline_s, connect=min(2.0, deadline_s)),
        limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
        follow_redirects=False,
        trust_env=False,
        event_hooks={"request": [_be_patient]},
    )


def failed(error: httpx.HTTPError) -> NotDone | MaybeDone:
    """What a transport failure means."""
    code = type(error).__name__
    if isinstance(error, _NEVER_SENT):
        return NotDone(code)
    return MaybeDone(code)


def retry_after_ms(reply: httpx.Response) -> int:
    """A Retry-After in seconds, at most a minute; 0: none, or a date."""
    text = reply.headers.get("retry-after", "")
    return min(60_000, int(text) * 1000) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def digest_holds(kind: str, expected_hex: str, content: bytes) -> bool:
    """Whether a downloaded file has the digest that a signed answer named. False also for a kind that nobody uses."""
    if kind not in ("SHA1", "SHA256"):
        return False
    return hmac.compare_digest(hashlib.new(kind, content).hexdigest(), expected_hex.lower())
