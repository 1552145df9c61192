"""A crowd of simulated buyers who do over HTTP what people do on their phones, and remember what they were told.

Used by `fairdrop demo`. It knows the contract only (buyers' HTTP API): no store, no script, no internal name. What
every buyer was told is kept, so that afterwards the shop's books can be compared with the buyers' memories.

One process drives some thousand buyers beside the servers on two cores, so the client is lean: keep-alive connections
shared by all buyers (a browser would hold one each; the servers cannot tell), one parser in C (httptools), no cookies,
no redirects.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from app.errors import FairdropError, Unknown
from app.record import Recorder
from app.states import ARROWS, TicketState

CONNECTIONS_MAX = (
    192  # to one server; well under the usual limit of 1,024 open files, enough to fill its batches
)
REQUEST_DEADLINE_S = 10.0
TRIES_MAX = 20  # of one request that may be repeated; with Retry-After this bridges a restart of any server
RETRY_AFTER_MAX_S = 5.0  # a demo does not wait longer, whatever it is told
KNOWN_STATES = frozenset(state.value for state in TicketState)
POLL_UNKNOWN_S = 0.5  # before asking again after an answer without a ticket in it


class Answer(NamedTuple):
    """One HTTP answer: status, body as it came, and Retry-After in seconds if it was given."""

    status: int
    body: bytes
    retry_after_s: float | None

    def json(self) -> Any:
        return msgspec.json.decode(self.body) if self.body else None


class _Wire(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.open = False
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not a subclass
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Unknown(f"connection lost: {exc or 'closed by the server'}"))

    def ask(self, request: bytes, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Answer]:
        assert self.transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._retry_after: float | None = None
        self._answer = loop.create_future()
        self.transport.write(request)
        return self._answer

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio and httptools call the rest
    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(Unknown(f"not HTTP: {error}"))
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 11 and name.lower() == b"retry-after":
            self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(
                Answer(self._parser.get_status_code(), b"".join(self._body), self._retry_after)
            )


class Wires:
    """Keep-alive connections to one server, shared by everyone who asks it something."""

    def __init__(
        self, url: str, *, connections_max: int = CONNECTIONS_MAX, deadline_s: float = REQUEST_DEADLINE_S
    ) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 80
        self._head = f" HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n".encode()
        self._deadline_s = deadline_s
        self._idle: list[_Wire] = []
        self._places = asyncio.Semaphore(connections_max)

    async def _wire(self) -> _Wire:
        while self._idle:
            wire = self._idle.pop()
            if wire.open:
                return wire
        loop = asyncio.get_running_loop()
        try:
            _, wire = await loop.create_connection(_Wire, self._host, self._port)
        except OSError as error:
            raise Unknown(f"no connection to port {self._port}: {error}") from error
        return wire

    async def ask(self, method: str, path: str, headers: bytes = b"", body: bytes | None = None) -> Answer:
        """Send one request and return the answer. Unknown: none came; repeat only what may be repeated.

        headers: whole lines, each ending in CR LF.
        """
        if body is None:
            tail = b"Content-Length: 0\r\n\r\n" if method != "GET" else b"\r\n"
        else:
            tail = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        request = b"".join((method.encode(), b" ", path.encode(), self._head, headers, tail))
        async with self._places:
            wire: _Wire | None = None
            try:
                async with asyncio.timeout(self._deadline_s):
                    wire = await self._wire()
                    answer = await wire.ask(request, asyncio.get_running_loop())
            except TimeoutError as error:
                if wire is not None:
                    wire.close()
                raise Unknown(f"no answer within {self._deadline_s:.0f} s: {method} {path}") from error
            except BaseException:
                if wire is not None:
                    wire.close()
                raise
            if wire.open:
                self._idle.append(wire)
            return answer

    def close(self) -> None:
        for wire in self._idle:
            wire.close()
        self._idle.clear()


class Doing(NamedTuple):
    """What a request is for, in a history: the operation, who wants it, and which of their hands does it."""

    op: str
    buyer: str
    process: str = ""


class Surprise(FairdropError):
    """A buyer was answered something that the contract does not have."""


@dataclass(slots=True)
class Buyer:
    """One person (or bot): what they intend, then what they were told."""

    buyer_id: str
    arrives_s: float  # relative to the opening; before it: joins the draw
    think_s: float  # from the payment link to the payment
    taps: int = 1  # bots tap more than once, all at the same moment
    pays: bool = True
    pays_late: bool = False  # opens the link in time, and lets the money go after the deadline
    leaves: Literal["", "waiting", "won"] = ""
    phone: str | None = None  # gets a pass and leaves a number for SMS
    state: str = "away"
    states: list[str] = field(default_factory=list)  # every state told, in order
    ticket: str = ""
    ticket_ids: set[str] = field(default_factory=set)
    order_no: str | None = None
    was_standby: bool = False
    pay_url: str | None = None
    bent: str = ""  # a state that cannot follow the one before


def cast_crowd(buyers: int, units: int, seed: int) -> list[Buyer]:
    """The crowd of one demo. The same numbers and seed give the same people.

    Two thirds come before the minute and are drawn; the others come in a rush at it. One in fifty is a bot. One in six
    winners does not pay, one in twenty-five gives the unit back, one in a hundred and fifty pays too late.
    """
    dice = random.Random(seed)
    crowd: list[Buyer] = []
    for number in range(buyers):
        early = dice.random() < 0.66
        buyer = Buyer(
            buyer_id=f"b{seed}-{number:05d}",
            arrives_s=-dice.random() if early else dice.expovariate(2.0),
            think_s=0.2 + dice.expovariate(1.5),
        )
        fate = dice.random()
        if fate < 0.16:
            buyer.pays = False
        elif fate < 0.20:
            buyer.leaves = "won"
        elif fate < 0.23:
            buyer.leaves = "waiting"
        elif fate < 0.237:
            buyer.pays_late = True
        if dice.random() < 0.02:
            buyer.taps = 10
        if early and dice.random() < 0.8:
            buyer.phone = f"+86138{dice.randrange(10**8):08d}"
        crowd.append(buyer)
    return crowd


class Crowd:
    """Runs a crowd against one sale and counts what happens, for the progress display and for the verdict."""

    def __init__(
        self,
        people: list[Buyer],
        *,
        front: str,
        sale: str,
        sku: str,
        seed: int,
        record: Recorder | None = None,
    ) -> None:
        self.people = people
        self._record = record
        self.front = Wires(front)
        self.sale = sale
        self.sku = sku
        self.counts: Counter[str] = Counter()  # buyers by the state they were told last
        self.joins = 0  # join requests answered
        self.polls = 0
        self.repeats = 0  # requests sent again after 429, 503 or a lost answer
        self.statuses: Counter[int] = Counter()
        self.join_ms: deque[float] = deque(maxlen=20_000)
        self.news: deque[str] = deque(maxlen=6)
        self._dice = random.Random(seed + 1)
        self._suppliers: dict[str, Wires] = {}
        self._clock_offset_s = 0.0
        self._freeze_s = 0.0
        self._join_body = msgspec.json.encode({"sku": sku, "units": 1})

    def now_s(self) -> float:
        """The sale clock in seconds: a buyer's own clock may be wrong, the sale's is not."""
        return time.time() + self._clock_offset_s

    async def set_clock(self) -> None:
        answer = await self._repeat(Doing("time", ""), "GET", "/v1/time", b"")
        self._clock_offset_s = answer.json()["now_ms"] / 1000 - time.time()

    async def run(self, opens_s: float, early_s: float) -> None:
        """Let everyone come, wait, win or lose, pay or not. Ends when the last buyer's ticket has ended.

        opens_s: the opening on the sale clock. early_s: early buyers come within so many seconds before the freeze.
        """
        async with asyncio.TaskGroup() as group:
            for buyer in self.people:
                group.create_task(self._live(buyer, opens_s, early_s))

    def close(self) -> None:
        self.front.close()
        for wires in self._suppliers.values():
            wires.close()

    async def _ask(self, doing: Doing, method: str, path: str, headers: bytes, body: bytes | None) -> Answer:
        """One request, written down with how it ended if a history is kept. Unknown: no answer came."""
        record = self._record
        if record is None or doing.op == "time":
            return await self.front.ask(method, path, headers, body)
        begun = record.invoke(
            doing.op, doing.process or doing.buyer, doing.buyer, sale=self.sale, sku=self.sku, units=1
        )
        try:
            answer = await self.front.ask(method, path, headers, body)
        except Unknown:
            record.end(begun, "unknown")
            raise
        record.answered(begun, answer.status, answer.json())
        return answer

    async def _repeat(
        self, doing: Doing, method: str, path: str, headers: bytes, body: bytes | None = None
    ) -> Answer:
        """Ask, and ask again as told after 429, 503 or a lost answer: the contract allows it for all we send."""
        problem: object = None
        for tries in range(TRIES_MAX):
            try:
                answer = await self._ask(doing, method, path, headers, body)
            except Unknown as error:
                problem = error
                wait_s = 0.2
            else:
                self.statuses[answer.status] += 1
                if answer.status not in (429, 503):
                    return answer
                problem = answer.body[:200]
                wait_s = min(answer.retry_after_s or 1.0, RETRY_AFTER_MAX_S)
            self.repeats += 1
            await asyncio.sleep(wait_s * (0.5 + self._dice.random()) * (1 + tries * 0.2))
        raise Surprise(f"{method} {path.split('/tickets/')[0]}: {TRIES_MAX} tries, last: {problem!r}")

    async def _live(self, buyer: Buyer, opens_s: float, early_s: float) -> None:
        arrives_s = opens_s + (buyer.arrives_s * early_s if buyer.arrives_s < 0 else buyer.arrives_s)
        if buyer.arrives_s < 0:
            arrives_s -= self._freeze_s
        await asyncio.sleep(max(0.0, arrives_s - self.now_s()))
        headers = f"X-Buyer-Id: {buyer.buyer_id}\r\n".encode()
        if buyer.phone is not None:
            headers = await self._get_pass(buyer, headers)
        document = await self._join(buyer, headers)
        while document is not None and document["poll_after_ms"] is not None and buyer.state != "paid":
            if buyer.leaves and (buyer.leaves == "won") == (buyer.state in ("claimed", "reserved")):
                if buyer.state in ("waiting", "claimed", "reserved"):
                    await self._leave(buyer, headers)
            elif buyer.state == "reserved":
                await self._maybe_pay(buyer, headers, document)
            await asyncio.sleep(document["poll_after_ms"] / 1000)
            document = await self._poll(buyer, headers)
        if buyer.pays_late and buyer.pay_url is not None and buyer.state == "expired":
            await self._pay(buyer)
            await self._watch_late_money(buyer, headers)

    def freeze_before(self, seconds: float) -> None:
        """Early buyers come before the freeze, which is so many seconds before the opening."""
        self._freeze_s = seconds

    async def _get_pass(self, buyer: Buyer, headers: bytes) -> bytes:
        body = msgspec.json.encode({"contact": {"phone": buyer.phone, "language": "zh"}, "source": "demo"})
        answer = await self._repeat(
            Doing("pass", buyer.buyer_id), "POST", f"/v1/sales/{self.sale}/pass", headers, body
        )
        if answer.status != 201:
            raise Surprise(f"pass: {answer.status} {answer.body[:200]!r}")
        return f"Authorization: Pass {answer.json()['pass']}\r\n".encode()

    async def _join(self, buyer: Buyer, headers: bytes) -> dict[str, Any] | None:
        path = f"/v1/sales/{self.sale}/tickets"

        async def tap(number: int) -> dict[str, Any] | None:
            doing = Doing("join", buyer.buyer_id, f"{buyer.buyer_id}#{number}" if number else "")
            while True:
                began = time.perf_counter()
                answer = await self._repeat(doing, "POST", path, headers, self._join_body)
                self.join_ms.append((time.perf_counter() - began) * 1000)
                self.joins += 1
                if answer.status in (200, 202):
                    document: dict[str, Any] = answer.json()
                    if document["ticket"] is None:
                        self._move(buyer, document["state"])
                        return None
                    self._told(buyer, document)
                    return document
                if answer.status == 410:
                    self._move(buyer, "too_late")
                    return None
                if answer.status == 403 and answer.json()["code"] == "not_open_yet":
                    await asyncio.sleep(POLL_UNKNOWN_S)
                    continue
                raise Surprise(f"join: {answer.status} {answer.body[:300]!r}")

        documents = await asyncio.gather(*(tap(number) for number in range(buyer.taps)))
        return next((document for document in documents if document is not None), None)

    async def _poll(self, buyer: Buyer, headers: bytes) -> dict[str, Any]:
        while True:
            answer = await self._repeat(
                Doing("poll", buyer.buyer_id), "GET", f"/v1/tickets/{buyer.ticket}", headers
            )
            self.polls += 1
            if answer.status != 200:
                raise Surprise(f"poll: {answer.status} {answer.body[:300]!r}")
            document: dict[str, Any] = answer.json()
            if document["state"] in KNOWN_STATES:
                self._told(buyer, document)
                return document
            await asyncio.sleep(POLL_UNKNOWN_S)  # an unknown state means: keep polling

    def _told(self, buyer: Buyer, document: Mapping[str, Any]) -> None:
        buyer.ticket = document["ticket"]
        buyer.ticket_ids.add(document["ticket_id"])
        buyer.was_standby = buyer.was_standby or bool(document["standby"])
        if document["order"] is not None:
            buyer.order_no = document["order"]["order_no"]
        payment = document["payment"]
        if payment is not None and payment["url"]:
            buyer.pay_url = payment["url"]
        if (
            buyer.taps > 1
            and buyer.states
            and document["state"] != buyer.state
            and document["state"] in buyer.states
        ):
            return  # answers to simultaneous taps may overtake each other
        self._move(buyer, document["state"])

    def _move(self, buyer: Buyer, state: str) -> None:
        if state == buyer.state:
            return
        if buyer.states and not may_follow(buyer.state, state):
            buyer.bent = buyer.bent or f"{buyer.state} -> {state}"
        self.counts[buyer.state] -= 1
        self.counts[state] += 1
        buyer.state = state
        buyer.states.append(state)
        if state in ("paid", "expired", "cancelled", "refunded"):
            self.news.append(f"{buyer.buyer_id} {state}{' (standby)' if buyer.was_standby else ''}")

    async def _leave(self, buyer: Buyer, headers: bytes) -> None:
        answer = await self._repeat(
            Doing("leave", buyer.buyer_id), "DELETE", f"/v1/tickets/{buyer.ticket}", headers
        )
        if answer.status in (200, 202, 409):
            buyer.leaves = ""
            buyer.pays = False
        elif answer.status not in (404,):
            raise Surprise(f"leave: {answer.status} {answer.body[:300]!r}")

    async def _maybe_pay(self, buyer: Buyer, headers: bytes, document: Mapping[str, Any]) -> None:
        payment = document["payment"] or {"state": "none", "channel": None}
        if not buyer.pays or buyer.pays_late:
            return
        if payment["state"] == "ready":
            await asyncio.sleep(buyer.think_s)
            await self._pay(buyer)
        elif payment["state"] in ("none", "failed") and not document["leaving"]:
            body = msgspec.json.encode({"channel": payment["channel"] or "sandbox"})
            doing = Doing("ask_payment", buyer.buyer_id)
            await self._repeat(doing, "POST", f"/v1/tickets/{buyer.ticket}/payment", headers, body)

    async def _pay(self, buyer: Buyer) -> None:
        """Open the supplier's page and confirm, as a person would. The supplier may fail: then it is tried later."""
        assert buyer.pay_url is not None
        parts = urlsplit(buyer.pay_url)
        origin = f"{parts.scheme}://{parts.netloc}"
        wires = self._suppliers.setdefault(origin, Wires(origin, connections_max=32))
        record = self._record
        begun = record and record.invoke("pay", buyer.buyer_id, buyer.buyer_id, sale=self.sale)
        try:  # the page's button posts here
            answer = await wires.ask("POST", f"{parts.path}/pay", b"Accept: application/json\r\n")
        except Unknown:
            if record and begun:
                record.end(begun, "unknown")
            return
        if record and begun:
            record.answered(begun, answer.status, None)

    async def _watch_late_money(self, buyer: Buyer, headers: bytes) -> None:
        """After money came too late: the unit again, or the money back."""
        for _ in range(40):
            await asyncio.sleep(POLL_UNKNOWN_S)
            document = await self._poll(buyer, headers)
            if document["state"] in ("paid", "refunded"):
                return


def may_follow(before: str, after: str) -> bool:
    """Whether a buyer who was told `before` may be told `after` next; steps between two looks are not seen."""
    try:
        start, goal = TicketState(before), TicketState(after)
    except ValueError:
        return before == "away"
    reached = {start}
    edge = [start]
    while edge:
        for state in ARROWS[edge.pop()] - reached:
            reached.add(state)
            edge.append(state)
    return goal in reached
