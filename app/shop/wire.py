"""One POST to an address that somebody else chose: bounded in time and size, and never into our own network.

The name is resolved here, every address it has is checked, and the connection goes to the address that was checked: a
name that answers differently the second time (DNS rebinding) gains nothing. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import httpx

from app.settings import Settings

ANSWER_HEAD_MAX = 4_096  # characters of Retry-After and its like that anybody looks at
CONNECTIONS_IDLE_MAX = 4  # kept open to one address
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Answered(NamedTuple):
    status: int
    retry_after_s: float | None


class NotAnswered(NamedTuple):
    """Nothing, or nothing in time: whether it arrived is unknown; it is sent again."""

    code: str  # timeout | name_unknown | no_connection | broken


class Refused(NamedTuple):
    """Not sent, for our own safety."""

    code: str  # address_refused


Outcome = Answered | NotAnswered | Refused


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet, and not to this machine, its network or a protocol's own range."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inside = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if found.teredo is not None:
            return False
        if inside is not None:
            return is_public(str(inside))
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


class Address:
    """One address of the shop, with connections of its own: no other host's are ever reused for it."""

    def __init__(self, url: str, settings: Settings, tls: ssl.SSLContext | bool = True) -> None:
        self.url = url
        self._parts = urlsplit(url)
        self._settings = settings
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            verify=tls,
            timeout=settings.webhook_deadline_s,
            limits=httpx.Limits(
                max_connections=settings.webhook_url_concurrency,
                max_keepalive_connections=CONNECTIONS_IDLE_MAX,
            ),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def post(self, body: bytes, headers: Mapping[str, str]) -> Outcome:
        """Send it once. The whole of it takes at most `webhook_deadline_s`."""
        status: Answered | None = None
        try:
            async with asyncio.timeout(self._settings.webhook_deadline_s):
                address = await self._resolve()
                if not isinstance(address, str):
                    return address
                async with self._client.stream(
                    "POST",
                    self._at(address),
                    content=body,
                    headers={**headers, "Host": self._parts.netloc},
                    extensions={"sni_hostname": self._parts.hostname},
                ) as answer:
                    status = Answered(answer.status_code, _retry_after_s(answer.headers.get("retry-after")))
                    read = 0
                    async for part in answer.aiter_raw():
                        # Read, so that the connection can be used again; what is longer is cut off with it.
                        read += len(part)
                        if read > self._settings.webhook_answer_max_bytes:
                            break
                return status
        except TimeoutError:
            return status or NotAnswered("timeout")
        except httpx.TimeoutException:
            return status or NotAnswered("timeout")
        except httpx.ConnectError:
            return NotAnswered("no_connection")
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return status or NotAnswered("broken")

    async def _resolve(self) -> str | NotAnswered | Refused:
        """The address to connect to: the first, if all of them are public. An unknown name counts against the address:
        its look-ups may be slow, and hold threads that other names need."""
        host, port = self._parts.hostname or "", self._parts.port or 443
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError):
            return NotAnswered("name_unknown")
        addresses = [str(one[4][0]).partition("%")[0] for one in found]
        if not addresses:
            return NotAnswered("name_unknown")
        if not self._settings.webhooks_allow_private and not all(is_public(one) for one in addresses):
            return Refused("address_refused")
        return addresses[0]

    def _at(self, address: str) -> str:
        """The URL with the address instead of the name."""
        netloc = f"[{address}]" if ":" in address else address
        if self._parts.port is not None:
            netloc += f":{self._parts.port}"
        return urlunsplit((self._parts.scheme, netloc, self._parts.path or "/", self._parts.query, ""))


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After; a date, or nonsense, is none."""
    if value is not None and len(value) <= ANSWER_HEAD_MAX:
        with suppress(ValueError):
            return max(0.0, float(int(value)))
    return None
