"""HTTP to suppliers: one pooled client an adapter, and what each failure of the transport means for money.

`NotDone` only where the request certainly never reached the supplier. After the first byte it may have been read.
"""

from __future__ import annotations

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
BODY_MAX_BYTES = 4 * 1024 * 1024  # a day's bill of a sandbox; no answer of a payment call is near it


def client(base_url: str, *, deadline_s: float, connections_max: int) -> httpx.AsyncClient:
    """A client that follows no redirect (a payment call has none), never retries, reads no proxy from the shell."""
    return httpx.AsyncClient(
        base_url=base_url,
        timeout=httpx.Timeout(deadline_s, connect=min(2.0, deadline_s)),
        limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
        follow_redirects=False,
        trust_env=False,
    )


def failed(error: httpx.HTTPError) -> NotDone | MaybeDone:
    """What a transport failure means."""
    code = type(error).__name__
    if isinstance(error, _NEVER_SENT):
        return NotDone(code)
    return MaybeDone(code)
