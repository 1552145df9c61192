"""Claims become orders: stream → Postgres → status → XACK+XDEL, at least once, so that each claim has one outcome.

An entry of the stream holds the claims of one script call; a claim is named by the entry and its place in it, and each
has an outcome of its own. The order of steps is the safety: the row is committed before the buyer is told, and an entry
is given up when all its buyers are told. A worker that dies anywhere in between leaves the entry pending; whoever takes
it over meets the rows.

A batch is written by binary COPY. What COPY cannot say is found out by asking Postgres, the arbiter:
    a row exists            somebody wrote it before: tell its status again, change nothing
    the buyer has another   refused_claim `live_order`: ticket cancelled, units released through the outbox
    not enough units        Redis lied: the first in service order that fit are kept, the others cancelled *without*
                            giving units back, the item pauses, alert
    other epoch             refused_claim `old_epoch`: the units were never in this epoch's stock; nothing goes back
    cannot be written       bisected out, buried in dead_letter, released, alert
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, assert_never

import asyncpg
import msgspec
import structlog
from prometheus_client import Counter as Count
from prometheus_client import Histogram
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.answers import Gone, MarkedEach, Old
from app.buyer.contacts import index_of
from app.errors import DidNotHappen
from app.keys import FORMAT, SaleKeys
from app.ledger import confirming, orders, payments
from app.ledger.confirming import Kind, NewOrder, Terms
from app.ledger.engine import by_hand, passes, sqlstate_of
from app.purchase.told import refused_json, status_json
from app.redis.link import Link
from app.scripts import Scripts
from app.sealing import sealing_keys
from app.settings import Settings
from app.work.streams import Entry

SEQ_MAX = 2**53 - 1  # Redis' and Lua's integers
MARKS_MAX = 512  # tickets told in one call, two full entries: Redis answers nobody else for 1.5 ms
REMOVED_MAX = 500  # entries given up in one call
TRIES_MAX = 5  # Postgres changed under a batch that often: somebody else is at work, the entries stay pending

_FORMAT = b"%d" % FORMAT
IN_A_ROW = ("reserved", "again")  # outcomes of claims that have an order

CONFIRMED = Count("fairdrop_confirm_claims", "claims that got their outcome, by outcome", ["outcome"])
BATCH = Histogram("fairdrop_confirm_batch", "claims in one batch", buckets=(1, 2, 5, 10, 50, 100, 500, 1000))
TOOK = Histogram("fairdrop_confirm_s", "s from a batch read to its entries acknowledged")
_log = structlog.get_logger("confirm")


class Claim(msgspec.Struct, frozen=True, gc=False):
    """Units that Redis has taken for a ticket."""

    entry_id: bytes
    place: int  # in its entry, from 1
    epoch: int
    sku: str
    seq: int
    units: int
    claimed_ms: int
    buyer: bytes
    order_no: str

    @property
    def name(self) -> str:
        """What a dead letter is filed under."""
        return f"{self.entry_id.decode()}.{self.place}"

    @property
    def buyer_id(self) -> str:
        """As Postgres holds it; UnicodeDecodeError: it is no UTF-8, the claim is poison."""
        return self.buyer.decode()


class Bad(NamedTuple):
    """Something in the stream that is no claim. name: of the entry, or of the one claim among others."""

    entry_id: bytes
    name: str
    raw: bytes
    reason: str


def claims_in(entry: Entry) -> int:
    """How many claims an entry holds, as Redis counts them (`claims_open`): pairs, without the one they share."""
    return max(0, len(entry[1]) // 2 - 1)


def claims_of(entries: Iterable[Entry]) -> int:
    """How many claims these entries hold."""
    return sum(map(claims_in, entries))


def cut(entries: Iterable[Entry], claims_max: int) -> Iterator[list[Entry]]:
    """Batches of whole entries with at most so many claims; an entry that holds more is a batch by itself."""
    batch: list[Entry] = []
    held = 0
    for entry in entries:
        claims = claims_in(entry) or 1
        if batch and held + claims > claims_max:
            yield batch
            batch, held = [], 0
        batch.append(entry)
        held += claims
    if batch:
        yield batch


def parse(sale: str, entries: Iterable[Entry]) -> tuple[list[Claim], list[Bad]]:
    """Stream entries of format 1: `c` = `1|epoch|sku|claimed_ms`, then `seq:units` = buyer_id for each claim.

    The buyer_id may hold anything. What is wrong with one claim leaves the others of its entry what they are.
    """
    read: list[tuple[bytes, int, int, int]] = []
    named: list[tuple[int, str, int, bytes]] = []
    bad: list[Bad] = []
    for entry_id, fields in entries:
        shared = b""
        try:
            kind, shared, *claims = fields
            form, of_epoch, of_sku, of_ms = shared.split(b"|")
            epoch, sku, claimed_ms = int(of_epoch), of_sku.decode("ascii"), int(of_ms)
        except ValueError:
            bad.append(Bad(entry_id, entry_id.decode(), shared, "shape"))
            continue
        if kind != b"c" or form != _FORMAT or not claims or len(claims) % 2:
            bad.append(Bad(entry_id, entry_id.decode(), shared, "format"))
            continue
        for place, (ticket, buyer) in enumerate(zip(claims[::2], claims[1::2], strict=True), 1):
            of_seq, _, of_units = ticket.partition(b":")
            try:
                seq, units = int(of_seq), int(of_units)
            except ValueError:
                seq, units = 0, 0
            if 0 < seq <= SEQ_MAX and units > 0 and buyer:
                read.append((entry_id, place, units, claimed_ms))
                named.append((epoch, sku, seq, buyer))
            else:
                name = f"{entry_id.decode()}.{place}"
                bad.append(Bad(entry_id, name, b"%b|%b=%b" % (shared, ticket, buyer), "range"))
    return [
        Claim(entry_id, place, epoch, sku, seq, units, claimed_ms, buyer, no)
        for (entry_id, place, units, claimed_ms), (epoch, sku, seq, buyer), no in zip(
            read, named, orders.order_nos(sale, named), strict=True
        )
    ], bad


class Told(NamedTuple):
    """What Redis is told of a claim, after COMMIT. No byte: nothing (the outbox tells its ticket, or it is gone).

    The status is cut at the order number, so that all claims of a batch that differ in nothing else share one.
    """

    outcome: str  # reserved | again | live_order | no_stock | old_epoch | poison | ticket_taken
    byte: str = ""
    version: int = 0
    before: bytes = b""
    behind: bytes | None = None  # None: no order, `before` is all

    def status(self, order_no: str) -> bytes:
        """The JSON that the ticket shows."""
        return self.before if self.behind is None else self.before + order_no.encode() + self.behind


class _LookAgain(Exception):
    """Postgres changed between two statements; the transaction is rolled back and the batch asked again."""


@dataclass
class Confirmer:
    """Writes the claims of any sale. `link` is the shared one: nothing here blocks it."""

    engine: AsyncEngine
    link: Link
    scripts: Scripts
    settings: Settings
    supplier: Callable[[str, str], str] | None = (
        None  # of a payment channel, for an order's number; None: the preferred
    )

    def __post_init__(self) -> None:
        self._keys = sealing_keys(self.settings.pii_keys.get_secret_value())

    async def confirm(self, sale: str, entries: Iterable[Entry], *, careful: bool = False) -> int:
        """Give every claim its outcome and take the entries off the stream. Returns how many claims are done.

        careful: the batch may have been written before (redelivered, or COMMIT's answer was lost): ask first.
        Raises what `passes` (no Postgres, no Redis): nothing is acknowledged; call again with the same entries.
        """
        entries = list(entries)
        sizes = {entry[0]: claims_in(entry) for entry in entries}
        claims, bad = parse(sale, entries)
        for one in bad:
            await self._bury_bad(sale, one)
        BATCH.observe(len(claims) + len(bad))
        told: dict[str, Told] = {}
        contacts: dict[bytes, bytes] = {}
        if claims:
            contacts = await self._contacts(sale, claims)
            unique = list({claim.order_no: claim for claim in claims}.values())  # ten copies are one claim
            told = await self._write(sale, unique, contacts, careful=careful or len(unique) < len(claims))
        for outcome, count in Counter(result.outcome for result in told.values()).items():
            CONFIRMED.labels(outcome).inc(count)
        await self._forget(
            sale, [c.buyer for c in claims if c.buyer in contacts and told[c.order_no].outcome in IN_A_ROW]
        )
        held = await self._tell(sale, [(claim, told[claim.order_no]) for claim in claims], sizes)
        named = [claim.entry_id for claim in claims] + [one.entry_id for one in bad]
        return sum(entry_id not in held for entry_id in named)

    async def _contacts(self, sale: str, claims: Sequence[Claim]) -> dict[bytes, bytes]:
        """Sealed contacts that buyers gave with their passes: they move from Redis into the row."""
        key = SaleKeys(sale).contact
        if not await self.link.call("EXISTS", key):
            return {}
        buyers = list({claim.buyer for claim in claims})
        found = await self.link.call("HMGET", key, *buyers)
        return {buyer: sealed for buyer, sealed in zip(buyers, found, strict=True) if sealed is not None}

    # Postgres

    async def _write(
        self, sale: str, claims: Sequence[Claim], contacts: dict[bytes, bytes], *, careful: bool
    ) -> dict[str, Told]:
        """The outcome of every claim, committed. order_no → what Redis must be told."""
        if not careful:
            try:
                async with by_hand(self.engine) as conn:
                    return await self._copy(conn, sale, claims, contacts)
            except (asyncpg.UniqueViolationError, asyncpg.CheckViolationError, _LookAgain):
                pass  # some of them exist, or they are too many, or of another epoch: ask
            except Exception as error:
                if passes(error):
                    raise
        return await self._arbitrate_or_split(sale, claims, contacts)

    async def _copy(
        self, conn: AsyncConnection, sale: str, claims: Sequence[Claim], contacts: dict[bytes, bytes]
    ) -> dict[str, Told]:
        """The usual case: all are new, all fit."""
        terms = await confirming.terms(conn, sale)
        one_of_each = {(claim.sku, claim.epoch): claim for claim in claims}.values()
        if terms is None or not all(_current(terms, claim) for claim in one_of_each):
            raise _LookAgain
        new = await self._new_orders(conn, sale, claims, terms, contacts)
        await confirming.copy_orders(conn, new)
        await self._beside(conn, new, terms)
        if not await confirming.reserve(conn, sale, new):
            raise _LookAgain
        return self._reserved(new, terms)

    async def _arbitrate_or_split(
        self, sale: str, claims: Sequence[Claim], contacts: dict[bytes, bytes]
    ) -> dict[str, Told]:
        """Ask Postgres about each claim; halve the batch around a claim that no statement can hold."""
        lack, copy = False, True
        for _ in range(TRIES_MAX):
            try:
                async with by_hand(self.engine) as conn:
                    return await self._arbitrate(conn, sale, claims, contacts, lack=lack, copy=copy)
            except _LookAgain:
                continue
            except Exception as error:
                if passes(error) or isinstance(error, DidNotHappen):
                    raise
                if copy and isinstance(error, asyncpg.UniqueViolationError):
                    copy = False
                    continue
                if sqlstate_of(error) == asyncpg.CheckViolationError.sqlstate and not lack:
                    lack = True
                    continue
                if len(claims) == 1:
                    return {claims[0].order_no: await self._bury(sale, claims[0], error)}
                middle = len(claims) // 2
                return {
                    **await self._arbitrate_or_split(sale, claims[:middle], contacts),
                    **await self._arbitrate_or_split(sale, claims[middle:], contacts),
                }
        raise DidNotHappen(f"Postgres kept changing under {len(claims)} claims of {sale}")

    async def _arbitrate(
        self,
        conn: AsyncConnection,
        sale: str,
        claims: Sequence[Claim],
        contacts: dict[bytes, bytes],
        *,
        lack: bool,
        copy: bool,
    ) -> dict[str, Told]:
        """One transaction in which every claim meets what Postgres knows. lack: there are fewer units than claims.

        copy: if some were written before, that is why the batch is here, and the others are probably new: COPY them.
        """
        terms = await confirming.terms(conn, sale, lock=lack)
        if terms is None:
            raise DidNotHappen(
                f"Postgres does not know the sale {sale}"
            )  # a restored backup? the claims wait
        told = await self._before(conn, [claim.order_no for claim in claims])
        open_ = [claim for claim in claims if claim.order_no not in told]
        for claim in open_:
            if claim.sku not in terms.items:
                raise ValueError(f"no item {claim.sku}")
            if not _current(terms, claim):
                await self._refuse(conn, sale, claim, "old_epoch", returned=False, mark=False)
                told[claim.order_no] = Told("old_epoch")
        open_ = [claim for claim in open_ if claim.order_no not in told]
        if lack:
            for claim in self._too_many(open_, terms):
                await self._refuse(conn, sale, claim, "no_stock", returned=False)
                told[claim.order_no] = Told("no_stock", "k", 1, refused_json("no_stock"))
                if await confirming.pause_item(conn, sale, claim.sku, claim.epoch):
                    alert(
                        "stock_lack",
                        "Postgres has fewer units than Redis gave away: the item is paused",
                        sale=sale,
                        sku=claim.sku,
                    )
            open_ = [claim for claim in open_ if claim.order_no not in told]
        if open_:
            new = await self._new_orders(conn, sale, open_, terms, contacts)
            if copy and len(open_) < len(claims):
                await confirming.copy_orders(conn, new)
                written = {order.order_no for order in new}
            else:
                written = await confirming.insert_orders(conn, new)
            left_out = [claim for claim in open_ if claim.order_no not in written]
            if left_out:
                told |= await self._conflicts(conn, sale, left_out)
            new = [order for order in new if order.order_no in written]
            await self._beside(conn, new, terms)
            if not await confirming.reserve(conn, sale, new):
                raise _LookAgain
            told |= self._reserved(new, terms)
        return told

    async def _before(self, conn: AsyncConnection, numbers: Sequence[str]) -> dict[str, Told]:
        """Claims that have had their outcome: the row as it is now, or the refusal."""
        rows = await orders.many(conn, numbers)
        told: dict[str, Told] = {}
        alike: dict[tuple[Any, ...], list[str]] = {}
        attempts = await payments.newest_attempts(conn, list(rows)) if rows else {}
        for number, row in rows.items():
            attempt = attempts.get(number)
            if row["state"] not in ("reserved", "paid", "refunding"):
                told[number] = Told("again")  # the release in the outbox tells the rest
            elif row["version"] == 1 and (attempt is None or attempt["state"] == "created"):
                # As confirm wrote it: whatever came later has another version.
                of_sale = row["epoch"], row["sku"], row["units"], row["amount_minor"], row["currency"]
                alike.setdefault((*of_sale, attempt and attempt["channel"]), []).append(number)
            else:
                alike[number,] = [number]
        lines = await orders.lines(conn, [first for first, *_ in alike.values()]) if alike else {}
        for same in alike.values():
            row = rows[same[0]]
            status = status_json(row, lines.get(same[0], []), attempts.get(same[0]))
            before, _, behind = status.partition(same[0].encode())
            told |= dict.fromkeys(same, Told("again", orders.byte_of(row), row["version"], before, behind))
        for number in await confirming.refused(conn, numbers):
            told[number] = Told("again")  # so does its own outbox row
        return told

    async def _conflicts(self, conn: AsyncConnection, sale: str, claims: Sequence[Claim]) -> dict[str, Told]:
        """Why these were not inserted, as Postgres sees it now."""
        told = await self._before(conn, [claim.order_no for claim in claims])
        rest = [claim for claim in claims if claim.order_no not in told]
        live = await orders.live_of_buyers(conn, sale, [claim.buyer_id for claim in rest]) if rest else {}
        for claim in rest:
            other = live.get(claim.buyer_id)
            if other is not None:
                await self._refuse(conn, sale, claim, "live_order", returned=True, live_order=other)
                told[claim.order_no] = Told("live_order")
            elif await confirming.ticket_has_order(conn, sale, claim.sku, claim.epoch, claim.seq):
                # Redis gave one seq to two buyers. Its byte belongs to the other: touch neither ticket nor stock.
                await self._refuse(conn, sale, claim, "ticket_taken", returned=False, mark=False)
                told[claim.order_no] = Told("ticket_taken")
                alert("ticket_taken", "two claims with one ticket number", sale=sale, order_no=claim.order_no)
            else:
                raise _LookAgain  # the live order ended in the meantime
        return told

    def _too_many(self, claims: Sequence[Claim], terms: Terms) -> list[Claim]:
        """Those that do not fit. Claims are in service order (rank by rank), so the lowest ranks are kept."""
        free = {sku: item.free for sku, item in terms.items.items()}
        out: list[Claim] = []
        for claim in sorted(claims, key=_service_order):
            if claim.units <= free[claim.sku]:
                free[claim.sku] -= claim.units
            else:
                out.append(claim)
        return out

    async def _new_orders(
        self,
        conn: AsyncConnection,
        sale: str,
        claims: Sequence[Claim],
        terms: Terms,
        contacts: dict[bytes, bytes],
    ) -> list[NewOrder]:
        known: dict[str, bytes] = {}
        if terms.any_ended:
            silent = [claim.buyer_id for claim in claims if claim.buyer not in contacts]
            known = await orders.contacts_of_ended(conn, sale, silent) if silent else {}
        kinds: dict[tuple[str, int], Kind] = {}
        new: list[NewOrder] = []
        for claim in claims:
            kind = kinds.get((claim.sku, claim.units))
            if kind is None:
                item = terms.items[claim.sku]
                kind = kinds[claim.sku, claim.units] = Kind(
                    sale,
                    claim.sku,
                    claim.epoch,
                    claim.units,
                    claim.units * item.price_minor,
                    item.currency,
                    "reserved",
                    terms.pay_within_s,
                )
            contact = index = None
            if contacts or known:
                contact = contacts.get(claim.buyer) or known.get(claim.buyer_id)
                index = None if contact is None else index_of(self._keys, contact, sale, claim.buyer_id)
            new.append(
                NewOrder(claim.order_no, claim.buyer, claim.seq, claim.claimed_ms, contact, index, kind)
            )
        return new

    async def _beside(self, conn: AsyncConnection, new: Sequence[NewOrder], terms: Terms) -> None:
        await confirming.write_beside(
            conn,
            new,
            terms,
            supplier=self.supplier or (lambda _channel, _order_no: self.settings.payment_provider),
            sms_by=terms.now + timedelta(seconds=self.settings.sms_ttl_s),
        )

    def _reserved(self, new: Sequence[NewOrder], terms: Terms) -> dict[str, Told]:
        """What is told of rows that this transaction has just written: version 1, no deadline yet."""
        shared: dict[int, Told] = {}
        for order in new:
            if id(order.kind) not in shared:
                shared[id(order.kind)] = _reserved(order, terms)
        return {order.order_no: shared[id(order.kind)] for order in new}

    async def _refuse(
        self,
        conn: AsyncConnection,
        sale: str,
        claim: Claim,
        reason: str,
        *,
        returned: bool,
        mark: bool = True,
        live_order: str | None = None,
    ) -> None:
        await confirming.refuse(
            conn,
            claim.order_no,
            sale,
            claim.sku,
            claim.buyer.decode("utf-8", "backslashreplace").replace("\0", "\\x00"),
            claim.epoch,
            claim.seq,
            claim.units,
            reason=reason,
            returned=returned,
            told=refused_json(reason, live_order),
            mark=mark,
        )

    async def _bury(self, sale: str, claim: Claim, error: BaseException) -> Told:
        """One claim that no statement can hold: kept for a person, its units released, unless it has a row."""
        async with self.engine.begin() as conn:
            if found := await self._before(conn, [claim.order_no]):
                return found[claim.order_no]
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            entry = msgspec.structs.asdict(claim) | {
                "entry_id": claim.entry_id.decode(),
                "buyer": repr(claim.buyer),
            }
            await confirming.bury(conn, sale, "orders", claim.name, entry, reason)
            terms = await confirming.terms(conn, sale)
            # Of no item, or of an epoch that is over: Redis has nothing that could be told or get units back.
            here = terms is not None and _current(terms, claim)
            await self._refuse(conn, sale, claim, "poison", returned=here, mark=here)
        alert(
            "poison", "a claim could not be written and is in dead_letter", sale=sale, order_no=claim.order_no
        )
        return Told("poison")

    async def _bury_bad(self, sale: str, bad: Bad) -> None:
        """What is no claim: nothing is known that could be released."""
        async with self.engine.begin() as conn:
            buried = await confirming.bury(conn, sale, "orders", bad.name, {"raw": repr(bad.raw)}, bad.reason)
        if buried:
            alert(
                "poison",
                "something in orders is no claim and is in dead_letter",
                sale=sale,
                entry=bad.name,
            )

    # Redis

    async def _tell(
        self, sale: str, marks: Sequence[tuple[Claim, Told]], sizes: Mapping[bytes, int]
    ) -> set[bytes]:
        """Publish every status and give up every entry, none before its tickets were told. Returns those held.

        sizes: of every entry of the batch, how many claims it holds; some may hold nothing that is to be told.
        A Redis that restarted and is not armed again answers OLD: its entries wait until it is. OLD for an epoch that
        Postgres has left behind is final.
        """
        one_by_one, old, gone = await self._tell_together(sale, marks, sizes)
        old += await self.mark(sale, [pair for pair in one_by_one if pair[1].byte])
        held: set[bytes] = set()
        if old:
            async with self.engine.connect() as conn:
                terms = await confirming.terms(conn, sale)
            held = {claim.entry_id for claim in old if terms is not None and _current(terms, claim)}
        await self._acknowledge(
            sale, {one: claims for one, claims in sizes.items() if one not in gone and one not in held}
        )
        return held

    async def _tell_together(
        self, sale: str, marks: Sequence[tuple[Claim, Told]], sizes: Mapping[bytes, int]
    ) -> tuple[list[tuple[Claim, Told]], list[Claim], set[bytes]]:
        """Tickets whose rows are as new: by the hundred, whole entries given up in the same step.

        Returns what that leaves alone (somebody told the ticket something else, or its row has changed, or there are
        several claims for it), the claims that Redis refused as OLD, and the entries that are given up.
        """
        rest: list[tuple[Claim, Told]] = []
        old: list[Claim] = []
        gone: set[bytes] = set()
        alike: dict[tuple[Any, ...], dict[int, tuple[Claim, Told]]] = {}
        groups: dict[
            int, dict[int, tuple[Claim, Told]]
        ] = {}  # by what is told: claims that share it are alike
        for pair in marks:
            claim, what = pair
            group = groups.get(id(what))
            if group is None:
                if what.byte != "r" or what.version != 1 or what.behind is None:
                    rest.append(pair)
                    continue
                group = alike.setdefault((claim.epoch, claim.sku, what.before, what.behind), {})
                groups[id(what)] = group
            if group.setdefault(claim.seq, pair) is not pair:
                rest.append(pair)

        async def tell(part: Part) -> None:
            first, what = part.pairs[0]
            assert what.behind is not None
            try:
                answer = await self.scripts.claims_mark(
                    sale=sale,
                    epoch=first.epoch,
                    sku=first.sku,
                    before=what.before,
                    behind=what.behind,
                    seqs=[claim.seq for claim, _ in part.pairs],
                    order_nos=[claim.order_no for claim, _ in part.pairs],
                    entries=part.whole,
                )
            except DidNotHappen:
                rest.extend(part.pairs)  # memory is full: ticket_mark may run all the same
                return
            match answer:
                case MarkedEach():
                    left = (
                        [pair for pair, done in zip(part.pairs, answer.done, strict=True) if done == "0"]
                        if "0" in answer.done
                        else []
                    )
                    rest.extend(left)
                    gone.update({entry for entry, _ in part.whole} - {claim.entry_id for claim, _ in left})
                case Old():
                    old.extend(claim for claim, _ in part.pairs)
                case Gone():
                    # there is nobody to tell
                    rest.extend((claim, Told(what.outcome)) for claim, what in part.pairs)
                case _:
                    assert_never(answer)

        await asyncio.gather(
            *(tell(part) for group in alike.values() for part in _parts(list(group.values()), sizes))
        )
        return rest, old, gone

    async def mark(self, sale: str, marks: Sequence[tuple[Claim, Told]]) -> list[Claim]:
        """Tell each ticket what its row says; returns the claims that Redis refused as OLD."""
        answers = await asyncio.gather(
            *(
                self.scripts.ticket_mark(
                    sale=sale,
                    epoch=claim.epoch,
                    sku=claim.sku,
                    seq=claim.seq,
                    version=what.version,
                    byte=what.byte.encode(),
                    status_json=what.status(claim.order_no),
                    keep_ask=True,  # a buyer who asked to leave while claimed is still leaving
                )
                for claim, what in marks
            )
        )
        return [claim for (claim, _), answer in zip(marks, answers, strict=True) if isinstance(answer, Old)]

    async def _forget(self, sale: str, buyers: Sequence[bytes]) -> None:
        """Contacts that are in a row now leave Redis, before the entries that lead to them do."""
        if buyers:
            await self.link.call("HDEL", SaleKeys(sale).contact, *buyers)

    async def _acknowledge(self, sale: str, over: Mapping[bytes, int]) -> None:
        """Give entries up all of whose claims are over. over: how many claims each holds."""
        entries = list(over.items())
        for first in range(0, len(entries), REMOVED_MAX):
            await self.scripts.claims_remove(sale=sale, entries=entries[first : first + REMOVED_MAX])


class Part(NamedTuple):
    """Tickets told in one call: first those of entries that are told whole, as (id, claims), then all others."""

    pairs: list[tuple[Claim, Told]]
    whole: list[tuple[bytes, int]]


def _parts(pairs: Sequence[tuple[Claim, Told]], sizes: Mapping[bytes, int]) -> Iterator[Part]:
    """Tickets that are told alike, MARKS_MAX a call; an entry is not cut, so that it can go in the same step."""
    of_entry: dict[bytes, list[tuple[Claim, Told]]] = {}
    for pair in pairs:
        of_entry.setdefault(pair[0].entry_id, []).append(pair)
    loose: list[tuple[Claim, Told]] = []
    part = Part([], [])
    for entry_id, mine in of_entry.items():
        if len(mine) != sizes[entry_id]:
            loose += mine  # the others of its claims are told something else, or are none
            continue
        if part.pairs and len(part.pairs) + len(mine) > MARKS_MAX:
            yield part
            part = Part([], [])
        part.pairs.extend(mine)
        part.whole.append((entry_id, len(mine)))
    for pair in loose:
        if len(part.pairs) >= MARKS_MAX:
            yield part
            part = Part([], [])
        part.pairs.append(pair)
    if part.pairs:
        yield part


def _reserved(order: NewOrder, terms: Terms) -> Told:
    """What is told of an order that was just written, and of all that differ in nothing but the number."""
    kind = order.kind
    item = terms.items[kind.sku]
    row: dict[str, Any] = {
        **kind._asdict(), "order_no": order.order_no, "pay_by": None, "reason": None, "leaving": False
    }  # fmt: skip
    line = {
        "kind": "item",
        "sku": kind.sku,
        "title": item.title,
        "units": kind.units,
        "unit_minor": item.price_minor,
        "amount_minor": kind.amount_minor,
    }
    attempt: dict[str, Any] | None = None
    if terms.default_channel is not None and kind.amount_minor > 0:
        attempt = {"channel": terms.default_channel, "state": "created", "code": None, "kind": None}
    before, _, behind = status_json(row, [line], attempt).partition(order.order_no.encode())
    return Told("reserved", "r", 1, before, behind)


def _current(terms: Terms, claim: Claim) -> bool:
    item = terms.items.get(claim.sku)
    return item is not None and item.epoch == claim.epoch


def _service_order(claim: Claim) -> tuple[int, int, int]:
    ms, _, nth = claim.entry_id.partition(b"-")
    return int(ms), int(nth or 0), claim.place
