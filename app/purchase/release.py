"""Units go back, exactly once: unpaid orders expire, buyers leave, operators cancel, late money takes units again.

Giving back is Postgres first: the row changes, and an outbox row written in the same transaction tells Redis through a
script that knows what it has been told. Every crash in between leaves a unit in nobody's hands for a moment, never in
two. Postgres' clock decides what has passed.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, assert_never

import msgspec
import structlog
from prometheus_client import Counter as Count
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.answers import (
    AlreadyByte,
    ClosedForGood,
    Gone,
    Old,
    Refused,
    Short,
    Taken,
)
from app.errors import DidNotHappen, Unknown
from app.keys import FORMAT, GROUP, SaleKeys
from app.ledger import confirming, course, orders, outbox, payments, rebuilding, sms
from app.ledger.engine import alone, passes
from app.purchase.told import status_json
from app.redis.link import Link
from app.scripts import Scripts
from app.settings import Settings
from app.texts import still_true

LEASED_MAX = 200  # orders or outbox rows that one look takes
AT_ONCE = 16  # orders whose payment is cleared at a time
AGAIN_S = 2.0  # an order whose payment is unknown is looked at again after this
RETRY_MAX_S = 15.0  # an outbox row that Redis cannot take now is tried again after at most this

APPLIED = Count("fairdrop_outbox_rows", "outbox rows closed, by kind and how", ["kind", "how"])
ENDED = Count("fairdrop_orders_ended", "orders that ended unpaid, by reason", ["reason"])
_log = structlog.get_logger("release")

Decide = Callable[[AsyncConnection], Awaitable[None]]
Clear = Callable[[str], Awaitable[Literal["clear", "paid", "unknown"]]]
StartAttempt = Callable[[AsyncConnection, str, "PayAsk"], Awaitable[bool]]


class Ask(NamedTuple):
    """A buyer's wish about a ticket that holds units: `1|epoch|sku|seq|kind|arg|ms|buyer_id`."""

    entry_id: bytes
    epoch: int
    sku: str
    seq: int
    kind: str
    arg: str
    order_no: str
    buyer: str

    def of(self, sale: str, epoch: int) -> Ask:
        """The same wish about an order of another epoch."""
        return self._replace(
            epoch=epoch, order_no=orders.order_no(sale, epoch, self.sku, self.seq, self.buyer)
        )


class PayAsk(msgspec.Struct, frozen=True):
    """What a payment is asked with."""

    channel: str
    return_url: str | None = None
    payer: dict[str, Any] | None = None  # {sealed}: base64, see the front door's pay
    address: str | None = None  # the buyer's network address, sealed, in base64


def parse_ask(sale: str, entry: tuple[bytes, Sequence[bytes]]) -> Ask | None:
    """One entry of `asks`, format 1; None: it is no ask."""
    entry_id, fields = entry
    try:
        form, epoch, sku, seq, kind, arg, _ms, buyer = fields[1].split(b"|", 7)
        if fields[0] != b"a" or int(form) != FORMAT or kind not in (b"leave", b"pay"):
            return None
        name, number = sku.decode("ascii"), int(seq)
        who = buyer.decode("utf-8", "surrogateescape")
        no = orders.order_no(sale, int(epoch), name, number, who)
        return Ask(entry_id, int(epoch), name, number, kind.decode(), arg.decode("ascii"), no, who)
    except (ValueError, IndexError):
        return None


def parse_pay(arg: str) -> PayAsk | None:
    """base64url JSON {channel, return_url, payer, address}; None: the front door wrote something else."""
    try:
        return msgspec.json.decode(urlsafe_b64decode(arg + "=" * (-len(arg) % 4)), type=PayAsk)
    except (ValueError, msgspec.DecodeError):
        return None


Applied = Literal["done", "dropped", "later"]


