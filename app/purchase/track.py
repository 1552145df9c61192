"""What a buyer is told at any moment: the ticket document, from arithmetic while waiting, from Redis when it matters.

A poll needs no Redis call while the ticket's rank lies behind `served` and its seq is one the snapshot knows. Every
other poll is read from Redis, many in one pipeline, so the states told never run backwards.
"""

from __future__ import annotations

import math
import random
from binascii import hexlify
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from app import alike
from app.batcher import Batcher, Full
from app.errors import DidNotHappen, Refusal
from app.keys import SaleKeys
from app.problems import refuse
from app.purchase.degrade.notices import of_ticket
from app.redis.link import Link
from app.sale.snapshot import Snapshots
from app.sale.view import ItemView, SaleView
from app.settings import Settings
from app.states import STATE_OF, TicketState
from app.tokens import Keyring, Ticket, ticket_id

READ_BATCH_MAX = 256  # tickets in one pipeline
READS_IN_FLIGHT_MAX = 2
FORMS_MAX = 1_000  # of statuses, 300 bytes each: a sale has a few an item
POLLS_PER_S = (
    5_000  # polls that a whole line may make in a second, roughly: the longer the line, the rarer each poll
)
ETA_PARTS = 3  # a buyer polls about this often before the expected turn
CLAIMED_POLL_MS = 700  # the order is being written: usually done within one poll
RESERVED_POLL_MS = 3_000
STARTING_POLL_MS = 1_000  # a payment link is on its way
REFUNDING_POLL_MS = 5_000
OPENING_SPREAD_MIN_MS = 1_500  # polls just after the opening are spread over at least this long
CLOSE_MARGIN_MS = (
    1_000  # around closes_ms only Redis' clock decides: ours may be ahead of a claim in the last moment
)
UNSETTLED_POLL_MS = 1_500  # open, but not drawn yet: the beacon is awaited

_ENDED = frozenset(
    {
        TicketState.SOLD_OUT,
        TicketState.CLOSED,
        TicketState.LEFT,
        TicketState.EXPIRED,
        TicketState.CANCELLED,
        TicketState.REFUNDED,
        TicketState.LAPSED,
    }
)
_WORDS = {byte: state.value.encode() for byte, state in STATE_OF.items()}
_ENDED_BYTES = frozenset(byte for byte, state in STATE_OF.items() if state in _ENDED)

_DOC = (
    b'{"ticket":"%b","ticket_id":"%b",%b,"units":%d,"state":"%b","leaving":%b,"seq":%d,"rank":%b,"ahead":%b,'
    b'"standby":%b,"eta_s":%b,"now_ms":%d,"poll_after_ms":%b,"message":%b,"reason":%b,"order":%b,"payment":%b}'
)
_BOOL = (b"false", b"true")
# The same to be filled in two steps: first what tickets of one item have in common, then what is each one's own.
_FORM = _DOC.replace(b"%d", b"%b")


class Status(msgspec.Struct):
    """The JSON part of a `status` value (app/purchase/told.py writes it)."""

    order: msgspec.Raw = msgspec.Raw(b"null")
    payment: msgspec.Raw = msgspec.Raw(b"null")
    leaving: bool = False
    reason: str | None = None
    text: msgspec.Raw = msgspec.Raw(b"null")  # what an SMS would have said, had a channel taken it


class _State(msgspec.Struct):
    state: str = "none"
    channel: str | None = None
    kind: str | None = None
    expires_at: str | None = None
    extended_s: int = 0


_status_of = msgspec.json.Decoder(Status).decode
_state_of = msgspec.json.Decoder(_State).decode


class Look(NamedTuple):
    """A ticket to read from Redis."""

    keys: SaleKeys
    sku: str
    epoch: int
    seq: int


class Seen(NamedTuple):
    """A ticket as Redis has it. byte: effective state. ask: `leave|…` or `pay|…` under way."""

    byte: bytes
    served: int
    next_seq: int
    status: Status | None
    ask: bytes

    @property
    def payment(self) -> _State:
        return _state_of(self.status.payment) if self.status and self.status.payment != b"null" else _State()

    @property
    def order_state(self) -> str:
        return self.of_order.state if self.status and self.status.order != b"null" else ""

    @property
    def of_order(self) -> _State:
        return _state_of(self.status.order) if self.status and self.status.order != b"null" else _State()


class Told(msgspec.Struct, frozen=True, gc=False):
    """An answer about a ticket: the document; what must be the same for nothing to have changed; when to ask again."""

    body: bytes
    key: bytes
    poll_after_ms: int | None

    @property
    def ended(self) -> bool:
        return self.poll_after_ms is None


