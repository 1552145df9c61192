"""Where a request came from: its peer, or what proxies of ours say. Personal: sealed before it is stored."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from app.errors import CannotStart

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HOPS_MAX = 16  # entries of X-Forwarded-For that are looked at, from the nearest


@lru_cache(maxsize=8)
def networks(text: str) -> tuple[Network, ...]:
    """FAIRDROP_TRUSTED_PROXIES. CannotStart: an entry is neither an address nor a network."""
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            found.append(ipaddress.ip_network(part))
        except ValueError as error:
            raise CannotStart(
                f"FAIRDROP_TRUSTED_PROXIES: {part!r} is no address or network: {error}"
            ) from None
    return tuple(found)


def address_of(peer: str | None, forwarded: Iterable[str], trusted: tuple[Network, ...]) -> str | None:
    """The buyer's address: the nearest hop that is no proxy of ours. None: what there is, is no address.

    forwarded: the request's X-Forwarded-For headers in order. Whoever is not trusted may write what they like into
    them: only what a trusted hop has added at the end counts.
    """
    hops = [hop for header in forwarded for hop in header.split(",")][-HOPS_MAX:]
    nearest = _ip(peer or "")
    while nearest is not None and hops and any(nearest in network for network in trusted):
        nearest = _ip(hops.pop())
    return None if nearest is None else str(nearest)


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, with or without a port or brackets. An IPv4 address that is mapped into IPv6 is told as IPv4."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
