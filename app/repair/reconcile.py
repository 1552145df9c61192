"""Redis and Postgres compared, all the time: pulses, a restarted Redis armed again, books that agree, sales settled.

A Redis is a sale's home by its run_id. One that restarted from its own log (it was never a replica, and is not
behind the pulse that Postgres saw) is armed again; any other leaves the sale shut and calls a person: it may have
lost writes, and only a rebuild may open the sale then. That is done by itself once the sale has had no home for
`rebuild_after_s` and no other worker's pulse either: another worker may see the Redis that is its home. A primary that
sentinels or a cluster have elected is not waited for (docs/adr/0009).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import structlog
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from app import keys
from app.alarm import alert
from app.answers import (
    Armed,
    Behind,
    Gone,
    NotHome,
    Old,
    Pulsed,
)
from app.errors import DidNotHappen, Unknown
from app.keys import SaleKeys
from app.ledger import course, provider_routes, sales
from app.ledger.course import Home
from app.ledger.engine import alone
from app.ledger.rebuilding import REBUILDING
from app.providers.routes import encode
from app.purchase.admit import Admitter
from app.purchase.confirm import claims_of, parse
from app.redis import reading
from app.redis.link import Link
from app.repair.rebuild import NotNow, rebuild
from app.sale.publish import announce
from app.scripts import Scripts
from app.settings import Settings

BACKLOG_READ_MAX = 200_000  # claims in flight that are looked at: twice the default cap
TICKETS_A_CALL = 500  # statuses read at once: some 0.2 ms of Redis
NEVER_A_REPLICA = "0" * 40  # master_replid2 of a server that was not promoted
MENDS_AT_ONCE = 4  # rebuilds at a time, three connections to Postgres each
SURE_AFTER = (
    3  # comparisons in a row: the two stores are read one after the other, so one may catch a step half done
)

EXCESS = Gauge(
    "fairdrop_units_excess", "units in Redis beyond what Postgres has free; never above 0", ["sale", "sku"]
)
ARMED = Gauge("fairdrop_sale_armed", "1 while the connected Redis is the sale's home", ["sale"])
_log = structlog.get_logger("reconcile")


@dataclass(frozen=True)
class ItemBooks:
    """One item by both stores. At rest total = left + claimed + reserved + sold + to_release + to_add."""

    sku: str
    total: int
    reserved: int
    sold: int
    left: int | None  # units in Redis; None: Redis does not know the item
    claimed: int  # units of entries in `orders`; those written already count twice for a moment
    to_release: int
    to_add: int

    @property
    def excess(self) -> int:
        """Units that Redis could give away and Postgres does not have. Above 0 at rest: something lied."""
        free = self.total - self.reserved - self.sold - self.to_release - self.to_add
        return (self.left or 0) - free

    @property
    def surely_excess(self) -> int:
        """`excess` without units on their way: Redis may have given those to the next in line already, whose order is
        counted in `reserved`, while the outbox row is not yet marked done; then they count twice."""
        return max(0, self.excess - self.to_release - self.to_add)

    @property
    def missing(self) -> int:
        """Units in nobody's hands. 0 at rest; above 0 while a step is half done; that undersells, never oversells."""
        return -self.excess - self.claimed


@dataclass(frozen=True)
class Backlog:
    """Claims on their way to Postgres: as the scripts count them, and as the entries say."""

    made: int  # ever, in this epoch
    open: int
    counted: int | None  # None: the stream moved while it was read


@dataclass(frozen=True)
class Books:
    """A sale compared. open: this Redis is its home, in Postgres' epoch; only then can it give anything away."""

    sale: str
    items: tuple[ItemBooks, ...]
    backlog: Backlog
    open: bool = True

    @property
    def agree(self) -> bool:
        return all(item.excess + item.claimed == 0 for item in self.items)

    def report(self) -> dict[str, object]:
        return {
            "sale": self.sale,
            "agree": self.agree,
            "backlog": asdict(self.backlog),
            "items": [asdict(item) | {"excess": item.excess, "missing": item.missing} for item in self.items],
        }


