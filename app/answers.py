"""What the scripts of lua/ answer: one frozen struct for each first word of a reply; expected refusals are values."""

from __future__ import annotations

from typing import Literal

import msgspec


class Answer(msgspec.Struct, frozen=True):
    """The reply of a script. Its first word is the class name in capitals (NotWaiting: NOT_WAITING)."""


class Gone(Answer, frozen=True):
    """Redis has no such sale (or item): closed, never zero."""


class Old(Answer, frozen=True):
    """Another epoch, or a Redis that is not the sale's home. Nothing changed; read the sale again."""


class Closed(Answer, frozen=True):
    """The sale is closed: nobody is served any more."""


class Early(Answer, frozen=True):
    """It is not yet time for this."""


class Paused(Answer, frozen=True):
    """Nobody is served while the sale or the item is paused."""


class WaitBeacon(Answer, frozen=True):
    """The draw waits for its beacon."""


class Busy(Answer, frozen=True):
    """Too many claims wait for Postgres."""


class Served(Answer, frozen=True):
    """Ranks up to `served` are served; `claimed` tickets got units in this call; `waiting` counts holes too."""

    served: int
    claimed: int
    units_left: int
    waiting: int


class Left(Answer, frozen=True):
    """The place in the line is given up."""


class NotWaiting(Answer, frozen=True):
    """The ticket does not wait: its effective state byte."""

    byte: bytes


class Released(Answer, frozen=True):
    """The units are back in stock, and `claimed` standby tickets got them at once."""

    units_left: int
    claimed: int


class Already(Answer, frozen=True):
    """It was done before. What it carries differs: see each script."""


class AlreadyByte(Answer, frozen=True):
    """Nothing was done (any more): the ticket's effective state byte."""

    byte: bytes


class AlreadyUnits(Answer, frozen=True):
    """This id was applied before; units left now."""

    units_left: int


class AlreadyAsked(Answer, frozen=True):
    """An ask is under way: leave or pay."""

    kind: str


class AlreadyValue(Answer, frozen=True):
    """A beacon is stored and stays."""

    value: str


class Taken(Answer, frozen=True):
    """units_retake: the units are the ticket's again, units left. rate_take: allowed, so many more at once."""

    left: int


class Removed(Answer, frozen=True):
    """So many consumers, or entries of claims, are taken off."""

    count: int


class Counted(Answer, frozen=True):
    """So many claims are on their way to Postgres."""

    claims_open: int


class Wait(Answer, frozen=True):
    """Not now; allowed in `ms`."""

    ms: int


class Refused(Answer, frozen=True):
    """Late money gets no unit: state | waiting | stock."""

    reason: str


class Added(Answer, frozen=True):
    """The units are in stock; `claimed` standby tickets got some at once."""

    units_left: int
    claimed: int


class Short(Answer, frozen=True):
    """There are not so many unsold units to take away. Nothing changed."""

    units_left: int


class Marked(Answer, frozen=True):
    """The buyer is told this now."""


class MarkedEach(Answer, frozen=True):
    """For each ticket of the batch: 1 told, 0 left to ticket_mark. An entry all of whose tickets are told is gone."""

    done: str


class Stale(Answer, frozen=True):
    """A version at least as new is known."""

    version: int


class AlreadyReleased(Answer, frozen=True):
    """The ticket has ended; its state byte."""

    byte: bytes


class Not(Answer, frozen=True):
    """Not with a ticket in this (effective) state."""

    byte: bytes


class NotHome(Answer, frozen=True):
    """Another Redis than the one asked about is the sale's home."""

    home: str


class Asked(Answer, frozen=True):
    """The worker will read it."""


class Published(Answer, frozen=True):
    """The sale is in Redis."""


class Other(Answer, frozen=True):
    """The sale is in Redis with another epoch."""

    epoch: int


class Leftover(Answer, frozen=True):
    """Keys of this sale are left without its `sale`: rebuild, or clear them."""


class Fenced(Answer, frozen=True):
    """No script but a rebuild's changes this sale any more."""


class Rebuilt(Answer, frozen=True):
    """The sale is open again, in a new epoch."""


class Switched(Answer, frozen=True):
    """Live for every front door at its next look."""


class ClosedForGood(Answer, frozen=True):
    """A closed sale stays closed."""


class Put(Answer, frozen=True):
    """The beacon is stored."""


class Armed(Answer, frozen=True):
    """This Redis is the sale's home."""


class Behind(Answer, frozen=True):
    """Redis lost writes that Postgres knows of: rebuild."""

    pulse: int


class Pulsed(Answer, frozen=True):
    """The pulse is written; this value may go to Postgres."""

    pulse: int


class Advised(Answer, frozen=True):
    """What was advised holds until then, by Redis' clock."""

    until_ms: int


class Stands(Answer, frozen=True):
    """A supplier's breaker as it stands after one turn. Times are ms of its own clock, which never runs back.

    granted: permits given; probes among them have the serials up to `serial`. settled: for each result c(ounted),
    i(gnored) or l(ate). events: the transitions of this turn, JSON.
    """

    now_ms: int
    state: str
    mode: str
    generation: int
    since_ms: int
    until_ms: int
    openings: int
    calls: int
    failures: int
    slow: int
    granted: int
    serial: int
    settled: str
    last_error: str
    events: str


# --- answers for each buyer of a join


class Waits(msgspec.Struct, frozen=True, gc=False):
    """A new ticket that waits in the line."""

    seq: int


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """A new ticket that has its units."""

    seq: int


class Has(msgspec.Struct, frozen=True, gc=False):
    """The buyer's newest ticket: live with the same body, or ended. `byte`: its effective state."""

    sku: bytes
    seq: int
    units: int
    byte: bytes


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """The buyer has a live ticket for something else."""

    sku: bytes
    seq: int
    units: int
    byte: bytes


class Turned(msgspec.Struct, frozen=True, gc=False):
    """No ticket, nothing stored."""

    why: Literal["closed", "not_open_yet", "limit", "sold_out", "line_full", "busy"]


JoinAnswer = Waits | Claimed | Has | Conflict | Turned


class Joined(Answer, frozen=True):
    """One answer for each buyer, in their order; served and next_seq are as after the batch."""

    now_ms: int
    served: int
    next_seq: int
    answers: list[JoinAnswer]
