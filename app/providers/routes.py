"""Which suppliers serve a payment channel, or texts, and who is tried first. Settings say it, operators change it live.

A route is `{supplier: weight}`, in order. Suppliers with a weight share what comes, in proportion; one with weight 0 is
a backup, tried after all that have a weight, in the order of the route (all 0: simply in this order). A supplier that
is not in the route is not used for anything new; what it has under way is still looked after.

Which of several comes first is a matter of the key alone (an order's number, a text's id): the same key has the same
order in every process and at every repeat. Rendezvous hashing: another weight moves only keys from or to its supplier.

What operators set is in Postgres (ledger/provider_routes.py) and, for all processes to follow, in Redis:
`fairdrop:provider_routes` hash: `sms` or `payment:<channel>` -> JSON of a route; none there: as the settings say. Every
process looks twice a second; without Redis it goes on with what it saw last. A Redis that lost it gets it again from
the worker (reconcile.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Literal, TypeVar

import msgspec
import structlog

from app import keys
from app.errors import CannotStart, FairdropError
from app.redis.link import Link

T = TypeVar("T")
log = structlog.get_logger()

EVERY_S = 0.5  # between two looks at what operators have set: "live within a second or so"
WEIGHT_MAX = 1_000
SUPPLIERS_MAX = 16  # in one route

Kind = Literal["payment", "sms"]
Weight = Annotated[int, msgspec.Meta(ge=0, le=WEIGHT_MAX)]
Route = dict[str, Weight]


def in_turn(route: Mapping[str, int], key: str) -> list[str]:
    """The suppliers of a route in the order in which they are tried for this key. Pure.

    A supplier of weight w is first for w / (sum of weights) of all keys.
    """
    if len(route) == 1:
        return list(route)
    weighted = sorted((_lot(name, key) / weight, name) for name, weight in route.items() if weight > 0)
    return [name for _, name in weighted] + [name for name, weight in route.items() if weight <= 0]


def _lot(name: str, key: str) -> float:
    """Exponentially distributed, fixed by name and key: the least lot / weight wins with odds of its weight."""
    digest = blake2b(f"{name}\0{key}".encode(), digest_size=8, person=b"fairdrop-route").digest()
    return -math.log((int.from_bytes(digest, "big") + 1) / 2**64)


class Routes:
    """The routes in force in this process."""

    def __init__(
        self,
        payment: Mapping[str, Collection[str]],
        sms: Sequence[str],
        *,
        payment_routes: str = "",
        sms_route: str = "",
    ) -> None:
        """payment: supplier -> the channels it knows by itself; both in order of preference. The texts are settings.

        CannotStart: a setting is no route, or names a supplier that is not in use.
        """
        self._knows = {name: frozenset((name, *channels)) for name, channels in payment.items()}
        self._sms = list(sms)
        self._set: dict[str, Route] = {}
        if payment_routes:
            for channel, route in _read(
                payment_routes, dict[str, Route], "FAIRDROP_PAYMENT_ROUTES", '{"channel": {"supplier": 1}}'
            ).items():
                self._set[field_of("payment", channel)] = _checked(
                    route, self._knows, "FAIRDROP_PAYMENT_ROUTES"
                )
        if sms_route:
            route = _read(sms_route, Route, "FAIRDROP_SMS_ROUTE", '{"supplier": 1}')
            self._set[field_of("sms", None)] = _checked(route, self._sms, "FAIRDROP_SMS_ROUTE")
        self._live: dict[str, Route] = {}

    def order(self, kind: Kind, channel: str | None, key: str) -> list[str]:
        """The suppliers to be tried for this key, the first one first. channel: of a payment; None for texts.

        Empty only where no supplier of this kind is in use. Whether one is well is its guard's business.
        """
        return in_turn(self.route(kind, channel), key)

    def route(self, kind: Kind, channel: str | None) -> Route:
        """The route in force: what operators have set, else the settings, else who knows the channel."""
        known = self.suppliers(kind)
        live = self._live.get(field_of(kind, channel), {})
        return {name: weight for name, weight in live.items() if name in known} or self.without_live(
            kind, channel
        )

    def without_live(self, kind: Kind, channel: str | None) -> Route:
        """The route as it is when operators have set none."""
        return self._set.get(field_of(kind, channel)) or self._default(kind, channel)

    def is_live(self, kind: Kind, channel: str | None) -> bool:
        """Whether operators have set this route."""
        return field_of(kind, channel) in self._live

    def suppliers(self, kind: Kind) -> list[str]:
        """Every supplier of a kind that is in use, in order of preference."""
        return list(self._knows) if kind == "payment" else list(self._sms)

    def channels(self) -> list[str]:
        """Every payment channel that leads to a supplier."""
        routed = (field for field in (*self._set, *self._live) if field.startswith("payment:"))
        own = {channel for channels in self._knows.values() for channel in channels}
        return sorted(own.union(field.removeprefix("payment:") for field in routed))

    def _default(self, kind: Kind, channel: str | None) -> Route:
        """The preferred supplier of those that know the channel; the others stand by."""
        if kind == "sms":
            names = self._sms
        else:
            names = [name for name, channels in self._knows.items() if channel in channels]
            # A sale may have been published before its channel was taken away: the preferred supplier serves it.
            names = names or list(self._knows)[:1]
        return {name: int(at == 0) for at, name in enumerate(names)}

    def take(self, fields: Mapping[bytes, bytes]) -> None:
        """Take over what operators have set: the whole hash, as Redis has it. What cannot be read is left out."""
        live: dict[str, Route] = {}
        for field, raw in fields.items():
            try:
                live[field.decode()] = msgspec.json.decode(raw, type=Route)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                log.warning("provider_route_unreadable", field=repr(field)[:100])
        if live != self._live:
            log.info("provider_routes", live=sorted(live))
        self._live = live

    async def refresh(self, link: Link) -> None:
        """Look now. DidNotHappen, Unknown: Redis is away; the routes stay as they were."""
        flat = await link.call("HGETALL", keys.PROVIDER_ROUTES)
        assert isinstance(flat, list)
        self.take(dict(zip(flat[::2], flat[1::2], strict=True)))


def field_of(kind: Kind, channel: str | None) -> str:
    """The name of a route in Redis."""
    if (kind == "payment") != (channel is not None):
        raise ValueError("a payment route has a channel, the route of texts has none")
    return kind if channel is None else f"payment:{channel}"


def encode(route: Mapping[str, int]) -> bytes:
    """A route as Redis keeps it."""
    return msgspec.json.encode(dict(route))


async def run(link: Link, routes: Routes, stopping: asyncio.Event) -> None:
    """Follow what operators set, until `stopping` is set."""
    while not stopping.is_set():
        try:
            await routes.refresh(link)
        except FairdropError as error:
            log.warning("provider_routes_not_read", error=type(error).__name__)
        try:
            async with asyncio.timeout(EVERY_S):
                await stopping.wait()
        except TimeoutError:
            continue


def _read(text: str, kind: type[T], setting: str, example: str) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise CannotStart(
            f"{setting}: not like {example} with weights of 0 to {WEIGHT_MAX}: {error}"
        ) from error


def _checked(route: Route, known: Collection[str], setting: str) -> Route:
    unknown = [name for name in route if name not in known]
    if unknown:
        raise CannotStart(
            f"{setting}: {unknown[0]!r} is no supplier in use; there are: {', '.join(known) or 'none'}"
        )
    if not 1 <= len(route) <= SUPPLIERS_MAX:
        raise CannotStart(f"{setting}: a route names 1 to {SUPPLIERS_MAX} suppliers")
    return dict(route)