async def compare(engine: AsyncEngine, link: Link, sale: str) -> Books:
    """Read both stores, Postgres first: what is claimed in between only makes Redis' side smaller."""
    async with alone(engine) as conn:
        counts = await course.counts(conn, sale)
    k = SaleKeys(sale)
    counts_of: tuple[tuple[str, ...], ...] = (
        ("HMGET", k.sale, "claims_made", "claims_open"), ("XLEN", k.orders)
    )  # fmt: skip
    stock, newest, armed, *before = answers = await link.pipeline(
        [
            ("HGETALL", k.stock),
            ("XREVRANGE", k.orders, "+", "-", "COUNT", 1),
            ("HMGET", k.sale, "epoch", "home"),
            *counts_of,
        ]
    )
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    upto = (
        newest[0][0] if newest else b"0-0"
    )  # claims as of now: those that come while this reads are not counted
    left = {sku.decode(): int(units) for sku, units in zip(stock[::2], stock[1::2], strict=True)}
    claimed: Counter[str] = Counter()
    counted = 0
    async for page in reading.pieces(link, k.orders, upto=upto, pairs_max=BACKLOG_READ_MAX):
        counted += claims_of(page)
        for claim in parse(sale, page)[0]:
            claimed[claim.sku] += claim.units
    still = counted < BACKLOG_READ_MAX // 2 and await link.pipeline(list(counts_of)) == before
    made, open_ = (int(value or 0) for value in before[0])
    return Books(
        sale,
        tuple(
            ItemBooks(
                one.sku,
                one.total,
                one.reserved,
                one.sold,
                left.get(one.sku),
                claimed[one.sku],
                one.to_release,
                one.to_add,
            )
            for one in counts
        ),
        Backlog(made, open_, counted if still else None),
        open=all(armed == [b"%d" % one.epoch, link.home_of(k.sale).encode()] for one in counts),
    )


async def copy_routes(engine: AsyncEngine, link: Link) -> bool:
    """Routes of suppliers that operators have set: Redis, which all processes follow, has what Postgres has again.

    Whether it had not. Redis is read first: what an operator changes in between is seen in Postgres, or found right.
    DidNotHappen, Unknown: Redis is away; the next look does it.
    """
    flat = await link.call("HGETALL", keys.PROVIDER_ROUTES)
    there = dict(zip(flat[::2], flat[1::2], strict=True))
    async with alone(engine) as conn:
        routes = await provider_routes.every(conn)
    wanted = {name.encode(): encode(route) for name, route in routes.items()}
    if there == wanted:
        return False
    changes: list[tuple[str | bytes | int, ...]] = [
        ("HSET", keys.PROVIDER_ROUTES, name, raw) for name, raw in wanted.items() if there.get(name) != raw
    ]
    if gone := there.keys() - wanted.keys():
        changes.append(("HDEL", keys.PROVIDER_ROUTES, *sorted(gone)))
    for answer in await link.pipeline(changes):
        if isinstance(answer, Exception):
            raise answer
    _log.warning("provider_routes_copied", changed=len(changes), routes=len(wanted))
    return True


