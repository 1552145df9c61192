"""Each script of lua/ as a typed call: declared names here, the file's header is the contract and a test compares.

Expected refusals are values (`app.answers`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Generic, Literal, TypeVar

import msgspec

from app import alike
from app.answers import (
    Added,
    Advised,
    Already,
    AlreadyAsked,
    AlreadyByte,
    AlreadyReleased,
    AlreadyUnits,
    AlreadyValue,
    Answer,
    Armed,
    Asked,
    Behind,
    Busy,
    Claimed,
    Closed,
    ClosedForGood,
    Conflict,
    Counted,
    Early,
    Fenced,
    Gone,
    Has,
    JoinAnswer,
    Joined,
    Left,
    Leftover,
    Marked,
    MarkedEach,
    Not,
    NotHome,
    NotWaiting,
    Old,
    Other,
    Paused,
    Published,
    Pulsed,
    Put,
    Rebuilt,
    Refused,
    Released,
    Removed,
    Served,
    Short,
    Stale,
    Stands,
    Switched,
    Taken,
    Turned,
    Wait,
    WaitBeacon,
    Waits,
)
from app.keys import FORMAT, GROUP, SaleKeys, breaker_history_key, breaker_key, sms_limits
from app.redis.link import Arg, Link, Rejected
from app.resources import scripts

_W, _C, _H = b"WCH"
_TURNED: dict[int, JoinAnswer] = {
    ord("K"): Turned("closed"),
    ord("Y"): Turned("not_open_yet"),
    ord("L"): Turned("limit"),
    ord("S"): Turned("sold_out"),
    ord("F"): Turned("line_full"),
    ord("B"): Turned("busy"),
}


def _joined(reply: list[Any]) -> Joined:
    """The answers of one line_join. Its new tickets have the last seqs before next_seq, in the order of the buyers."""
    _, now_ms, served, next_seq, words, *old = reply
    answers: list[JoinAnswer] = []
    seq = next_seq - words.count(_W) - words.count(_C)
    at = 0
    for word in words:
        if word == _C:
            answers.append(Claimed(seq))
            seq += 1
        elif word == _W:
            answers.append(Waits(seq))
            seq += 1
        elif word in _TURNED:
            answers.append(_TURNED[word])
        else:  # H or X
            sku, digits, units = old[at].split(b":")
            has = (sku, int(digits), int(units), old[at + 1])
            answers.append(Has(*has) if word == _H else Conflict(*has))
            at += 2
    return Joined(now_ms, served, next_seq, answers)


A = TypeVar("A", bound=Answer)

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


def _converter(kind: str) -> Callable[[Any], Any] | None:
    if kind == "str":
        return lambda value: value.decode()
    return int if kind == "int" else None


class Script(Generic[A]):
    """One file of lua/, its keys and arguments by the names in its header, and what it may answer.

    `words` gives the word of an answer whose class name is not the word (several scripts answer ALREADY with
    different things). A name that ends in `...` stands for the rest.
    """

    registry: ClassVar[dict[str, Script[Any]]] = {}

    def __init__(
        self,
        name: str,
        *,
        keys: str,
        args: str,
        answers: Sequence[type[A]],
        words: Mapping[str, type[A]] | None = None,
    ) -> None:
        self.name = name
        self.keys = tuple(keys.split())
        self.args = tuple(args.split())
        self.answers: dict[bytes, tuple[type[A], tuple[Callable[[Any], Any] | None, ...]]] = {}
        named = {_WORD.sub("_", answer.__name__).upper(): answer for answer in answers} | dict(words or {})
        for word, answer in named.items():
            kinds = [
                str(field.type if isinstance(field.type, str) else field.type.__name__)
                for field in _fields(answer)
            ]
            self.answers[word.encode()] = (answer, tuple(map(_converter, kinds)))
        Script.registry[name] = self

    @property
    def text(self) -> str:
        return scripts()[self.name]

    @property
    def sha(self) -> str:
        return _sha(self.text)

    def read(self, reply: list[Any]) -> A:
        """The typed answer. A word that the header does not have is a bug: KeyError."""
        answer, converters = self.answers[reply[0]]
        values = [
            value if make is None else make(value) for value, make in zip(reply[1:], converters, strict=True)
        ]
        return answer(*values)


def _fields(answer: type[Answer]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return () if answer is Joined else msgspec.structs.fields(answer)


@cache
def _sha(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def all_scripts() -> list[Script[Any]]:
    """Every script, by its declaration below."""
    return list(Script.registry.values())


SERVE_KEYS = "sale item stock outcome line orders"

LINE_JOIN: Script[Gone | Old | Joined] = Script(
    "line_join",
    keys=SERVE_KEYS + " buyers drawn others...",
    args="epoch home now_ms sku backlog_max n again hashes units_each buyers...",
    answers=(Gone, Old, Joined),
)
LINE_LEAVE: Script[Gone | Old | Left | NotWaiting] = Script(
    "line_leave",
    keys="sale item outcome line left",
    args="epoch home now_ms seq",
    answers=(Gone, Old, Left, NotWaiting),
)
LINE_ADVANCE: Script[Gone | Old | Closed | Early | Paused | WaitBeacon | Busy | Served] = Script(
    "line_advance",
    keys=SERVE_KEYS,
    args="epoch home now_ms sku work_max backlog_max",
    answers=(Gone, Old, Closed, Early, Paused, WaitBeacon, Busy, Served),
)
UNITS_RELEASE: Script[Gone | Old | AlreadyByte | Released] = Script(
    "units_release",
    keys=SERVE_KEYS + " status",
    args="epoch home now_ms sku seq units version to_byte status_json work_max backlog_max",
    answers=(Gone, Old, Released),
    words={"ALREADY": AlreadyByte},
)
UNITS_RETAKE: Script[Gone | Old | Taken | AlreadyByte | Refused] = Script(
    "units_retake",
    keys="sale item stock outcome line status",
    args="epoch home now_ms sku seq units version",
    answers=(Gone, Old, Taken, Refused),
    words={"ALREADY": AlreadyByte},
)
STOCK_ADD: Script[Gone | Old | Added | AlreadyUnits | Short] = Script(
    "stock_add",
    keys=SERVE_KEYS,
    args="epoch home now_ms sku units id work_max backlog_max",
    answers=(Gone, Old, Added, Short),
    words={"ALREADY": AlreadyUnits},
)
TICKET_MARK: Script[Gone | Old | Marked | Stale | AlreadyReleased | Not] = Script(
    "ticket_mark",
    keys="sale item outcome status",
    args="epoch home now_ms sku seq version byte status_json keep_ask",
    answers=(Gone, Old, Marked, Stale, AlreadyReleased, Not),
)
CLAIMS_MARK: Script[Gone | Old | MarkedEach] = Script(
    "claims_mark",
    keys="sale outcome status orders",
    args="epoch home now_ms sku group like form numbers r runs...",
    answers=(Gone, Old),
    words={"MARKED": MarkedEach},
)
CLAIMS_REMOVE: Script[Removed] = Script(
    "claims_remove", keys="sale orders", args="group entries...", answers=(Removed,)
)
CLAIMS_COUNT: Script[Gone | Old | Counted] = Script(
    "claims_count",
    keys="sale",
    args="epoch home now_ms made open_ counted",
    answers=(Gone, Old, Counted),
)
ASK_PUT: Script[Gone | Old | Asked | AlreadyAsked | Not] = Script(
    "ask_put",
    keys="sale item outcome status asks",
    args="epoch home now_ms sku seq buyer_id kind arg channel repeat_ms",
    answers=(Gone, Old, Asked, Not),
    words={"ALREADY": AlreadyAsked},
)
SALE_PUBLISH: Script[Published | Already | Other | Leftover] = Script(
    "sale_publish",
    keys="sale stock buyers orders asks items...",
    args="epoch home now_ms sale_id seed_hash group n pairs...",
    answers=(Published, Already, Other, Leftover),
)
SALE_FENCE: Script[Gone | Fenced | Other] = Script(
    "sale_fence", keys="sale", args="epoch", answers=(Gone, Fenced, Other)
)
SALE_REBUILD: Script[Rebuilt | Already | Other] = Script(
    "sale_rebuild",
    keys="sale stock buyers orders asks items...",
    args="epoch home now_ms sale_id seed_hash group n pairs...",
    answers=(Rebuilt, Already, Other),
)
SALE_SWITCH: Script[Gone | Old | Switched | Stale | ClosedForGood] = Script(
    "sale_switch",
    keys="sale",
    args="epoch home now_ms version pairs...",
    answers=(Gone, Old, Switched, Stale, ClosedForGood),
)
ITEM_SWITCH: Script[Gone | Old | Switched | Already] = Script(
    "item_switch", keys="sale item", args="epoch home now_ms paused", answers=(Gone, Old, Switched, Already)
)
BEACON_PUT: Script[Gone | Old | Put | AlreadyValue | Early] = Script(
    "beacon_put",
    keys="sale",
    args="epoch home now_ms value",
    answers=(Gone, Old, Put, Early),
    words={"ALREADY": AlreadyValue},
)
SALE_REARM: Script[Gone | Old | Armed | Behind | NotHome] = Script(
    "sale_rearm",
    keys="sale",
    args="epoch old_home new_home pulse_at_least",
    answers=(Gone, Old, Armed, Behind),
    words={"NOT": NotHome},
)
SALE_PULSE: Script[Gone | Old | Pulsed] = Script(
    "sale_pulse", keys="sale", args="epoch home now_ms pulse", answers=(Gone, Old, Pulsed)
)
SALE_ADVISE: Script[Gone | Old | Advised] = Script(
    "sale_advise",
    keys="sale",
    args="epoch home now_ms slow_milli base_milli reason notices lease_ms",
    answers=(Gone, Old, Advised),
)
CONSUMERS_REMOVE: Script[Gone | Removed] = Script(
    "consumers_remove", keys="stream", args="group idle_ms", answers=(Gone, Removed)
)
RATE_TAKE: Script[Taken | Wait] = Script(
    "rate_take", keys="rate", args="now_ms period_ms burst cost", answers=(Taken, Wait)
)
SMS_TAKE: Script[Taken | Wait] = Script(
    "sms_take",
    keys="minute hour day",
    args="now_ms minute_period minute_burst hour_period hour_burst day_period day_burst",
    answers=(Taken, Wait),
)
BREAKER: Script[Gone | Stands] = Script(
    "breaker",
    keys="breaker history",
    args="now_ms rules rand who history_max mode_first switch_to wanted n results...",
    answers=(Gone, Stands),
)

# `sale` fields that sale_publish needs; it sets fmt, home, seed_hash, tokens_micro, last_ms, opened itself.
SALE_FIELDS = frozenset(
    {
        "version",
        "line_opens_ms",
        "opens_ms",
        "closes_ms",
        "freeze_ms",
        "beacon_source",
        "beacon_wait_ms",
        "rate_milli",
        "burst",
        "limit",
        "line_max",
        "standby",
        "seed",
        "items",
        "doc",
    }
)
# Fields that sale_switch never touches: they are set once, or by the scripts.
FIXED_FIELDS = frozenset(
    {
        "fmt",
        "epoch",
        "home",
        "version",
        "tokens_micro",
        "last_ms",
        "opened",
        "seed",
        "seed_hash",
        "items",
        "beacon_value",
        "pulse",
        "slow_milli",
        "slow_base_milli",
        "slow_reason",
        "notices",
        "advice_until_ms",
        "claims_open",
        "claims_made",
    }
)


@lru_cache(maxsize=1024)
def sale_keys(sale: str) -> SaleKeys:
    return SaleKeys(sale)


class Scripts:
    """The scripts of lua/ as methods. Keywords have the names of the headers; home is the link's run_id.

    Every method: DidNotHappen (repeat when it heals), Unknown (the scripts are idempotent: make the same call again),
    Gone and Old as answers. `now_ms` 0 means the server's clock; tests pass a time.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    async def _run(self, script: Script[A], keys: Sequence[str], args: Sequence[Arg]) -> A:
        return script.read(await self._raw(script, keys, args))

    async def _raw(
        self,
        script: Script[Any],
        keys: Sequence[str],
        args: Sequence[Arg],
        deadline_s: float | None = None,
    ) -> list[Any]:
        command: list[Arg] = ["EVALSHA", script.sha, len(keys), *keys, *args]
        try:
            reply: list[Any] = await self.link.send(command, script=True, deadline_s=deadline_s)
        except Rejected as error:
            # Once: it did not happen the first time.
            if error.code == "NOSCRIPT":
                await self.link.at(keys[0]).call("SCRIPT", "LOAD", script.text)
                reply = await self.link.send(command, script=True, deadline_s=deadline_s)
            elif error.code in ("MOVED", "ASK") and "new_home" not in script.args:
                # Fenced by the home of the node that answers, not of the one that sent us there.
                home_at = 3 + len(keys) + script.args.index("home") if "home" in script.args else None
                reply = await self.link.again(
                    error, command, script=True, home_at=home_at, deadline_s=deadline_s
                )
            else:
                raise
        return reply

    def _home(self, sale: str) -> str:
        return self.link.home_of(sale_keys(sale).sale)

    async def line_join(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        skus: Sequence[str],
        buyers: Sequence[tuple[bytes, int, bool, bytes]],
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | Joined:
        """Give a batch of buyers of one item their places.

        buyers: (buyer_id, units >= 1, again, ticket hash of 10 bytes), at most 1000. skus: every item.
        """
        k = sale_keys(sale)
        keys = [k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.orders, k.buyers, k.drawn(sku)]
        others = [other for other in skus if other != sku]
        for other in others:
            keys.append(k.item(other))
            keys.append(k.outcome(other))
        ids, units, again, hashes = zip(*buyers, strict=True)
        args: list[Arg] = [
            epoch,
            self._home(sale),
            now_ms,
            sku,
            backlog_max,
            len(ids),
            "".join(["1" if flag else "0" for flag in again]),
            b"".join(hashes),
            units[0] if units.count(units[0]) == len(units) else ",".join(map(str, units)),
            *ids,
            *others,
        ]
        reply = await self._raw(LINE_JOIN, keys, args)
        return _joined(reply) if reply[0] == b"JOINED" else LINE_JOIN.read(reply)

    async def line_leave(
        self, *, sale: str, epoch: int, sku: str, seq: int, now_ms: int = 0
    ) -> Gone | Old | Left | NotWaiting:
        """Give up a place in the line, or change nothing."""
        k = sale_keys(sale)
        return await self._run(
            LINE_LEAVE,
            (k.sale, k.item(sku), k.outcome(sku), k.line(sku), k.left(sku)),
            (epoch, self._home(sale), now_ms, seq),
        )

    async def line_advance(
        self, *, sale: str, epoch: int, sku: str, work_max: int, backlog_max: int, now_ms: int = 0
    ) -> Gone | Old | Closed | Early | Paused | WaitBeacon | Busy | Served:
        """Serve the next ranks of one line, as far as stock, rate, backlog and work allow."""
        return await self._run(
            LINE_ADVANCE,
            self._serve_keys(sale, sku),
            (epoch, self._home(sale), now_ms, sku, work_max, backlog_max),
        )

    async def units_release(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        units: int,
        version: int,
        to_byte: bytes,
        status_json: bytes | str,
        work_max: int,
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | AlreadyByte | Released:
        """Give a ticket's units back once, and serve standby with them; version: above the one told."""
        k = sale_keys(sale)
        return await self._run(
            UNITS_RELEASE,
            (*self._serve_keys(sale, sku), k.status),
            (
                epoch,
                self._home(sale),
                now_ms,
                sku,
                seq,
                units,
                version,
                to_byte,
                status_json,
                work_max,
                backlog_max,
            ),
        )

    async def units_retake(
        self, *, sale: str, epoch: int, sku: str, seq: int, units: int, version: int, now_ms: int = 0
    ) -> Gone | Old | Taken | AlreadyByte | Refused:
        """Take the units of an ended ticket again for late money; version: of the row as read."""
        k = sale_keys(sale)
        return await self._run(
            UNITS_RETAKE,
            (k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.status),
            (epoch, self._home(sale), now_ms, sku, seq, units, version),
        )

    async def stock_add(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        units: int,
        id: str,  # noqa: A002
        work_max: int,
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | Added | AlreadyUnits | Short:
        """Add units to an item (negative: take unsold ones away), once for each id."""
        return await self._run(
            STOCK_ADD,
            self._serve_keys(sale, sku),
            (epoch, self._home(sale), now_ms, sku, units, id, work_max, backlog_max),
        )

    async def ticket_mark(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        version: int,
        byte: bytes,
        status_json: bytes | str,
        keep_ask: bool = False,
        now_ms: int = 0,
    ) -> Gone | Old | Marked | Stale | AlreadyReleased | Not:
        """Tell a winner what the order's row says now, unless something newer was told."""
        k = sale_keys(sale)
        return await self._run(
            TICKET_MARK,
            (k.sale, k.item(sku), k.outcome(sku), k.status),
            (epoch, self._home(sale), now_ms, sku, seq, version, byte, status_json, int(keep_ask)),
        )

    async def claims_mark(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        before: bytes,
        behind: bytes,
        seqs: Sequence[int],
        order_nos: Sequence[str],
        entries: Sequence[tuple[bytes, int]] = (),
        now_ms: int = 0,
    ) -> Gone | Old | MarkedEach:
        """Tell up to 1000 claimed tickets that their orders are written, and take entries off that are told whole.

        seqs: best as they are in the stream; order_nos: of 24 characters, beside them. entries: (id, how many of the
        next tickets are all of its claims). A ticket is told before + order_no + behind: Redis keeps these two once
        (app/alike.py).
        """
        k = sale_keys(sale)
        runs = _runs(seqs)
        form = alike.form_of(before, behind)
        return await self._run(
            CLAIMS_MARK,
            (k.sale, k.outcome(sku), k.status, k.orders),
            (
                *(epoch, self._home(sale), now_ms, sku, GROUP, alike.name_of(form), form, "".join(order_nos)),
                *(len(runs) // 2, *runs, *_flat(entries)),
            ),
        )

    async def claims_remove(
        self, *, sale: str, group: str = GROUP, entries: Sequence[tuple[bytes, int]]
    ) -> Removed:
        """Take up to 1000 entries off the stream whose claims are over. entries: (id, claims in it)."""
        k = sale_keys(sale)
        return await self._run(CLAIMS_REMOVE, (k.sale, k.orders), (group, *_flat(entries)))

    async def claims_count(
        self, *, sale: str, epoch: int, made: int, open_: int, counted: int, now_ms: int = 0
    ) -> Gone | Old | Counted:
        """Set the number of open claims right, if it and claims_made are what they were when it was counted."""
        return await self._run(
            CLAIMS_COUNT, (sale_keys(sale).sale,), (epoch, self._home(sale), now_ms, made, open_, counted)
        )

    async def ask_put(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        buyer_id: bytes | str,
        kind: Literal["leave", "pay"],
        arg: str = "-",
        channel: str = "-",
        repeat_ms: int,
        now_ms: int = 0,
    ) -> Gone | Old | Asked | AlreadyAsked | Not:
        """Hand a buyer's wish to the worker, once while it is under way (repeat_ms)."""
        k = sale_keys(sale)
        return await self._run(
            ASK_PUT,
            (k.sale, k.item(sku), k.outcome(sku), k.status, k.asks),
            (
                epoch,
                self._home(sale),
                now_ms,
                sku,
                seq,
                buyer_id,
                kind,
                arg or "-",
                channel or "-",
                repeat_ms,
            ),
        )

    async def sale_publish(
        self,
        *,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        items: Sequence[tuple[str, int]],
        seed_hash: str,
        now_ms: int = 0,
    ) -> Published | Already | Other | Leftover:
        """Make a sale known to Redis, once. fields: `epoch` and SALE_FIELDS at least."""
        pairs: list[Arg] = []
        for sku, units in items:
            pairs += (sku, units)
        return await self._run(
            SALE_PUBLISH, *self._making(sale, fields, [sku for sku, _ in items], seed_hash, now_ms, pairs)
        )

    async def sale_fence(self, *, sale: str, epoch: int) -> Gone | Fenced | Other:
        """Shut a sale before it is rebuilt. epoch: the one that Postgres knows."""
        return await self._run(SALE_FENCE, (sale_keys(sale).sale,), (epoch,))

    async def sale_rebuild(
        self,
        *,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        items: Sequence[tuple[str, int, int, str, bool]],
        seed_hash: str,
        now_ms: int = 0,
    ) -> Rebuilt | Already | Other:
        """Open a sale again. fields: as of sale_publish. items: (sku, units, first seq, starts, paused)."""
        pairs: list[Arg] = []
        for sku, units, first, starts, paused in items:
            pairs += (sku, units, first, starts, int(paused))
        return await self._run(
            SALE_REBUILD, *self._making(sale, fields, [item[0] for item in items], seed_hash, now_ms, pairs)
        )

    def _making(
        self,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        skus: Sequence[str],
        seed_hash: str,
        now_ms: int,
        pairs: list[Arg],
    ) -> tuple[Sequence[str], Sequence[Arg]]:
        """Keys and arguments of the scripts that bring a sale into being."""
        missing = (SALE_FIELDS | {"epoch"}) - fields.keys()
        if missing:
            raise ValueError(f"a sale misses the fields {sorted(missing)}")
        k = sale_keys(sale)
        defaults: dict[str, str | int | bytes] = {
            "state_word": "scheduled", "paused": 0, "closed": 0, "beacon_value": "", "message": "", "pulse": 0
        }  # fmt: skip
        for field, value in (defaults | dict(fields)).items():
            pairs += (field, value)
        return (
            (k.sale, k.stock, k.buyers, k.orders, k.asks, *[k.item(sku) for sku in skus]),
            (str(fields["epoch"]), self._home(sale), now_ms, sale, seed_hash, GROUP, len(skus), *pairs),
        )

    async def sale_switch(
        self,
        *,
        sale: str,
        epoch: int,
        version: int,
        changes: Mapping[str, str | int | bytes],
        now_ms: int = 0,
    ) -> Gone | Old | Switched | Stale | ClosedForGood:
        """Change a published sale, in the order of versions. changes: no FIXED_FIELDS."""
        fixed = FIXED_FIELDS & changes.keys()
        if fixed:
            raise ValueError(f"sale_switch: {sorted(fixed)} cannot be changed")
        pairs: list[Arg] = []
        for field, value in changes.items():
            pairs += (field, value)
        return await self._run(
            SALE_SWITCH, (sale_keys(sale).sale,), (epoch, self._home(sale), now_ms, version, *pairs)
        )

    async def item_switch(
        self, *, sale: str, epoch: int, sku: str, paused: bool, now_ms: int = 0
    ) -> Gone | Old | Switched | Already:
        """Stop or start the admission of one item."""
        k = sale_keys(sale)
        return await self._run(
            ITEM_SWITCH, (k.sale, k.item(sku)), (epoch, self._home(sale), now_ms, int(paused))
        )

    async def beacon_put(
        self, *, sale: str, epoch: int, value: str, now_ms: int = 0
    ) -> Gone | Old | Put | AlreadyValue | Early:
        """Store the public random value that completes the key of the draw, once, after the freeze."""
        if not value:
            raise ValueError("beacon_put: an empty value means that there is none")
        return await self._run(BEACON_PUT, (sale_keys(sale).sale,), (epoch, self._home(sale), now_ms, value))

    async def sale_rearm(
        self, *, sale: str, epoch: int, old_home: str, new_home: str, pulse_at_least: int
    ) -> Gone | Old | Armed | Behind | NotHome:
        """Accept a Redis that restarted from its own log as the sale's home again."""
        return await self._run(
            SALE_REARM, (sale_keys(sale).sale,), (epoch, old_home, new_home, pulse_at_least)
        )

    async def sale_pulse(self, *, sale: str, epoch: int, pulse: int, now_ms: int = 0) -> Gone | Old | Pulsed:
        """Write the pulse; Postgres gets it afterwards."""
        return await self._run(SALE_PULSE, (sale_keys(sale).sale,), (epoch, self._home(sale), now_ms, pulse))

    async def sale_advise(
        self,
        *,
        sale: str,
        epoch: int,
        slow_milli: int,
        base_milli: int,
        reason: str,
        notices: str,
        lease_ms: int,
        now_ms: int = 0,
    ) -> Gone | Old | Advised:
        """Slow admission down (-1: do not), say why, and what tickets say; for lease_ms, then it is over by itself."""
        return await self._run(
            SALE_ADVISE,
            (sale_keys(sale).sale,),
            (epoch, self._home(sale), now_ms, slow_milli, base_milli, reason, notices, lease_ms),
        )

    async def consumers_remove(self, *, stream: str, group: str = GROUP, idle_ms: int) -> Gone | Removed:
        """Forget consumers of a stream that have not asked for idle_ms and hold nothing. GONE: no such group."""
        return await self._run(CONSUMERS_REMOVE, (stream,), (group, idle_ms))

    async def rate_take(
        self, *, key: str, period_ms: int, burst: int, cost: int = 1, now_ms: int = 0
    ) -> Taken | Wait:
        """Allow one more each period_ms, `burst` at once. key: SaleKeys.rate(...)."""
        return await self._run(RATE_TAKE, (key,), (now_ms, period_ms, burst, cost))

    async def sms_take(
        self,
        *,
        number: str,
        minute_period: int,
        minute_burst: int,
        hour_period: int,
        hour_burst: int,
        day_period: int,
        day_burst: int,
        now_ms: int = 0,
    ) -> Taken | Wait:
        """Allow one more text to a number under all three limits, or count nothing. number: its index in hex."""
        args = (now_ms, minute_period, minute_burst, hour_period, hour_burst, day_period, day_burst)
        return await self._run(SMS_TAKE, sms_limits(number), args)

    async def breaker(
        self,
        *,
        name: str,
        rules: str,
        rand: float,
        who: str,
        history_max: int,
        mode_first: str = "auto",
        switch_to: str = "",
        wanted: int = 0,
        results: Sequence[tuple[int, int, int, str, str]] = (),
        now_ms: int = 0,
        deadline_s: float | None = None,
    ) -> Gone | Stands:
        """One turn of the breaker shared under `name`: learn `results`, obey `switch_to`, give `wanted` permits.

        results: (generation, serial, took_ms, s|f|i, error). mode_first '': only look, Gone if it is not there.
        Not idempotent, and harmless: a result sent twice is one call too many in the window, a permit that was given
        to nobody ends with its lease.
        """
        args: list[Arg] = [
            now_ms, rules, repr(rand), who, history_max, mode_first, switch_to, wanted, len(results),
        ]  # fmt: skip
        for result in results:
            args += result
        return BREAKER.read(
            await self._raw(BREAKER, (breaker_key(name), breaker_history_key(name)), args, deadline_s)
        )

    @staticmethod
    def _serve_keys(sale: str, sku: str) -> tuple[str, ...]:
        k = sale_keys(sale)
        return (k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.orders)


def _flat(entries: Sequence[tuple[bytes, int]]) -> list[Arg]:
    return [value for entry in entries for value in entry]


def _runs(numbers: Sequence[int]) -> list[int]:
    """[first, length, first, length, …] of numbers that follow each other."""
    starts = [
        0,
        *(at for at, (one, next_) in enumerate(pairwise(numbers), 1) if next_ != one + 1),
        len(numbers),
    ]
    return [value for begin, end in pairwise(starts) for value in (numbers[begin], end - begin)]


assert FORMAT == 1, "the scripts write format 1"
