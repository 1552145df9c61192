"""The line moves: ticks of `line_advance` over every open item, on Redis alone, with Postgres up or down.

The script holds the token bucket and the draw, so any number of workers may tick: none leads. What happens by the clock
(the beacon after the freeze, opened, sold out, closed) is noted in Postgres by loops of their own, which may wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec
import structlog
from prometheus_client import Counter as Count
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import keys
from app.answers import (
    Busy,
    Closed,
    Gone,
    Old,
    Served,
)
from app.errors import DidNotHappen, Unknown
from app.keys import SaleKeys
from app.ledger import course, events, outbox, sales
from app.ledger.engine import alone
from app.redis.link import Link
from app.sale import publish
from app.scripts import Scripts
from app.settings import Settings

TURN_S = 0.2  # s of call after call for one line; then the sales are looked at again (pauses are seen by the script)
BEACON_WITHIN_S = 5.0
BEACON_MAX_BYTES = 65_536

SERVED = Count("fairdrop_admitted_claims", "tickets that got units from the line", ["sale", "sku"])
WAITING = Gauge("fairdrop_line_waiting", "tickets in line, those who left included", ["sale", "sku"])
LEFT = Gauge("fairdrop_units_left", "units in Redis", ["sale", "sku"])
_log = structlog.get_logger("admit")

_FIELDS = (
    "epoch", "home", "items", "opens_ms", "freeze_ms", "closed", "paused", "opened", "beacon_source", "beacon_value",
)  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """A sale as Redis says it is now."""

    sale: str
    epoch: int
    home: str
    skus: tuple[str, ...]
    opens_ms: int
    freeze_ms: int
    closed: bool
    paused: bool
    opened: bool
    beacon_source: str
    beacon_value: str


def listed(found: Sequence[bytes]) -> list[tuple[str, bool]]:
    """`fairdrop:sales` as HGETALL answers it → (sale, ended)."""
    pairs: list[tuple[str, bool]] = []
    for name, facts in zip(found[::2], found[1::2], strict=True):
        try:
            ended = bool(msgspec.json.decode(facts, type=dict[str, object]).get("ended"))
        except (ValueError, msgspec.DecodeError):
            ended = False  # a newer release wrote it: look at the sale itself
        pairs.append((name.decode(), ended))
    return pairs


@dataclass
class Admitter:
    """Serves the lines of all sales that this Redis holds. `watched` is what the other loops go by."""

    link: Link
    scripts: Scripts
    settings: Settings
    watched: dict[str, Watched] = field(default_factory=dict)
    now_ms: int = 0  # Redis' clock at the last look
    more: bool = False  # the last tick ended with work left that could have been done: tick again at once
    _done: set[tuple[str, int, str]] = field(default_factory=set)  # items that will serve nobody any more
    _served: dict[tuple[str, int, str], int] = field(
        default_factory=dict
    )  # the rank each line was at after a call
    _noted: set[str] = field(default_factory=set)  # sales whose beacon Postgres knows
    _names: list[str] = field(
        default_factory=list
    )  # the sales that had not ended when the list was last seen
    _looked_at: float = 0.0  # monotonic s
    _stuck: set[str] = field(
        default_factory=set
    )  # sales whose lines failed in the last tick while others did not

    async def look(self) -> None:
        """See which sales there are, and what has been switched. One round trip for the list, one for the facts."""
        try:
            names = await self._list()
        except (DidNotHappen, Unknown):
            if not self._names:
                raise
            # In a cluster the list is on one node, and the sales on others go on while that is away.
            names = self._names
            self.now_ms += round((time.monotonic() - self._looked_at) * 1000)
        self._looked_at = time.monotonic()
        facts = await self.link.pipeline([("HMGET", SaleKeys(name).sale, *_FIELDS) for name in names])
        watched: dict[str, Watched] = {}
        failed: list[Exception] = []
        for name, values in zip(names, facts, strict=True):
            if isinstance(values, Exception):
                failed.append(values)
            elif (seen := _seen(name, values)) is not None:
                watched[name] = seen
        if failed and len(failed) == len(names):
            raise failed[0]
        self._names = names
        self.watched = watched
        self._done = {line for line in self._done if line[0] in watched}
        self._served = {line: rank for line, rank in self._served.items() if line[0] in watched}

    async def _list(self) -> list[str]:
        """Sales that have not ended, and Redis' clock."""
        clock, found = await self.link.pipeline([("TIME",), ("HGETALL", keys.SALES)])
        for answer in (clock, found):
            if isinstance(answer, Exception):
                raise answer
        self.now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
        return [sale for sale, ended in listed(found) if not ended]

    async def turn(self) -> bool:
        """One tick. Whether there is more to do at once; waiting for tokens, units or the minute is no work."""
        await self.tick()
        return self.more

    async def tick(self) -> int:
        """Serve what can be served now. Returns how many tickets got units."""
        self.more = False
        await self.look()
        todo = [
            (sale, sku)
            for sale in self.watched.values()
            if not sale.closed and not sale.paused and self.now_ms >= sale.opens_ms
            for sku in sale.skus
            if (sale.sale, sale.epoch, sku) not in self._done
        ]
        served = await asyncio.gather(*(self._serve(sale, sku) for sale, sku in todo), return_exceptions=True)
        failed: dict[str, BaseException] = {}
        claimed = 0
        for (sale, _), result in zip(todo, served, strict=True):
            if isinstance(result, BaseException):
                failed[sale.sale] = result
            else:
                claimed += result
        if failed and len(failed) == len({sale.sale for sale, _ in todo}):
            raise next(iter(failed.values()))
        for name in failed.keys() - self._stuck:  # its node of a cluster is away: the others are served on
            _log.warning("a line cannot be served now", sale=name, why=str(failed[name]))
        self._stuck = set(failed)
        return claimed

    async def _serve(self, sale: Watched, sku: str) -> int:
        """One line, call after call, until there is nothing to do or its turn is over.

        Calls are small, so that Redis answers buyers in between; whether one had its hands full is told by how far
        `served` moved, not by claims: many in a row may have left.
        """
        claimed = 0
        work_max = self.settings.line_serve_max
        line = (sale.sale, sale.epoch, sku)
        until = time.monotonic() + TURN_S
        while True:
            answer = await self.scripts.line_advance(
                sale=sale.sale,
                epoch=sale.epoch,
                sku=sku,
                work_max=work_max,
                backlog_max=self.settings.orders_backlog_max,
            )
            match answer:
                case Served():
                    claimed += answer.claimed
                    WAITING.labels(sale.sale, sku).set(answer.waiting)
                    LEFT.labels(sale.sale, sku).set(answer.units_left)
                    if answer.claimed:
                        SERVED.labels(sale.sale, sku).inc(answer.claimed)
                    moved = answer.served - self._served.get(line, 0)
                    self._served[line] = answer.served
                    if moved < work_max or answer.waiting == 0:
                        break
                    if time.monotonic() >= until:
                        self.more = True
                        break
                case Closed():
                    self._done.add(line)
                    break
                case Busy():
                    break  # the board says so; Postgres is behind or down
                case Old() | Gone():
                    break  # reconcile arms a restarted Redis again, or calls a person
                case _:
                    break  # early, paused, waiting for the beacon
        return claimed

    # The beacon

    async def put_beacons(self, client: httpx.AsyncClient) -> int:
        """Fetch and store the beacon of every sale that is past its freeze and lacks it. Returns how many."""
        wanting = [
            sale
            for sale in self.watched.values()
            if sale.beacon_source not in ("", "none")
            and not sale.beacon_value
            and not sale.closed
            and self.now_ms >= sale.freeze_ms
        ]
        # Side by side: a source that is silent, or a node of a cluster that is away, costs no other sale its beacon.
        results = await asyncio.gather(
            *(self._put_beacon(client, sale) for sale in wanting), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(result is True for result in results)

    async def _put_beacon(self, client: httpx.AsyncClient, sale: Watched) -> bool:
        value = await fetch_beacon(client, sale.beacon_source)
        if value is None:
            return False  # beacon_wait_ms after the opening the draw goes on without it, and says so
        await self.scripts.beacon_put(sale=sale.sale, epoch=sale.epoch, value=value)
        return True

    async def note_beacons(self, engine: AsyncEngine) -> None:
        """Postgres learns which beacon Redis holds."""
        for sale in list(self.watched.values()):
            if sale.beacon_value and sale.sale not in self._noted:
                async with engine.begin() as conn:
                    await course.note_beacon(conn, sale.sale, sale.beacon_value)
                self._noted.add(sale.sale)


def _seen(name: str, values: Sequence[bytes | None]) -> Watched | None:
    fields: Mapping[str, str] = {
        key: value.decode() if value is not None else "" for key, value in zip(_FIELDS, values, strict=True)
    }
    if not fields["epoch"]:
        return None  # no `sale` key: closed, never zero
    return Watched(
        name,
        int(fields["epoch"]),
        fields["home"],
        tuple(sku for sku in fields["items"].split(",") if sku),
        int(fields["opens_ms"] or 0),
        int(fields["freeze_ms"] or 0),
        fields["closed"] == "1",
        fields["paused"] == "1",
        fields["opened"] == "1",
        fields["beacon_source"],
        fields["beacon_value"],
    )


async def fetch_beacon(client: httpx.AsyncClient, source: str) -> str | None:
    """The public random value, as hex: `randomness` of a JSON document (drand), else SHA-256 of what is served.

    None: not yet, or not from here; try again. The address was named at publish, before anyone could know the value.
    """
    if not source.startswith(("https://", "http://")):
        return None  # an operator stores it by hand
    try:
        async with asyncio.timeout(BEACON_WITHIN_S), client.stream("GET", source) as answer:
            if answer.status_code != 200:
                return None
            body = b""
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > BEACON_MAX_BYTES:
                    return None
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        _log.warning("the beacon does not answer", source=source, why=type(error).__name__)
        return None
    try:
        randomness = msgspec.json.decode(body, type=dict[str, object]).get("randomness")
    except (ValueError, msgspec.DecodeError):
        randomness = None
    if isinstance(randomness, str) and randomness:
        return randomness
    return hashlib.sha256(body).hexdigest() if body else None


@dataclass
class Course:
    """What happens to sales by the clock, written to Postgres with its event, and switched in Redis."""

    engine: AsyncEngine
    link: Link
    scripts: Scripts
    admitter: Admitter
    due: asyncio.Event | None = None  # rings once an opening or closing has come; None: look each time
    _sold_out: dict[str, bool] = field(default_factory=dict)  # as noted last

    async def note(self) -> int:
        """Note what has come: opened, sold out, closed. Returns how many changes there were."""
        changes = 0
        if self.due is None or self.due.is_set():
            if self.due is not None:
                self.due.clear()
            async with alone(self.engine) as conn:
                due = await course.is_due(conn)
            if due:
                changes += await self._turn()
        for sale in list(self.admitter.watched.values()):
            if sale.opened and not sale.closed:
                changes += await self._note_stock(sale)
        return changes

    async def _turn(self) -> int:
        changes = 0
        async with self.engine.begin() as conn:
            for sale_id in await course.open_due(conn):
                await self._event(conn, sale_id, "sale.opened")
                changes += 1
        async with self.engine.begin() as conn:
            for sale_id in await course.close_due(conn):
                await self._event(conn, sale_id, "sale.closed")
                await self._switch(conn, sale_id)
                changes += 1
        return changes

    async def _note_stock(self, sale: Watched) -> bool:
        left = await self.link.call("HVALS", SaleKeys(sale.sale).stock)
        sold_out = bool(left) and all(int(units) == 0 for units in left)
        if self._sold_out.get(sale.sale) == sold_out:
            return False
        async with self.engine.begin() as conn:
            news = await course.note_sold_out(conn, sale.sale, sold_out)
            if news and sold_out:
                await self._event(conn, sale.sale, "sale.sold_out")
        self._sold_out[sale.sale] = sold_out
        return news

    async def _event(self, conn: AsyncConnection, sale_id: str, kind: str) -> None:
        sale = await sales.get(conn, sale_id)
        assert sale is not None
        await events.put(conn, kind, sale.id, sale.version, publish.event_data(sale))

    async def _switch(self, conn: AsyncConnection, sale_id: str) -> None:
        sale = await sales.get(conn, sale_id)
        assert sale is not None
        payload = {"version": sale.version, "changes": publish.switch_fields(sale)}
        await outbox.put(conn, "switch", sale.id, sale.epoch, payload)