@dataclass
class Reconciler:
    """The worker's part of reconcile. settings: None: sales are never rebuilt by themselves."""

    engine: AsyncEngine
    link: Link
    scripts: Scripts
    admitter: Admitter
    settings: Settings | None = None
    # sales without a home: the pulse that Postgres had then, when that was, and why
    _homeless: dict[str, tuple[int, float, str]] = field(default_factory=dict)
    _rebuilt_at: dict[str, float] = field(default_factory=dict)
    _mending: set[str] = field(default_factory=set)  # sales that this worker makes anew just now
    elected: asyncio.Event = field(default_factory=asyncio.Event)  # a sale is to be made anew without a wait
    _called: set[tuple[str, str, str]] = field(
        default_factory=set
    )  # alerts already given: (sale, kind, run_id)
    _excess: Counter[tuple[str, str]] = field(default_factory=Counter)

    def _call(self, kind: str, why: str, sale: str, **facts: object) -> None:
        """Alert once for each sale and Redis, not ten times a minute."""
        run_id = self.link.home_of(SaleKeys(sale).sale)
        known = (sale, kind, run_id)
        if known not in self._called:
            self._called.add(known)
            alert(kind, why, sale=sale, run_id=run_id, **facts)

    def _lost(self, home: Home, kind: str, why: str, *, at_once: bool = False, **facts: object) -> None:
        """The sale has no home in this Redis: a person is called, and a rebuild may come. at_once: without a wait."""
        ARMED.labels(home.sale).set(0)
        if home.sale in self._mending:
            return  # by this worker's own doing
        known = self._homeless.get(home.sale)
        if known is None or known[0] != home.pulse:  # or somebody's pulse: its home is elsewhere
            known = home.pulse, time.monotonic(), kind
        if at_once:
            known = home.pulse, time.monotonic() - self._wait_s, kind
            self.elected.set()
        self._homeless[home.sale] = known
        if kind != REBUILDING or self._is_due(
            known
        ):  # a rebuild under way is no news, one that does not end is
            self._call(kind, f"{why}: the sale is shut until it is rebuilt", home.sale, **facts)

    @property
    def _wait_s(self) -> float:
        return self.settings.rebuild_after_s if self.settings is not None else 0.0

    def _is_due(self, homeless: tuple[int, float, str]) -> bool:
        return time.monotonic() - homeless[1] >= self._wait_s

    async def mend(self) -> int:
        """Rebuild sales that have been without a home for long enough, several at once. Returns how many.

        A sale whose rebuild fails holds up no other; one of the failures is raised when all have been tried.
        """
        settings = self.settings
        if settings is None or not settings.rebuild_auto:
            return 0
        now = time.monotonic()
        due = [
            (sale, kind)
            for sale, (_, since, kind) in self._homeless.items()
            if now - since >= settings.rebuild_after_s
            and now - self._rebuilt_at.get(sale, -settings.rebuild_every_min_s)
            >= settings.rebuild_every_min_s
        ]
        places = asyncio.Semaphore(MENDS_AT_ONCE)

        async def one(sale: str, kind: str) -> bool:
            async with places:
                return await self._mend(settings, sale, kind)

        results = await asyncio.gather(*(one(*pair) for pair in due), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(result is True for result in results)

    async def _mend(self, settings: Settings, sale: str, kind: str) -> bool:
        """Rebuild one sale; False: it cannot be now, or somebody else does it."""
        self._rebuilt_at[sale] = time.monotonic()
        self._mending.add(sale)
        try:
            report = await rebuild(settings, self.link, self.scripts, sale, actor="worker", reason=kind)
        except NotNow as error:
            self._call("rebuild_refused", str(error), sale)
            return False
        except Exception:
            del self._rebuilt_at[sale]  # the loop's backoff is enough
            raise
        finally:
            self._mending.discard(sale)
        self._homeless.pop(sale, None)
        if report is not None:
            alert("sale_rebuilt", "a sale was made anew from Postgres", sale=sale, seconds=report.seconds)
        return report is not None

    async def pulse(self) -> int:
        """One pulse for each sale: first Redis, then Postgres. Arms what restarted. Returns how many sales beat."""
        async with alone(self.engine) as conn:
            homes = await course.homes(conn)
        for over in self._homeless.keys() - {home.sale for home in homes}:
            del self._homeless[over]  # settled meanwhile: nobody is to make it anew
        beaten: list[tuple[str, int, int]] = []
        away: DidNotHappen | Unknown | None = None
        for home in homes:
            if home.home is None:
                continue  # not published to Redis yet
            if home.home == REBUILDING:
                self._lost(home, REBUILDING, "a rebuild does not end")
                continue
            try:
                pulse = await self._beat(home)
            except (DidNotHappen, Unknown) as error:
                away = away or error  # of this sale's node of a cluster; the others beat on
                continue
            if pulse is not None:
                beaten.append((home.sale, home.epoch, pulse))
        if beaten:
            async with alone(self.engine) as conn:
                await course.note_pulses(conn, beaten)
            await self._relist([sale for sale, _, _ in beaten])
        if away is not None:
            raise away
        return len(beaten)

    async def _beat(self, home: Home) -> int | None:
        """The pulse that Redis took; None: the sale has no home there."""
        if home.home != self.link.home_of(SaleKeys(home.sale).sale) and not await self._arm(home):
            return None
        answer = await self.scripts.sale_pulse(sale=home.sale, epoch=home.epoch, pulse=home.pulse + 1)
        match answer:
            case Pulsed():
                ARMED.labels(home.sale).set(1)
                self._homeless.pop(home.sale, None)
                return answer.pulse
            case Gone():
                self._lost(home, "sale_gone", "Redis has lost a sale")
            case Old():
                self._lost(home, "sale_elsewhere", "Redis and Postgres disagree on a sale's home or epoch")
        return None

    async def _relist(self, beaten: Sequence[str]) -> None:
        """Sales that live and are not in the list of sales are listed again.

        In a cluster the list may be on another node than the sale, and a failover of that node loses entries.
        """
        listed = {name.decode() for name in await self.link.call("HKEYS", keys.SALES)}
        for sale_id in beaten:
            if sale_id not in listed:
                async with alone(self.engine) as conn:
                    sale = await sales.get(conn, sale_id)
                if sale is not None:
                    _log.warning("the list of sales had lost a sale", sale=sale_id)
                    await announce(self.link, sale)

    async def _arm(self, home: Home) -> bool:
        """Accept this Redis as the sale's home, if it is the old one, restarted from its own log."""
        server = self.link.at(SaleKeys(home.sale).sale)
        run_id = server.run_id
        if not server.connected:
            raise DidNotHappen("not connected to Redis")
        info = _info(await server.call("INFO", "replication"))
        if info.get("role") != "master":
            ARMED.labels(home.sale).set(0)
            self._call("replica", "this Redis is a replica: nothing can be written to it", home.sale)
            return False
        if info.get("master_replid2", NEVER_A_REPLICA) != NEVER_A_REPLICA:
            # Its election is final: the Redis of before can only come back as a replica, so it is not waited for.
            elected = await self.link.is_elected(SaleKeys(home.sale).sale)
            self._lost(home, "promoted", "Redis was a replica and may lack writes", at_once=elected)
            return False
        assert home.home is not None
        if lacks := await self._lacks(home):
            self._lost(home, "rolled_back", "Redis came back with an older state", lacks=lacks)
            return False
        answer = await self.scripts.sale_rearm(
            sale=home.sale, epoch=home.epoch, old_home=home.home, new_home=run_id, pulse_at_least=home.pulse
        )
        match answer:
            case Armed():
                pass
            case NotHome() if answer.home == run_id:
                pass  # another worker was faster, or this one died before it told Postgres
            case Behind():
                self._lost(
                    home,
                    "rolled_back",
                    "Redis came back with an older state",
                    pulse=answer.pulse,
                    pulse_seen=home.pulse,
                )
                return False
            case NotHome() if not answer.home:
                self._lost(home, REBUILDING, "a rebuild does not end")  # nothing else fences a sale
                return False
            case NotHome() | Old() | Gone():
                self._lost(
                    home,
                    "unknown_redis",
                    "this Redis does not hold the sale as Postgres knows it",
                    answer=type(answer).__name__,
                )
                return False
        async with self.engine.begin() as conn:
            await course.move_home(conn, home.sale, home.epoch, run_id)
        _log.warning(
            "another run_id with all writes (restarted from its log, or the slot moved): the sale is open again",
            sale=home.sale,
            run_id=run_id,
        )
        return True

    async def _lacks(self, home: Home) -> str:
        """What Postgres saw told to this Redis and it does not know: its log has lost its end, since the last pulse.

        The sale is shut meanwhile, so Redis stands still; what is told later only adds. Empty: nothing is missing.
        """
        async with alone(self.engine) as conn:
            told = await course.told(conn, home.sale, home.epoch)
        k = SaleKeys(home.sale)
        waiting = await reading.entries(self.link, k.orders, pairs_max=BACKLOG_READ_MAX)
        claims, _ = parse(home.sale, waiting)
        again = {(claim.sku, claim.seq) for claim in claims}  # told again, once the sale is open
        for at in range(0, len(told.tickets), TICKETS_A_CALL):
            page = told.tickets[at : at + TICKETS_A_CALL]
            found = await self.link.call("HMGET", k.status, *(f"{sku}:{seq}" for sku, seq, _ in page))
            for (sku, seq, version), status in zip(page, found, strict=True):
                knows = int(status.partition(b"|")[0]) if status else 0
                if knows < version and (sku, seq) not in again:
                    return f"{sku} seq {seq} at version {version}, it knows {knows}"
        for sku, top_up in told.added:
            if not await self.link.call("HEXISTS", k.item(sku), f"add:{top_up}"):
                return f"top-up {top_up} of {sku}"
        version, closed = await self.link.call("HMGET", k.sale, "version", "closed")
        if version is not None and int(version) < told.version and closed != b"1":
            return f"a change of the sale: version {told.version}, it knows {int(version)}"
        return ""

    async def compare_all(self) -> list[Books]:
        """Compare every sale that is not over; an excess that stays calls a person."""
        found: list[Books] = []
        for sale in list(self.admitter.watched):
            books = await compare(self.engine, self.link, sale)
            found.append(books)
            await self._count_again(sale, books.backlog)
            for item in books.items:
                # A shut sale gives nothing away, whatever an older Redis thinks it has: that is why it is made anew.
                excess = item.surely_excess if books.open else 0
                EXCESS.labels(sale, item.sku).set(excess)
                self._excess[sale, item.sku] = self._excess[sale, item.sku] + 1 if excess else 0
                if self._excess[sale, item.sku] >= SURE_AFTER:
                    self._call(
                        "excess",
                        "Redis has more units to give than Postgres has free",
                        sale,
                        sku=item.sku,
                        excess=excess,
                    )
        return found

    async def _count_again(self, sale: str, backlog: Backlog) -> None:
        """The number of open claims moves with the entries, in the same scripts; if it does not say what they hold,
        somebody else has written to the stream: it is set right, and a person is called."""
        watched = self.admitter.watched.get(sale)
        if backlog.counted is None or backlog.counted == backlog.open or watched is None:
            return
        self._call(
            "claims_miscounted",
            "the number of claims on their way is not what the stream holds; it is set right",
            sale,
            claims=backlog.counted,
            claims_open=backlog.open,
        )
        await self.scripts.claims_count(
            sale=sale, epoch=watched.epoch, made=backlog.made, open_=backlog.open, counted=backlog.counted
        )

    async def settle(self) -> int:
        """Closed sales in which nothing is left to happen are settled, and forgotten by the front doors."""
        async with alone(self.engine) as conn:
            closed = await course.closed(conn)
        settled = 0
        away: DidNotHappen | Unknown | None = None
        for sale in closed:
            k = SaleKeys(sale)
            try:
                waiting = [await self.link.call("XLEN", stream) for stream in (k.orders, k.asks)]
            except (DidNotHappen, Unknown) as error:
                away = error  # this sale's node of a cluster; the others are settled
                continue
            if any(waiting):
                continue
            async with self.engine.begin() as conn:
                if not await course.settle(conn, sale):
                    continue
            settled += 1
            _log.info("sale settled", sale=sale)
        for sale, version in await self._ended():
            # Contacts of those who never won have no purpose any more.
            await self.link.call("UNLINK", SaleKeys(sale).contact)
            await self.link.call("HSET", keys.SALES, sale, json.dumps({"version": version, "ended": True}))
        if away is not None:
            raise away
        return settled

    async def _ended(self) -> list[tuple[str, int]]:
        """Sales that Postgres calls settled and the front doors still watch: (sale, version)."""
        watched = list(self.admitter.watched)
        if not watched:
            return []
        async with alone(self.engine) as conn:
            return await course.settled_of(conn, watched)


def _info(found: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in found.decode().splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}
