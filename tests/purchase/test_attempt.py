"""What becomes of a payment attempt: as a table, and against a supplier that lies in wait. Never two at once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any, Literal, NamedTuple

import pytest

from app.breaker import Result
from app.providers.answer import BREAKER_OPEN, Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import Captured, Link, Payment
from app.purchase.paying import attempt
from app.purchase.paying.attempt import (
    Close,
    Create,
    Elsewhere,
    End,
    Facts,
    LookLater,
    MakeWay,
    Move,
    PayNothing,
    Query,
    SendLater,
    Settle,
    Show,
    Unknown,
)

NOW = datetime(2026, 11, 22, tzinfo=UTC)
LINK = Link(provider_ref="p", kind="redirect", url="u", params=None, expires_at=NOW)
MONEY = Captured(
    provider_ref="c", attempt_id="O-1", order_no="O", amount_minor=1, currency="CNY", captured_at=NOW
)
PAID = Done(Payment(state="paid", captured=MONEY))
WAITING, ABSENT = Done(Payment(state="waiting")), Done(Payment(state="absent"))
CLOSED, DECLINED = Done(Payment(state="closed")), Done(Payment(state="declined", code="no_funds"))
OPEN = NotDone(BREAKER_OPEN, 900, Result.IGNORED)
LOST = MaybeDone("deadline")


@pytest.mark.parametrize(
    ("facts", "move"),
    [
        ({"state": "wanted"}, MakeWay()),
        ({"state": "created"}, Create()),
        ({"state": "created", "costs_nothing": True}, PayNothing()),
        ({"state": "created", "costs_nothing": True, "payable": False}, End("closed", "not_payable")),
        ({"state": "created", "too_late": True}, End("closed", "too_late")),
        ({"state": "created", "payable": False}, End("closed", "not_payable")),
        ({"state": "created", "was_sent": True}, Query()),
        ({"state": "created", "was_sent": True, "too_late": True}, Query("too_late")),
        ({"state": "created", "was_sent": True, "payable": False}, Query("not_payable")),
        ({"state": "unknown"}, Query()),
        ({"state": "unknown", "payable": False}, Query()),
        ({"state": "sent"}, Query()),
        ({"state": "sent", "link_over": True}, Close("expired")),
        ({"state": "sent", "payable": False}, Close("not_payable")),
        ({"state": "sent", "payable": False, "link_over": True}, Close("expired")),
    ],
)
def test_the_first_move(facts: dict[str, Any], move: Move) -> None:
    assert attempt.begin(Facts(**facts)) == move


@pytest.mark.parametrize(
    ("answer", "alone", "with_another"),
    [
        (Done(LINK), Show(LINK), Show(LINK)),
        (OPEN, SendLater(900), Elsewhere(BREAKER_OPEN, SendLater(900))),
        (NotDone("ConnectError"), SendLater(0), Elsewhere("ConnectError", SendLater(0))),
        (Refused("amount"), End("failed", "amount"), End("failed", "amount")),
        (
            Refused("currency", other_may=True),
            End("failed", "currency"),
            Elsewhere("currency", End("failed", "currency")),
        ),
        (Refused("paid", other_may=True), Query(), Query()),
        (Refused("closed"), Query(), Query()),
        (Refused("declined"), Query(), Query()),
        (LOST, Unknown("deadline"), Unknown("deadline")),
    ],
)
def test_after_asking_for_the_link(answer: Answer[Link], alone: Move, with_another: Move) -> None:
    assert attempt.after_create(Facts(state="created"), answer, other=False) == alone
    assert attempt.after_create(Facts(state="created"), answer, other=True) == with_another


@pytest.mark.parametrize(
    ("answer", "move"),
    [
        (Done(LINK), Show(LINK)),
        (OPEN, Unknown(BREAKER_OPEN, 900)),
        (Refused("currency", other_may=True), Close("unknown")),
        (Refused("closed"), Query()),
        (LOST, Unknown("deadline")),
    ],
)
def test_after_asking_for_a_link_that_somebody_may_have_asked_for_before(
    answer: Answer[Link], move: Move
) -> None:
    """What this call did not do, the one before it may still do: nothing goes to another supplier."""
    assert attempt.after_create(Facts(state="created", was_sent=True), answer, other=True) == move


@pytest.mark.parametrize(
    ("state", "why", "answer", "move"),
    [
        ("created", None, PAID, Settle(MONEY)),
        ("unknown", None, PAID, Settle(MONEY)),
        ("unknown", "too_late", PAID, Settle(MONEY)),
        ("sent", None, PAID, Settle(MONEY)),
        ("created", None, ABSENT, Create()),
        ("unknown", None, ABSENT, Close("unknown")),
        ("sent", None, ABSENT, End("closed", "closed")),
        ("created", "too_late", ABSENT, Close("too_late")),
        ("created", None, WAITING, Close("unknown")),
        ("unknown", None, WAITING, Close("unknown")),
        ("sent", None, WAITING, LookLater()),
        ("unknown", "replaced", WAITING, Close("replaced")),
        ("created", None, CLOSED, End("closed", "closed")),
        ("unknown", None, CLOSED, End("closed", "closed", again=True)),
        ("sent", None, CLOSED, End("closed", "closed")),
        ("unknown", "replaced", CLOSED, End("closed", "replaced")),
        ("unknown", None, DECLINED, End("failed", "no_funds")),
        ("unknown", "replaced", DECLINED, End("closed", "replaced")),
        ("created", None, OPEN, Unknown(BREAKER_OPEN, 900)),
        ("unknown", None, LOST, Unknown("deadline")),
        ("unknown", "replaced", Refused("auth"), Unknown("auth")),
        ("sent", None, OPEN, LookLater()),
        ("sent", None, LOST, LookLater()),
    ],
)
def test_after_a_query(state: Any, why: str | None, answer: Answer[Payment], move: Move) -> None:
    assert attempt.after_query(Facts(state=state, was_sent=True), Query(why), answer) == move


@pytest.mark.parametrize(
    ("why", "answer", "move"),
    [
        ("expired", CLOSED, End("closed", "expired")),
        ("expired", DECLINED, End("closed", "expired")),
        ("expired", ABSENT, End("closed", "expired")),
        ("unknown", CLOSED, End("closed", None, again=True)),
        ("expired", PAID, Settle(MONEY)),
        ("expired", WAITING, Unknown("not_closed")),
        ("expired", OPEN, Unknown(BREAKER_OPEN, 900)),
        ("expired", LOST, Unknown("deadline")),
        ("expired", Refused("auth"), Unknown("auth")),
    ],
)
def test_after_closing_it(why: str, answer: Answer[Payment], move: Move) -> None:
    assert attempt.after_close(Close(why), answer) == move


def test_paid_without_a_capture_is_an_adapters_bug() -> None:
    with pytest.raises(ValueError, match="without a capture"):
        attempt.after_close(Close("expired"), Done(Payment(state="paid")))


# Against a supplier: every state that can be reached

Fate = Literal["answers", "answer is lost", "call is lost", "not done", "refused"]
FATES: tuple[Fate, ...] = ("answers", "answer is lost", "call is lost", "not done", "refused")


class There(NamedTuple):
    """What one attempt is at its supplier, whatever we are told of it."""

    state: Literal["absent", "waiting", "paid", "closed"] = "absent"
    on_its_way: bool = False  # a create call that was given up and has not arrived yet

    def may_be_paid(self) -> bool:
        return self.state == "waiting" or (self.state == "absent" and self.on_its_way)

    def made(self) -> There:
        return self._replace(state="waiting") if self.state == "absent" else self


class Here(NamedTuple):
    """What we have on record."""

    state: Literal["created", "sent", "unknown"] = "created"
    was_sent: bool = False
    link_out: bool = False


class Turn(NamedTuple):
    """A worker in the middle of its turn: what it knew at the start, and its next move."""

    facts: Facts
    move: Move


Node = tuple[There, Here, Turn | None]


def shown(there: There) -> Answer[Payment]:
    return Done(Payment(state=there.state, captured=MONEY if there.state == "paid" else None))


def creates(there: There, fate: Fate) -> tuple[There, Answer[Link]]:
    match fate:
        case "answers":
            there = there.made()
            return there, Done(LINK) if there.state == "waiting" else Refused(there.state)
        case "answer is lost":
            return there.made(), LOST
        case "call is lost":
            return there._replace(on_its_way=True), LOST
        case "not done":
            return there, NotDone("ConnectError")
        case "refused":
            return there, Refused("currency" if there.state == "absent" else there.state, other_may=True)


def queries(there: There, fate: Fate) -> tuple[There, Answer[Payment]]:
    match fate:
        case "answers":
            return there, shown(there)
        case "answer is lost" | "call is lost":
            return there, LOST
        case "not done":
            return there, NotDone("ConnectError")
        case "refused":
            return there, Refused("auth")


def closes(there: There, fate: Fate) -> tuple[There, Answer[Payment]]:
    closed = there if there.state == "paid" else there._replace(state="closed")
    match fate:
        case "answers":
            return closed, shown(closed)
        case "answer is lost":
            return closed, LOST
        case "refused":
            return there, shown(there) if there.state == "waiting" else Refused("auth")
        case _:
            return queries(there, fate)


def after(node: Node) -> Iterator[Node]:
    """Everything that may happen next. Asserts the law wherever something is decided for good."""
    there, here, turn = node
    if there.state == "waiting":
        yield there._replace(state="paid"), here, turn  # the buyer pays
    if there.on_its_way:
        yield there.made()._replace(on_its_way=False), here, turn  # a lost call arrives after all
    if turn is None:
        for payable, too_late, link_over in product((True, False), repeat=3):
            facts = Facts(
                state=here.state,
                was_sent=here.was_sent,
                payable=payable,
                too_late=too_late,
                link_over=link_over and here.link_out,
            )
            yield there, here, Turn(facts, attempt.begin(facts))
        return
    facts, move = turn
    yield there, here, None  # the worker dies
    match move:
        case Create():
            here = here._replace(was_sent=True)  # on record before the call
            for fate, other in product(FATES, (True, False)):
                then, linked = creates(there, fate)
                yield then, here, Turn(facts, attempt.after_create(facts, linked, other=other))
        case Query():
            for fate in FATES:
                then, looked = queries(there, fate)
                yield then, here, Turn(facts, attempt.after_query(facts, move, looked))
        case Close():
            for fate in FATES:
                then, looked = closes(there, fate)
                yield then, here, Turn(facts, attempt.after_close(move, looked))
        case Show():
            yield there, Here("sent", here.was_sent, True), None
        case SendLater():
            # On record as never sent: another supplier may be next.
            assert there.state == "absent" and not there.may_be_paid(), node
            yield there, here._replace(was_sent=False), None
        case Unknown():
            yield there, here._replace(state="unknown"), None
        case LookLater():
            assert here.state == "sent"
            yield there, here, None
        case Settle():
            assert there.state == "paid", node
        case End() | Elsewhere():
            assert not there.may_be_paid() and there.state != "paid", node
        case _:
            raise AssertionError(f"not expected of such an attempt: {move}")


def test_nothing_else_is_begun_while_an_attempt_may_still_be_paid() -> None:
    """Buyers who pay at any moment, calls and answers that are lost or late, workers that die: every state there is."""
    start: Node = (There(), Here(), None)
    seen, ahead = {start}, [start]
    while ahead:
        for node in after(ahead.pop()):
            if node not in seen:
                seen.add(node)
                ahead.append(node)
    verdicts = {type(turn.move) for _, _, turn in seen if turn is not None}
    assert verdicts >= {Show, SendLater, Elsewhere, Unknown, LookLater, Settle, End}