class Tracker:
    """Makes ticket documents. One for a process; keeps nothing for a waiting buyer."""

    def __init__(self, settings: Settings, link: Link, ring: Keyring, snapshots: Snapshots) -> None:
        self._link = link
        self._ring = ring
        self._snapshots = snapshots
        self._poll_min_ms = settings.poll_min_ms
        self._poll_max_ms = settings.poll_max_ms
        self._forms: dict[str, bytes] = {}
        self._reads: Batcher[Look, Seen | None] = Batcher(
            self._read, READ_BATCH_MAX, READS_IN_FLIGHT_MAX, settings.batch_queue_max
        )
        self.read_count = 0  # tickets read from Redis
        self.read_batches = 0

    async def drain(self) -> None:
        """Wait for the reads under way."""
        await self._reads.drain()

    # --- finding -----------------------------------------------------------------------------------------------------

    def find(self, token: str) -> tuple[Ticket, SaleView, ItemView]:
        """The ticket that a token names, and what is known of its sale.

        Refusal 404 `no_such_ticket`: forged, bent, or of no sale here; nobody can tell. 503 `busy`: not known now.
        """
        ticket = self._ring.ticket_read(token)
        if ticket is None:
            raise refuse("no_such_ticket")
        view = self._snapshots.get(ticket.sale)
        if view is None:
            raise refuse("no_such_ticket") if self._snapshots.known_absent(ticket.sale) else stale()
        if ticket.item >= len(view.order):
            raise refuse("no_such_ticket")
        item = view.order[ticket.item]
        if ticket.epoch < view.epoch and item.goes_on(ticket.epoch, ticket.seq):
            ticket = msgspec.structs.replace(ticket, epoch=view.epoch)
        return ticket, view, item

    def owns(self, ticket: Ticket, item: ItemView, buyer_id: bytes) -> bool:
        """Whether the ticket is this buyer's: told from the token alone."""
        return self._ring.ticket_hash_is(ticket.ticket_hash, ticket.sale, item.sku, buyer_id)

    # --- while waiting: no Redis -------------------------------------------------------------------------------------

    def told_from_snapshot(self, token: str, ticket: Ticket, view: SaleView, item: ItemView) -> Told | None:
        """The document of a ticket that certainly waits (or left, closed, lapsed); None: Redis must be asked."""
        if ticket.epoch != view.epoch:
            return self._told_other_epoch(token, ticket, view, item)
        seq = ticket.seq
        if seq >= item.next_seq:
            return None
        rank = item.rank_of(seq)
        if rank is None:
            if item.served:
                return None
        elif rank <= item.served:
            return None
        now_ms = self._snapshots.now_ms()
        if seq in item.left:
            return self._ended(token, ticket, item, view, b"l", rank, now_ms)
        if view.closed or now_ms >= view.closes_ms + CLOSE_MARGIN_MS:
            return self._ended(token, ticket, item, view, b"x", rank, now_ms)
        if now_ms >= view.closes_ms:
            return None
        return self._waiting(token, ticket, view, item, rank, now_ms)

    def _told_other_epoch(self, token: str, ticket: Ticket, view: SaleView, item: ItemView) -> Told | None:
        """A ticket of an epoch that was lost with Redis has lapsed; one of a newer epoch is not known here yet."""
        if ticket.epoch > view.epoch:
            raise stale()
        return self._ended(token, ticket, item, view, b"o", None, self._snapshots.now_ms())

    def _waiting(
        self, token: str, ticket: Ticket, view: SaleView, item: ItemView, rank: int | None, now_ms: int
    ) -> Told:
        standby = view.standby and item.units_left <= 0 and now_ms >= view.opens_ms
        eta = b"null"
        if rank is None:
            rank_told = ahead_told = b"null"
            if now_ms < view.opens_ms:
                spread = max(
                    OPENING_SPREAD_MIN_MS, min(self._poll_max_ms, item.waiting * 1000 // POLLS_PER_S)
                )
                poll_ms = view.opens_ms - now_ms + 200 + int(random.random() * spread)
            else:
                poll_ms = self._jittered(UNSETTLED_POLL_MS)
        else:
            ahead = rank - item.served - 1
            if ahead < 0:
                ahead = 0
            rank_told, ahead_told = b"%d" % rank, b"%d" % ahead
            if now_ms < view.opens_ms:
                poll_ms = view.opens_ms - now_ms + 200 + int(random.random() * OPENING_SPREAD_MIN_MS)
            elif standby or view.paused or item.paused:
                poll_ms = self._jittered(self._poll_max_ms)
            else:
                p50, p90 = self.wait_s(view, item, ahead)
                if p50 is None:
                    # No rate is known: spread the polls by the line's length.
                    poll_ms = self._jittered(max(self._poll_min_ms, item.waiting * 1000 // POLLS_PER_S))
                else:
                    eta = b'{"p50":%d,"p90":%d}' % (p50, p90)
                    poll_ms = self._jittered(p50 * 1000 // ETA_PARTS)
        body = _DOC % (
            token.encode("ascii"),
            ticket_id(ticket),
            item.head,
            ticket.units,
            b"waiting",
            b"false",
            ticket.seq,
            rank_told,
            ahead_told,
            _BOOL[standby],
            eta,
            now_ms,
            b"%d" % poll_ms,
            view.message_json,
            b"null",
            b"null",
            b"null",
        )
        # the same while nothing but the place moves
        return Told(body, b"w" if rank is None else b"W", poll_ms)

    def wait_s(self, view: SaleView, item: ItemView, ahead: int) -> tuple[int | None, int]:
        """Seconds until the ticket is served: (p50, p90). (None, 0) if nothing is known."""
        fast, slow = item.p50_per_s, item.p90_per_s
        if not fast:
            if view.rate_milli <= 0:
                return None, 0
            fast = view.rate_milli / 1000
            slow = fast / 2
        slow = max(slow or 0.0, fast / 4)  # one empty second says little
        return math.ceil((ahead + 1) / fast), math.ceil((ahead + 1) / slow)

    def _spread(self, wait_ms: int) -> tuple[float, float]:
        """The least time to wait, and how much of chance comes on top."""
        if wait_ms < self._poll_min_ms:
            wait_ms = self._poll_min_ms
        if wait_ms > self._poll_max_ms:
            wait_ms = self._poll_max_ms
        return 0.85 * wait_ms, 0.3 * wait_ms

    def _jittered(self, wait_ms: int) -> int:
        least, span = self._spread(wait_ms)
        return int(least + span * random.random())

    def _ended(
        self,
        token: str,
        ticket: Ticket,
        item: ItemView,
        view: SaleView,
        byte: bytes,
        rank: int | None,
        now_ms: int,
    ) -> Told:
        body = _DOC % (
            token.encode("ascii"),
            ticket_id(ticket),
            item.head,
            ticket.units,
            _WORDS[byte],
            b"false",
            ticket.seq,
            b"null" if rank is None else b"%d" % rank,
            b"null",
            b"false",
            b"null",
            now_ms,
            b"null",
            view.message_json,
            b"null",
            b"null",
            b"null",
        )
        return Told(body, byte, None)

    # --- what Redis says ---------------------------------------------------------------------------------------------

    async def seen(self, view: SaleView, sku: str, seq: int) -> Seen | None:
        """The ticket as Redis has it now, read together with others. None: the sale has another epoch or home by now.

        Refusal 503 `busy`; DidNotHappen, Unknown: Redis did not answer.
        """
        try:
            return await self._reads.submit(Look(view.keys, sku, view.epoch, seq))
        except Full:
            raise stale() from None

    async def _read(self, looks: list[Look]) -> list[Seen | None]:
        """One pipeline. Within it the item is read before the outcome: a `w` at or below dead_seq is dead for good."""
        groups: dict[tuple[str, str], list[int]] = {}
        for at, look in enumerate(looks):
            groups.setdefault((look.keys.prefix, look.sku), []).append(at)
        asked: list[tuple[Any, ...]] = [("TIME",)]
        for places in groups.values():
            keys, sku = looks[places[0]].keys, looks[places[0]].sku
            asked.append(("HMGET", keys.sale, "epoch", "home", "closed", "closes_ms"))
            asked.append(("HMGET", keys.item(sku), "served", "dead_seq", "next_seq"))
            outcome = keys.outcome(sku)
            fields: list[str] = []
            for at in places:
                seq = looks[at].seq
                asked.append(("GETRANGE", outcome, seq - 1, seq - 1))
                fields += (f"{sku}:{seq}", f"{sku}:{seq}:a")
            # After the outcomes: a status found here is at least as new as the byte.
            asked.append(("HMGET", keys.status, *fields))
        replies = await self._link.pipeline(asked)
        broken = [reply for reply in replies if isinstance(reply, Exception)]
        if broken and len(groups) == 1:
            raise DidNotHappen(f"a read was refused: {broken[0]}")
        self.read_count += len(looks)
        self.read_batches += 1
        found: list[Seen | None] = [None] * len(looks)
        unread: dict[tuple[SaleKeys, str], list[tuple[int, bytes]]] = {}
        if isinstance(replies[0], Exception):
            now_ms = self._snapshots.now_ms()
        else:
            now_ms = int(replies[0][0]) * 1000 + int(replies[0][1]) // 1000
        cursor = 1
        for places in groups.values():
            keys = looks[places[0]].keys
            if broken and any(
                isinstance(reply, Exception) for reply in replies[cursor : cursor + 3 + len(places)]
            ):
                cursor += 3 + len(places)
                continue  # its node of a cluster is away: nobody knows
            epoch, home, closed, closes_ms = replies[cursor]
            served, dead_seq, next_seq = (int(value or 0) for value in replies[cursor + 1])
            outcomes = replies[cursor + 2 : cursor + 2 + len(places)]
            statuses = replies[cursor + 2 + len(places)]
            cursor += 3 + len(places)
            here = epoch is not None and (home or b"").decode() == self._link.home_of(keys.sale)
            over = closed == b"1" or now_ms >= int(closes_ms or 0)
            for number, at in enumerate(places):
                look = looks[at]
                if not here or int(epoch) != look.epoch:
                    continue
                byte = outcomes[number]
                if byte in (b"", b"\x00"):
                    byte = b"o"
                elif byte == b"w":
                    if look.seq <= dead_seq:
                        byte = b"s"
                    elif over:
                        byte = b"x"
                status = None
                raw = statuses[2 * number]
                if raw:
                    _, byte, text = raw.split(b"|", 2)
                    like = alike.cut(text)
                    if like is None:
                        status = _status_of(text)
                    elif like[0] in self._forms:
                        status = _status_of(alike.filled(self._forms[like[0]], like[1]))
                    else:
                        unread.setdefault((look.keys, like[0]), []).append((at, like[1]))
                found[at] = Seen(byte, served, next_seq, status, statuses[2 * number + 1] or b"")
        if unread:
            await self._read_forms(unread, found)
        return found

    async def _read_forms(
        self, unread: Mapping[tuple[SaleKeys, str], list[tuple[int, bytes]]], found: list[Seen | None]
    ) -> None:
        """Fill in the statuses whose form this process has not met. A form that is gone went with its epoch."""
        forms = await self._link.pipeline(
            [("HGET", keys.status, alike.field_of(name)) for keys, name in unread]
        )
        if len(self._forms) > FORMS_MAX:
            self._forms.clear()
        for ((_, name), tickets), form in zip(unread.items(), forms, strict=True):
            known = form is not None and not isinstance(form, Exception)
            if known:
                self._forms[name] = form
            for at, order_no in tickets:
                seen = found[at]
                status = _status_of(alike.filled(form, order_no)) if known else None
                found[at] = seen._replace(status=status) if seen is not None and known else None

    def told_from_redis(
        self, token: str, ticket: Ticket, view: SaleView, item: ItemView, seen: Seen, mine: bool
    ) -> Told:
        """The document of a ticket as Redis has it. `order` and `payment` only if it is the caller's own."""
        if seen.served > item.served:
            item.served = seen.served
        if seen.next_seq > item.next_seq:
            item.next_seq = seen.next_seq
        rank = item.rank_of(ticket.seq)
        now_ms = self._snapshots.now_ms()
        byte = seen.byte
        if byte == b"w":
            return self._waiting(token, ticket, view, item, rank, now_ms)
        status = seen.status
        if status is None and byte in _ENDED_BYTES:
            return self._ended(token, ticket, item, view, byte, rank, now_ms)
        state = STATE_OF[byte]
        in_hand = state is TicketState.CLAIMED or state is TicketState.RESERVED
        leaving = in_hand and (seen.ask.startswith(b"leave|") or (status is not None and status.leaving))
        order = payment = reason = text = b"null"
        poll: int | None = None
        starting = False
        if status is not None:
            order, payment = bytes(status.order), bytes(status.payment)
            reason, text = msgspec.json.encode(status.reason), bytes(status.text)
            starting = seen.payment.state in ("starting", "unknown")
        if state is TicketState.RESERVED and seen.ask.startswith(b"pay|"):
            channel = seen.ask.split(b"|", 2)[2].decode()
            payment = payment_starting(channel)
            starting = True
        if state is TicketState.CLAIMED:
            poll = self._jittered(CLAIMED_POLL_MS)
        elif state is TicketState.RESERVED:
            poll = self._jittered(STARTING_POLL_MS if starting or leaving else RESERVED_POLL_MS)
        elif seen.order_state == "refunding":
            poll = self._jittered(REFUNDING_POLL_MS)
        notice = of_ticket(view.notices, byte, seen.of_order.extended_s if byte == b"r" else 0)
        key = b"|".join((byte, _BOOL[leaving], order, payment, reason, text, notice))
        if not mine:
            order = payment = text = b"null"
        body = _DOC % (
            token.encode("ascii"),
            ticket_id(ticket),
            item.head,
            ticket.units,
            _WORDS[byte],
            _BOOL[leaving],
            ticket.seq,
            b"null" if rank is None else b"%d" % rank,
            b"0" if in_hand else b"null",
            b"false",
            b"null",
            now_ms,
            b"null" if poll is None else b"%d" % poll,
            view.message_json if text == b"null" else text,
            reason,
            order,
            payment,
        )
        if notice and mine:
            body = b'%b,"notice":%b}' % (body[:-1], notice)
        return Told(body, key, poll)

    def claimed_form(self, view: SaleView, item: ItemView) -> Callable[[bytes, int, int, bytes], bytes]:
        """For tickets claimed this moment, with no order yet: fill(token, seq, units, ticket_hash) is the document."""
        form = _FORM % (
            b"%b",
            b"%d-%b",
            item.head,
            b"%d",
            b"claimed",
            b"false",
            b"%d",
            b"%b",
            b"0",
            b"false",
            b"null",
            b"%d" % self._snapshots.now_ms(),
            b"%d",
            view.message_json.replace(b"%", b"%%"),
            b"null",
            b"null",
            b"null",
        )
        rank_of, random_part = item.rank_of, random.random
        least, span = self._spread(CLAIMED_POLL_MS)

        def fill(token: bytes, seq: int, units: int, ticket_hash: bytes) -> bytes:
            rank = rank_of(seq)
            rank_told = b"null" if rank is None else b"%d" % rank
            poll_ms = int(least + span * random_part())
            return form % (token, seq, hexlify(ticket_hash), units, seq, rank_told, poll_ms)

        return fill

    def told_joined(self, token: str, ticket: Ticket, view: SaleView, item: ItemView) -> bytes:
        """The document of a ticket that has just begun to wait."""
        rank = item.rank_of(ticket.seq)
        return self._waiting(token, ticket, view, item, rank, self._snapshots.now_ms()).body

    def told_left(self, token: str, ticket: Ticket, view: SaleView, item: ItemView) -> Told:
        """The document of a ticket that has just left the line."""
        return self._ended(
            token, ticket, item, view, b"l", item.rank_of(ticket.seq), self._snapshots.now_ms()
        )

    async def told(self, token: str, ticket: Ticket, view: SaleView, item: ItemView, mine: bool) -> Told:
        """The document, from wherever it is known. Refusal 503 `busy` while nothing reliable is known."""
        if not self._snapshots.usable(view):
            raise stale()
        told = self.told_from_snapshot(token, ticket, view, item)
        if told is not None:
            return told
        seen = await self.seen(view, item.sku, ticket.seq)
        if seen is None:
            raise stale()
        return self.told_from_redis(token, ticket, view, item, seen, mine)

    async def newest(self, view: SaleView, buyer_id: bytes) -> tuple[str, int, int] | None:
        """The buyer's newest ticket of a sale: (sku, seq, units), None if there is none."""
        reply = (await self._link.pipeline([("HGET", view.keys.buyers, buyer_id)]))[0]
        if isinstance(reply, Exception):
            raise DidNotHappen(f"a read was refused: {reply}")
        if reply is None:
            return None
        sku, seq, units = reply.decode().rsplit(":", 2)
        return sku, int(seq), int(units)

    def token_of(
        self, view: SaleView, item: ItemView, seq: int, units: int, buyer_id: bytes
    ) -> tuple[str, Ticket]:
        """The signed ticket of a place in the line; the same for the same place, whoever makes it."""
        ticket = Ticket(
            view.id,
            view.epoch,
            item.position,
            seq,
            units,
            self._ring.ticket_hash(view.id, item.sku, buyer_id),
        )
        return self._ring.ticket_sign(ticket), ticket


def payment_starting(channel: str) -> bytes:
    """`payment` of a request that the worker has not read yet."""
    told: Mapping[str, Any] = {
        "channel": channel,
        "state": "starting",
        "kind": None,
        "url": None,
        "params": None,
        "expires_at": None,
        "code": None,
    }
    return msgspec.json.encode(told)


def stale() -> Refusal:
    """503 `busy` with a spread Retry-After: nothing reliable is known just now."""
    return refuse(
        "busy",
        "The line is not reachable just now; repeat the same request.",
        retry_after_s=random.randint(1, 3),
    )
