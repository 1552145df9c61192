"""What becomes of a payment attempt: from what is known of it and what its supplier answers, to the next move. Pure.

An attempt is one payment at one supplier, under its own id. The law that this module holds:

    Nothing else is begun for the order (here or elsewhere) while this attempt may still bring money.

So an answer that is no answer makes it `unknown`: queried, then closed, at the supplier that may have it, for as long
as that takes. Only what has *certainly not happened* there may be sent to another supplier (`Elsewhere`).

`begin` says the first move for a leased attempt; `Create`, `Query` and `Close` are calls, and `after_create`,
`after_query`, `after_close` say what their answers lead to. The other moves end the turn; pay.py carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused, other_may
from app.providers.payment import Captured, Link, Payment

State = Literal["wanted", "created", "sent", "unknown"]

# A Refused with one of these says that the attempt's id has a past at the supplier, and which.
HAS_A_PAST = frozenset({"paid", "closed", "declined"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An attempt that is not over, and its order, when it was leased."""

    state: State
    was_sent: bool = (
        False  # a call to make it may have been made: by a worker that died in the middle, or by us
    )
    payable: bool = True  # the order is reserved, and its buyer does not want to leave it
    too_late: bool = False  # a link made now would end at once
    link_over: bool = False  # the time of the link that was handed out has passed
    costs_nothing: bool = False


# Moves: calls to the supplier. why: the attempt is to end, for this reason; None: the buyer still wants its link.


@dataclass(frozen=True, slots=True)
class Create:
    """Ask for the link."""


@dataclass(frozen=True, slots=True)
class Query:
    """Ask how it stands."""

    why: str | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """Make sure that it can never be paid."""

    why: str


# Moves: the end of a turn


@dataclass(frozen=True, slots=True)
class MakeWay:
    """First the order's other attempt must be out of the way."""


@dataclass(frozen=True, slots=True)
class PayNothing:
    """The order costs nothing: it is paid without a supplier."""


@dataclass(frozen=True, slots=True)
class Show:
    """The buyer gets this link."""

    link: Link


@dataclass(frozen=True, slots=True)
class SendLater:
    """It has certainly not happened: the same again, after a pause."""

    retry_in_ms: int = 0


@dataclass(frozen=True, slots=True)
class LookLater:
    """Its link is out: look at it again after a while."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may have happened: the order keeps its unit, and this is asked about again."""

    code: str
    retry_in_ms: int = 0


@dataclass(frozen=True, slots=True)
class Settle:
    """There is money."""

    captured: Captured


@dataclass(frozen=True, slots=True)
class End:
    """It is over without money. again: the buyer, who still waits for a link, gets another attempt at once."""

    state: Literal["closed", "failed"]
    code: str | None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """It has certainly not happened: over here, and another supplier gets an attempt of its own.

    otherwise: what is done if there is no other after all.
    """

    code: str
    otherwise: SendLater | End


Call: TypeAlias = Create | Query | Close
Verdict: TypeAlias = MakeWay | PayNothing | Show | SendLater | Elsewhere | LookLater | Unknown | Settle | End
Move: TypeAlias = Call | Verdict


def begin(facts: Facts) -> Move:
    """The first move for an attempt whose turn it is."""
    match facts.state:
        case "wanted":
            return MakeWay()
        case "created":
            if not facts.payable:
                return end(facts, "not_payable")
            if facts.costs_nothing:
                return PayNothing()
            if facts.too_late:
                return end(facts, "too_late")
            return Query() if facts.was_sent else Create()
        case "unknown":
            return Query()
        case "sent":
            if facts.link_over:
                return end(facts, "expired")
            return Query() if facts.payable else end(facts, "not_payable")
        case _:
            assert_never(facts.state)


def end(facts: Facts, why: str) -> Move:
    """The first move towards an attempt's end: nothing may come of it any more."""
    match facts.state:
        case "wanted":
            return End("closed", why)
        case "created" if not facts.was_sent:
            return End("closed", why)  # no supplier has ever heard of it
        case "created" | "unknown":
            return Query(why)
        case "sent":
            return Close(why)
        case _:
            assert_never(facts.state)


def after_create(facts: Facts, answer: Answer[Link], *, other: bool) -> Move:
    """other: another supplier of the channel is well, and has not been tried for this order just now."""
    match answer:
        case Done(link):
            return Show(link)
        case MaybeDone():
            return Unknown(answer.code)
        case Refused() if answer.code in HAS_A_PAST:
            return Query()
        case NotDone() if facts.was_sent:
            return _unknown(answer)  # this call did nothing; the one before it may still arrive
        case Refused() if facts.was_sent:
            return Close("unknown")
        case NotDone() | Refused():
            here = (
                SendLater(answer.retry_in_ms) if isinstance(answer, NotDone) else End("failed", answer.code)
            )
            return Elsewhere(answer.code, here) if other and other_may(answer) else here
        case _:
            assert_never(answer)


def after_query(facts: Facts, query: Query, answer: Answer[Payment]) -> Move:
    """What a look at the supplier means for the attempt."""
    if not isinstance(answer, Done):
        # A link that is out stays out; of anything else nobody knows whether the supplier has it.
        return LookLater() if facts.state == "sent" else _unknown(answer)
    payment = answer.value
    if payment.state == "paid":
        return _settle(payment)
    if query.why is not None:
        if payment.state in ("closed", "declined"):
            return End("closed", query.why)
        return Close(query.why)
    if payment.state == "declined":
        return End("failed", payment.code or "declined")
    if payment.state == "closed" or (payment.state == "absent" and facts.state == "sent"):
        return End("closed", payment.code or "closed", again=facts.state == "unknown")
    if facts.state == "sent":
        return LookLater()
    if payment.state == "absent" and facts.state == "created":
        # A worker died before or in its call. The same id again: should that call still arrive, it is one payment.
        return Create()
    return Close("unknown")


def after_close(close: Close, answer: Answer[Payment]) -> Verdict:
    """What closing it at the supplier has led to."""
    if not isinstance(answer, Done):
        return _unknown(answer)
    if answer.value.state == "paid":
        return _settle(answer.value)
    if answer.value.state == "waiting":
        return Unknown("not_closed")
    # "unknown": the buyer had asked for this link and never saw it.
    return End("closed", None, again=True) if close.why == "unknown" else End("closed", close.why)


def _settle(payment: Payment) -> Settle:
    if payment.captured is None:
        raise ValueError("a supplier says paid without a capture")
    return Settle(payment.captured)


def _unknown(answer: NotDone | Refused | MaybeDone) -> Unknown:
    return Unknown(answer.code, answer.retry_in_ms if isinstance(answer, NotDone) else 0)