@dataclass
class Releaser:
    """Everything that gives units back. `clear` and `start_attempt` are pay's: see app.worker for the wiring."""

    engine: AsyncEngine
    link: Link
    scripts: Scripts
    settings: Settings
    clear: Clear
    start_attempt: StartAttempt
    wrote: Callable[[], None] = lambda: None  # after something was written to the outbox

    # Expiry

    async def start_deadlines(self) -> int:
        """Orders without a payment link get their deadline all the same, link_wait_max_s after confirm."""
        async with self.engine.begin() as conn:
            started = await orders.start_overdue_deadlines(conn, self.settings.link_wait_max_s, LEASED_MAX)
        return len(started)

    async def expire(self) -> int:
        """End the unpaid orders whose deadline has passed. Returns how many ended."""
        async with alone(self.engine) as conn:
            held = await orders.lease_unpaid(conn, LEASED_MAX, self.settings.lease_s)
        return await self._end_all(held, self._expire_one)

    async def let_go(self) -> int:
        """Cancel the orders of buyers who asked to leave, once no payment can arrive. Returns how many ended."""
        async with alone(self.engine) as conn:
            held = await orders.lease_leaving(conn, LEASED_MAX, self.settings.lease_s)
        return await self._end_all(held, self._cancel_one)

    async def _end_all(
        self, held: Sequence[tuple[str, int]], end: Callable[[str, int], Awaitable[bool]]
    ) -> int:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(order_no: str, generation: int) -> bool:
            async with places:
                return await end(order_no, generation)

        results = await asyncio.gather(*(one(*pair) for pair in held), return_exceptions=True)
        ended = sum(result is True for result in results)
        if ended:
            self.wrote()
        for result in results:
            if isinstance(result, BaseException):
                raise result  # the others have been seen to; this one is tried again when its lease ends
        return ended

    async def _expire_one(self, order_no: str, generation: int) -> bool:
        return await self._end_one(
            order_no, generation, "unpaid", lambda conn: orders.expire(conn, order_no, generation)
        )

    async def _cancel_one(self, order_no: str, generation: int) -> bool:
        return await self._end_one(
            order_no, generation, "left", lambda conn: orders.cancel(conn, order_no, "left", generation)
        )

    async def _end_one(
        self,
        order_no: str,
        generation: int,
        reason: str,
        end: Callable[[AsyncConnection], Awaitable[Mapping[str, Any] | None]],
    ) -> bool:
        # First the supplier: money that may be on its way keeps the order. No transaction is open meanwhile.
        match await self.clear(order_no):
            case "clear":
                async with self.engine.begin() as conn:
                    # Under the order's lock nobody can begin a payment; somebody may have since we looked.
                    order = await orders.lock(conn, order_no)
                    begun = order is None or await payments.has_open(conn, order_no)
                    row = None if begun else await end(conn)
                if row is not None:
                    ENDED.labels(reason).inc()
                elif begun:
                    await self._keep(order_no, generation)
                return row is not None
            case "paid":
                return False
            case "unknown":
                await self._keep(order_no, generation)
                return False

    async def _keep(self, order_no: str, generation: int) -> None:
        """The supplier does not say whether it was paid: the order stays reserved, and after a while a person looks."""
        async with self.engine.begin() as conn:
            overdue = await orders.overdue_s(conn, order_no)
            long = overdue > self.settings.unknown_max_s
            await orders.postpone(conn, order_no, generation, AGAIN_S * (30 if long else 1))
        if long:
            alert(
                "payment_unknown",
                "the supplier has not said for too long whether an order was paid; it stays reserved",
                order_no=order_no,
                overdue_s=int(overdue),
            )

    # Asks

    async def answer_asks(self, sale: str, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> int:
        """Act on what buyers asked for; acknowledge what is settled. An ask whose order is not written yet waits."""
        done: list[bytes] = []
        for entry in entries:
            ask = parse_ask(sale, entry)
            try:
                if ask is None:
                    await self._bury(sale, entry, "shape")
                elif not await self._answer(sale, ask, entry):
                    continue
            except Exception as error:
                if passes(error) or isinstance(error, DidNotHappen | Unknown):
                    raise
                # No statement can hold it: it must not keep everybody behind it from being heard.
                _log.exception("ask_cannot_be_answered", sale=sale, entry=entry[0].decode())
                await self._bury(sale, entry, type(error).__name__)
            done.append(entry[0])
        if done:
            keys = SaleKeys(sale)
            give_up: list[tuple[str | bytes, ...]] = [
                ("MULTI",),
                ("XACK", keys.asks, GROUP, *done),
                ("XDEL", keys.asks, *done),
                ("EXEC",),
            ]
            for answer in await self.link.pipeline(give_up):
                if isinstance(answer, Exception):
                    raise answer
            self.wrote()
        return len(done)

    async def _answer(self, sale: str, ask: Ask, entry: tuple[bytes, Sequence[bytes]]) -> bool:
        """True: settled. False: the claim is still on its way to Postgres; ask again later."""
        pay = parse_pay(ask.arg) if ask.kind == "pay" else None
        if ask.kind == "pay" and pay is None:
            await self._bury(sale, entry, "arg")
        async with self.engine.begin() as conn:
            row = await orders.lock(conn, ask.order_no)
            if row is None and (born := await rebuilding.born(conn, sale, ask.sku, ask.seq)) < ask.epoch:
                # An order keeps its number through a rebuild; the wish has the epoch in which it was made.
                ask = ask.of(sale, born)
                row = await orders.lock(conn, ask.order_no)
            if row is None:
                if await confirming.refused(conn, [ask.order_no]):
                    return True
                terms = await confirming.terms(conn, sale)
                # Of an epoch that is over, or of a sale that is gone, no order will come.
                return terms is None or terms.epoch != ask.epoch
            if row["state"] != "reserved":
                if row["state"] in ("paid", "refunding"):
                    await orders.bump(conn, ask.order_no)  # the ask under way is taken off the ticket
                return True
            if ask.kind == "leave":
                await orders.ask_to_leave(conn, ask.order_no)
            elif row["leaving"] or pay is None or not await self.start_attempt(conn, ask.order_no, pay):
                await orders.bump(conn, ask.order_no)
            return True

    async def _bury(self, sale: str, entry: tuple[bytes, Sequence[bytes]], reason: str) -> None:
        async with self.engine.begin() as conn:
            buried = await confirming.bury(
                conn, sale, "asks", entry[0].decode(), {"raw": repr(list(entry[1]))}, reason
            )
        if buried:
            alert(
                "poison_ask",
                "an entry of asks is no ask and is in dead_letter",
                sale=sale,
                entry=entry[0].decode(),
            )

    # The outbox

    async def relay(self) -> int:
        """Tell Redis what Postgres has decided. Returns how many rows were closed."""
        async with alone(self.engine) as conn:
            rows = await outbox.lease(conn, LEASED_MAX, self.settings.lease_s)
            if not rows:
                return 0
            facts = await self._facts(conn, rows)
        results = await asyncio.gather(*(self._apply(row, facts) for row in rows))
        closed = 0
        async with self.engine.begin() as conn:
            for how in ("done", "dropped"):
                closed += await outbox.close(
                    conn,
                    [_held(row) for row, result in zip(rows, results, strict=True) if result == how],
                    how,
                )
            for row, result in zip(rows, results, strict=True):
                if result == "later":
                    await outbox.postpone(
                        conn, [_held(row)], min(RETRY_MAX_S, 0.05 * 2 ** min(row["tries"], 10))
                    )
        for row, result in zip(rows, results, strict=True):
            APPLIED.labels(row["kind"], result).inc()
        return closed

    async def _facts(self, conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> _Facts:
        """What the rows speak of, as it is now: one statement each, whatever the number of rows."""
        numbers = sorted({row["order_no"] for row in rows if row["order_no"] is not None})
        found = await orders.many(conn, numbers) if numbers else {}
        return _Facts(
            found,
            await orders.lines(conn, numbers) if numbers else {},
            await payments.newest_attempts(conn, numbers) if numbers else {},
            await sms.shown(conn, numbers) if numbers else {},
            await outbox.open_releases(conn, numbers) if numbers else set(),
            await course.epochs(conn, sorted({row["sale"] for row in rows})),
        )

    async def _apply(self, row: Mapping[str, Any], facts: _Facts) -> Applied:
        """One row: what Redis made of it. A lost answer is tried again, for every script knows what it has done."""
        try:
            match row["kind"]:
                case "mark":
                    result = await self._apply_mark(row, facts)
                case "release":
                    result = await self._apply_release(row, facts)
                case "stock_add":
                    result = await self._apply_stock_add(row)
                case "switch":
                    result = await self._apply_switch(row)
                case other:
                    raise ValueError(f"unknown outbox kind {other!r}")
        except (DidNotHappen, Unknown):
            return "later"
        except Exception:  # noqa: BLE001 - what nobody thought of: the row is tried again, and holds up no other
            _log.exception(
                "outbox_row_cannot_be_applied", outbox_id=row["id"], kind=row["kind"], sale=row["sale"]
            )
            return "later"
        if result == "later" and row["epoch"] < facts.epochs.get(row["sale"], row["epoch"]):
            return "dropped"  # OLD: a rebuild came between; what it read from Postgres holds this already
        return result

    async def _apply_mark(self, row: Mapping[str, Any], facts: _Facts) -> Applied:
        payload = row["payload"]
        order = facts.orders.get(row["order_no"])
        if order is None:
            byte, version, status = payload["byte"], payload["version"], payload["status"]
        elif row["order_no"] in facts.releases:
            # A mark of the same byte before the release would swallow the units. Afterwards it is needed: the release
            # may tell the row as it was before whatever this mark is for (a text for the ticket of an ended order).
            return "later"
        else:
            byte, version = orders.byte_of(order), order["version"]
            status = facts.status(order)
        answer = await self.scripts.ticket_mark(
            sale=row["sale"],
            epoch=row["epoch"],
            sku=payload["sku"],
            seq=payload["seq"],
            version=version,
            byte=byte.encode(),
            status_json=status,
        )
        return "later" if isinstance(answer, (Old, Gone)) else "done"

    async def _apply_release(self, row: Mapping[str, Any], facts: _Facts) -> Applied:
        payload = row["payload"]
        order = facts.orders.get(row["order_no"])
        if order is None:
            byte, version, status = payload["to"], payload["version"], payload["status"]
        else:
            ended = order["state"] in ("expired", "cancelled", "refunded")
            byte, version = (orders.byte_of(order) if ended else payload["to"]), order["version"]
            status = facts.status(order)
        answer = await self.scripts.units_release(
            sale=row["sale"],
            epoch=row["epoch"],
            sku=payload["sku"],
            seq=payload["seq"],
            units=payload["units"],
            version=version,
            to_byte=byte.encode(),
            status_json=status,
            work_max=self.settings.line_serve_max,
            backlog_max=self.settings.orders_backlog_max,
        )
        return "later" if isinstance(answer, (Old, Gone)) else "done"

    async def _apply_stock_add(self, row: Mapping[str, Any]) -> Applied:
        payload = row["payload"]
        answer = await self.scripts.stock_add(
            sale=row["sale"],
            epoch=row["epoch"],
            sku=payload["sku"],
            units=payload["units"],
            id=str(payload["id"]),
            work_max=self.settings.line_serve_max,
            backlog_max=self.settings.orders_backlog_max,
        )
        if isinstance(answer, Short):
            alert(
                "top_up_short",
                "units to be taken away are not in stock",
                sale=row["sale"],
                outbox_id=row["id"],
            )
        return "later" if isinstance(answer, (Old, Gone)) else "done"

    async def _apply_switch(self, row: Mapping[str, Any]) -> Applied:
        payload = row["payload"]
        if "item_paused" in payload:
            answer: object = await self.scripts.item_switch(
                sale=row["sale"], epoch=row["epoch"], sku=payload["sku"], paused=payload["item_paused"] == "1"
            )
        else:
            answer = await self.scripts.sale_switch(
                sale=row["sale"], epoch=row["epoch"], version=payload["version"], changes=payload["changes"]
            )
            if isinstance(answer, ClosedForGood):
                return "done"
        return "later" if isinstance(answer, (Old, Gone)) else "done"

    # Late money

    async def settle_late(
        self, order_no: str, *, kept: Decide, refused: Decide
    ) -> Literal["kept", "refused", "later"]:
        return await settle_late(self.engine, self.scripts, order_no, kept=kept, refused=refused)


@dataclass(frozen=True)
class _Facts:
    """The rows that a batch of outbox rows speaks of."""

    orders: dict[str, dict[str, Any]]
    lines: dict[str, list[dict[str, Any]]]
    attempts: dict[str, dict[str, Any]]
    texts: dict[str, dict[str, str]]  # by template, where no channel took them
    releases: set[str]  # orders whose units are still to be released
    epochs: dict[str, int]  # of the sales, by Postgres

    def status(self, order: Mapping[str, Any]) -> bytes:
        number = order["order_no"]
        said = still_true(self.texts.get(number, {}), order["state"])
        return status_json(order, self.lines.get(number, []), self.attempts.get(number), said)


def _held(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["id"], row["generation"]


class _Rebuilt(Exception):
    """The epoch in which Redis gave these units is over, and the new one counts them as free: roll back."""


async def settle_late(
    engine: AsyncEngine, scripts: Scripts, order_no: str, *, kept: Decide, refused: Decide
) -> Literal["kept", "refused", "later"]:
    """Money came for an order that has ended: it gets its units again, or the money goes back.

    `kept` or `refused` runs in the transaction that decides, with the order locked; both must be guarded by the
    state of the capture they change, for a decision may be reached twice. "later": ask again in a moment.

    The units: a release that no worker has begun is withdrawn, so Redis never knew. Else they are taken from Redis
    again, if nobody waits for them, before Postgres counts them as sold. A crash in between leaves them taken, and
    the next call is told so.
    """
    decided, row = await _withdraw(engine, order_no, kept, refused)
    if decided is not None:
        return decided
    assert row is not None
    answer = await scripts.units_retake(
        sale=row["sale"],
        epoch=row["epoch"],
        sku=row["sku"],
        seq=row["seq"],
        units=row["units"],
        version=row["version"],
    )
    match answer:
        case Taken() | AlreadyByte():
            return await _own_again(engine, order_no, kept, refused)
        case Refused():
            async with engine.begin() as conn:
                await orders.lock(conn, order_no)
                await refused(conn)
            return "refused"
        case Old() | Gone():
            async with engine.begin() as conn:
                epoch = (await course.epochs(conn, [row["sale"]])).get(row["sale"], row["epoch"])
                if epoch == row["epoch"] and not await course.is_settled(conn, row["sale"]):
                    return "later"  # Redis is away or not armed yet
                await orders.lock(conn, order_no)
                await refused(conn)
            return "refused"
        case _:
            assert_never(answer)


async def _withdraw(
    engine: AsyncEngine, order_no: str, kept: Decide, refused: Decide
) -> tuple[Literal["kept", "refused", "later"] | None, orders.Row | None]:
    """Decide by Postgres alone if it can: (decision, None), or (None, the ended order) if Redis must be asked."""
    async with engine.begin() as conn:
        row = await orders.lock(conn, order_no)
        if row is None or row["state"] in ("paid", "refunding", "refunded"):
            await refused(conn)
            return "refused", None
        if row["state"] == "reserved":
            await orders.pay(conn, order_no)
            await kept(conn)
            return "kept", None
        other = await orders.live_of_buyers(conn, row["sale"], [row["buyer_id"]])
        if other:
            # Whatever an earlier try has taken from Redis goes back; if it took nothing, the script says ALREADY.
            if not await outbox.open_releases(conn, [order_no]):
                await orders.release_again(conn, order_no)
            await refused(conn)
            return "refused", None
        match await outbox.cancel_release(conn, order_no):
            case "cancelled":
                await orders.revive(conn, order_no)
                await kept(conn)
                return "kept", None
            case "under_way":
                return "later", None
    return None, row


async def _own_again(
    engine: AsyncEngine, order_no: str, kept: Decide, refused: Decide
) -> Literal["kept", "refused", "later"]:
    """Redis has taken the units again: Postgres follows, or gives them back."""
    try:
        async with engine.begin() as conn:
            row = await orders.lock(conn, order_no)
            if row is not None and row["state"] in ("expired", "cancelled"):
                await orders.revive(conn, order_no)
                if not await orders.is_current(conn, row):
                    raise _Rebuilt
                await kept(conn)
                return "kept"
            await refused(conn)  # another capture was faster; guarded by the capture's own state
            return "refused"
    except IntegrityError as error:
        _log.info("late money meets a live order, it goes back", order_no=order_no, why=str(error.orig))
    except _Rebuilt:
        _log.info("late money meets a rebuild, it goes back", order_no=order_no)
    async with engine.begin() as conn:
        await orders.lock(conn, order_no)
        await orders.release_again(conn, order_no)
        await refused(conn)
    return "refused"
