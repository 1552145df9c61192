"""Legal histories pass, and each single thing that may go wrong is found, by the check that is there for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import typer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from app import draw
from app.commands.check_history import check_history
from app.history.judge import judge
from app.history.report import report
from app.record import (
    Buried,
    Capture,
    Inbox,
    Item,
    Line,
    Mark,
    Op,
    Order,
    Recorder,
    Refused,
    Sale,
    Stream,
    Supplier,
    Ticket,
    Wire,
    encode,
    read,
)
from tests.history.legal import SKU, Play

L = TypeVar("L", bound=msgspec.Struct)
Dice = random.Random

plays = st.builds(
    Play,
    seed=st.integers(0, 2**20),
    buyers=st.integers(1, 25),
    units=st.integers(1, 9),
    early=st.booleans(),
    standby=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(play=plays)
def test_a_legal_history_keeps_every_promise(play: Play) -> None:
    lines = play.play()
    verdict = judge(lines)
    assert verdict.ok, "\n".join(report(verdict, lines))


class Nothing(Exception):
    """This history has nothing that could be broken this way."""


def pick(lines: list[Line], kind: type[L], dice: Dice, fits: Callable[[L], bool] = lambda _: True) -> L:
    found = [line for line in lines if isinstance(line, kind) and fits(line)]
    if not found:
        raise Nothing
    return dice.choice(found)


def told(state: str) -> Callable[[Op], bool]:
    return lambda op: op.do == "ok" and op.state == state


def change(lines: list[Line], old: msgspec.Struct, **changes: Any) -> list[Line]:
    new = msgspec.structs.replace(old, **changes)
    return [new if line is old else line for line in lines]  # type: ignore[misc]


def without(lines: list[Line], old: msgspec.Struct) -> list[Line]:
    return [line for line in lines if line is not old]


def later_answer(lines: list[Line], before: Op, **changes: Any) -> list[Line]:
    """The same client asks again once the answer `before` was there, and is told something else."""
    at = before.at + 1_000
    number = max(line.id for line in lines if isinstance(line, Op)) + 1
    begun = Op(at=at, do="invoke", id=number, process=before.process, op="poll", buyer=before.buyer)
    end = msgspec.structs.replace(before, at=at + 0.01, id=number, op="poll", **changes)
    return [*lines, begun, end]


def item(lines: list[Line]) -> Item:
    return next(line for line in lines if isinstance(line, Item))


def order_is_lost(lines: list[Line], dice: Dice) -> list[Line]:
    told = {
        line.order for line in lines if isinstance(line, Op)
    }  # of one that nobody was told of, `queue` knows
    order = pick(
        [line for line in lines if not isinstance(line, Order) or line.order_no in told], Order, dice
    )
    return without(lines, order)


def order_is_doubled(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    return [*lines, msgspec.structs.replace(order, order_no=order.order_no + "B")]


def oversold(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), sold=item(lines).total + 1)


def a_unit_too_many_in_redis(lines: list[Line], dice: Dice) -> list[Line]:
    left = item(lines).left
    assert left is not None
    return change(lines, item(lines), left=left + 1)


def a_unit_vanished(lines: list[Line], dice: Dice) -> list[Line]:
    left = item(lines).left
    if left is None:
        raise Nothing
    return change(lines, item(lines), left=left - 1)  # also below 0: most of these sales sell out


def stock_is_lost(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), left=None)


def two_outcomes(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    refused = Refused(
        order_no=order.order_no, sku=SKU, buyer=order.buyer, epoch=1, seq=order.seq, units=1, reason="live_order",
        returned=True,
    )  # fmt: skip
    return [*lines, refused]


def refused_for_lack(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    refused = Refused(
        order_no=order.order_no, sku=SKU, buyer=order.buyer, epoch=1, seq=order.seq, units=1, reason="no_stock",
        returned=False,
    )  # fmt: skip
    return [*without(lines, order), refused]


def entry_lost(lines: list[Line], dice: Dice) -> list[Line]:
    stream = pick(lines, Stream, dice)
    return change(lines, stream, added=stream.added + 1)


def entry_in_hand(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Stream, dice), pending=1)


def entry_buried(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, Buried(stream="orders", entry="1-1", reason="UniqueViolationError")]


def served_for_nothing(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    at = of.outcome.find("w")
    if at < 0:
        raise Nothing
    return change(lines, of, outcome=of.outcome[:at] + "c" + of.outcome[at + 1 :])


def charged_twice(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured")
    return [*lines, msgspec.structs.replace(first, capture="other", at=first.at + 1)]


def wrong_amount(lines: list[Line], dice: Dice) -> list[Line]:
    paid = {line.order_no for line in lines if isinstance(line, Order) and line.state == "paid"}
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured" and s.order in paid)
    return change(lines, first, amount_minor=first.amount_minor + 1)


def not_refunded(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Supplier, dice, lambda s: s.op == "refunded"))


def paid_for_nothing(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured")
    return without(lines, first)


def capture_not_on_record(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Capture, dice))


def hook_not_on_record(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Inbox, dice))


def two_links(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "created")
    at = lines.index(first)
    second = msgspec.structs.replace(first, attempt=first.attempt + "B", at=first.at + 0.0001)
    return [*lines[: at + 1], second, *lines[at + 1 :]]


def paid_then_reserved(lines: list[Line], dice: Dice) -> list[Line]:
    return later_answer(lines, pick(lines, Op, dice, told("paid")), state="reserved")


def claimed_then_waiting(lines: list[Line], dice: Dice) -> list[Line]:
    return later_answer(lines, pick(lines, Op, dice, told("claimed")), state="waiting")


def paid_order_ends_expired(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Order, dice, lambda o: o.state == "paid"), state="expired")


def redis_says_less(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice, lambda o: o.state == "paid")
    of = item(lines)
    return change(lines, of, outcome=of.outcome[: order.seq - 1] + "r" + of.outcome[order.seq :])


def redis_is_behind(lines: list[Line], dice: Dice) -> list[Line]:
    ticket = pick(lines, Ticket, dice, lambda t: t.version > 1)
    return change(lines, ticket, version=ticket.version - 1)


def agreed_late(lines: list[Line], dice: Dice) -> list[Line]:
    mark = pick(lines, Mark, dice, lambda m: m.what == "agreed")
    return change(lines, mark, at=mark.at + 61)


def out_of_turn(lines: list[Line], dice: Dice) -> list[Line]:
    orders = [line for line in lines if isinstance(line, Order)]
    if len(orders) < 2:
        raise Nothing
    last = max(orders, key=lambda order: order.claimed_ms)
    return change(lines, last, claimed_ms=1)


def passed_over(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    if "w" not in of.outcome or of.dead_seq:
        raise Nothing
    return change(lines, of, served=len(of.outcome))


def ahead_grows(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, lambda op: op.ahead is not None)
    assert seen.ahead is not None
    return later_answer(lines, seen, ahead=seen.ahead + 1, state="waiting")


def other_key(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), drawn_key="0" * 40)


def other_hash(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    if not of.drawn_hashes:
        raise Nothing
    first = "0" if of.drawn_hashes[0] != "0" else "1"
    return change(lines, of, drawn_hashes=first + of.drawn_hashes[1:])


def turned_away_too_soon(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    of = item(lines)
    return later_answer(
        change(lines, of, total=of.total + 50, left=(of.left or 0) + 50), seen, state="sold_out"
    )


def two_tickets(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    return later_answer(lines, seen, ticket=f"9999-{'0' * 20}", seq=9999)


def one_place_twice(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    return later_answer(lines, seen, ticket=f"{seen.seq}-{'0' * 20}", buyer="stranger")


def place_forgotten(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    return change(lines, of, outcome=of.outcome[:-1] + ".")


def asked_twice_for_one_tap(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, pick(lines, Wire, dice)]


def held_at_once(lines: list[Line], dice: Dice) -> list[Line]:
    """More buyers than units are told, twice and at the same time, that they hold one; nothing else says so."""
    made: list[Line] = []
    for number in range(item(lines).total + 1):
        for look in range(2):
            who = {
                "id": 10**6 + number * 2 + look,
                "process": f"x{number}",
                "op": "poll",
                "buyer": f"x{number}",
            }
            at = 5_000.0 + look + number / 1_000
            made.append(Op(at=at, do="invoke", **who))  # type: ignore[arg-type]
            end = Op(at=at + 0.0001, do="ok", sku=SKU, units=1, ticket=f"x{number}", state="reserved", **who)  # type: ignore[arg-type]
            made.append(end)
    return [*lines, *made]


MUTATIONS: dict[Callable[[list[Line], Dice], list[Line]], str] = {
    order_is_lost: "set",
    order_is_doubled: "set",
    oversold: "bank",
    a_unit_too_many_in_redis: "bank",
    a_unit_vanished: "bank",
    stock_is_lost: "stores",
    two_outcomes: "queue",
    refused_for_lack: "bank",
    entry_lost: "queue",
    entry_in_hand: "queue",
    entry_buried: "queue",
    served_for_nothing: "queue",
    charged_twice: "money",
    wrong_amount: "money",
    not_refunded: "money",
    paid_for_nothing: "money",
    capture_not_on_record: "money",
    hook_not_on_record: "money",
    two_links: "money",
    paid_then_reserved: "states",
    claimed_then_waiting: "states",
    paid_order_ends_expired: "stores",
    redis_says_less: "stores",
    redis_is_behind: "stores",
    agreed_late: "stores",
    out_of_turn: "line",
    passed_over: "line",
    ahead_grows: "line",
    other_key: "draw",
    other_hash: "draw",
    turned_away_too_soon: "sold_out",
    two_tickets: "set",
    one_place_twice: "set",
    place_forgotten: "set",
    asked_twice_for_one_tap: "executions",
    held_at_once: "bank",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@settings(max_examples=15, deadline=None)
@given(play=plays, seed=st.integers(0, 2**16))
def test_each_single_fault_is_found(
    mutation: Callable[[list[Line], Dice], list[Line]], play: Play, seed: int
) -> None:
    lines = play.play()
    try:
        broken = mutation(lines, Dice(seed))
    except Nothing:
        assume(False)
    verdict = judge(broken)
    assert MUTATIONS[mutation] in verdict.broken, "\n".join(report(verdict, broken))


# Concurrency is nobody's fault


def test_answers_that_overlap_may_come_in_either_order() -> None:
    lines: list[Line] = []
    for number, (begun, ended, state) in enumerate([(1.0, 4.0, "reserved"), (2.0, 3.0, "paid")]):
        who = {"id": number, "process": f"b#{number}", "op": "poll", "buyer": "b"}
        lines.append(Op(at=begun, do="invoke", **who))  # type: ignore[arg-type]
        lines.append(Op(at=ended, do="ok", ticket="1-a", state=state, **who))  # type: ignore[arg-type]
    assert judge(lines).ok
    late = [msgspec.structs.replace(one, at=one.at + 10) if one.id == 0 else one for one in lines]  # type: ignore[union-attr]
    assert judge(late).broken == {"states"}


# The file and the command


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    lines = Play(7).play()
    with Recorder(tmp_path / "h.jsonl") as record:
        record.add_all(lines)
    assert read(tmp_path / "h.jsonl") == lines


def test_the_command_judges_a_file_and_tells_the_story_of_the_first_counterexample(tmp_path: Path) -> None:
    run, commands = CliRunner(), typer.Typer()
    commands.command()(check_history)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    lines = Play(7).play()
    good.write_bytes(b"".join(encode(line) for line in lines))
    bad.write_bytes(b"".join(encode(line) for line in charged_twice(lines, Dice(1))))

    fine = run.invoke(commands, [str(good)])
    assert fine.exit_code == 0, fine.output
    assert "every promise was kept" in fine.output

    broken = run.invoke(commands, [str(bad)])
    assert broken.exit_code == 1
    assert "BROKEN money" in broken.output
    assert "is told reserved" in broken.output
    assert "supplier: captured" in broken.output

    shown = json.loads(run.invoke(commands, ["--json", str(bad)]).output)
    assert shown["ok"] is False
    assert [check["name"] for check in shown["checks"] if not check["ok"]] == ["money"]
    assert shown["story"]


def polled(ticket: str, buyer: str, *states: str, seq: int = 7, order: str = "") -> list[Line]:
    """Polls one after the other; an order is told with the last."""
    lines: list[Line] = []
    for number, state in enumerate(states):
        common = {
            "id": hash((ticket, number)),
            "process": buyer,
            "op": "poll",
            "buyer": buyer,
            "sale": "s",
            "sku": SKU,
        }
        lines.append(Op(at=float(2 * number), do="invoke", **common))
        last = order if number == len(states) - 1 else ""
        lines.append(
            Op(
                at=float(2 * number + 1),
                do="ok",
                status=200,
                ticket=ticket,
                state=state,
                seq=seq,
                order=last,
                **common,
            )
        )
    return lines


@pytest.mark.parametrize(("epoch", "broken"), [(1, {"set", "states"}), (2, set())])
def test_a_claim_lapses_and_its_seq_is_given_again_only_when_a_sale_was_made_anew(
    epoch: int, broken: set[str]
) -> None:
    lines: list[Line] = [
        *polled("7-a", "ann", "claimed", "lapsed"),
        *polled("7-b", "bob", "claimed"),
        Sale(
            at=9.0,
            sale="s",
            state="closed",
            epoch=epoch,
            limit=1,
            standby=False,
            held=False,
            redis_epoch=epoch,
        ),
    ]
    assert judge(lines).broken == broken


def anew(*, outcome: str = "", drawn_n: int = 0, seed_hash: str = "") -> list[Line]:
    """The end of a sale that was made anew once; what is asked at 2 s is surely told by its new epoch."""
    seed = bytes(32)
    committed = seed_hash or draw.seed_hash(seed)
    chain = draw.chain_start("s", SKU, 2, committed)
    return [
        Mark(at=-1.5, what="healed"),
        Sale(
            at=9.0, sale="s", state="closed", epoch=2, limit=1, standby=False, held=True, redis_epoch=2,
            seed=seed.hex(), seed_hash=committed,
        ),
        Item(
            sku=SKU, epoch=2, total=5, reserved=0, sold=0, left=5, next_seq=len(outcome) + 1, drawn=True,
            drawn_n=drawn_n, drawn_key=draw.draw_key(seed, chain, ""), chain=chain, outcome=outcome,
        ),
    ]  # fmt: skip


def test_in_a_sale_made_anew_a_place_told_after_healing_is_there() -> None:
    waits = polled("7-a", "ann", "waiting", "waiting")
    assert judge([*waits, *anew(outcome="......w")]).ok
    assert "Redis never heard of it" in str(judge([*waits, *anew(outcome="......")]).results)
    assert judge([*polled("7-a", "ann", "waiting"), *anew(outcome="......")]).ok, (
        "told before: lost with Redis"
    )


def test_in_a_sale_made_anew_the_commitment_stands_and_nobody_changes_rank() -> None:
    assert judge(anew()).ok
    assert judge(anew(seed_hash="0" * 64)).broken == {"draw"}
    assert judge(anew(drawn_n=1)).broken == {"draw"}, "a draw without its tickets"
    twice = [
        msgspec.structs.replace(line, rank=int(line.at))
        for line in polled("7-a", "ann", "waiting", "waiting")
    ]
    assert judge([*twice, *anew(outcome="......w")]).broken == {"draw"}


def test_who_lost_a_place_with_redis_may_ask_again_once_for_each_rebuild() -> None:
    def tickets(count: int) -> list[Line]:
        return [line for n in range(count) for line in polled(f"{n + 7}-a", "ann", "lapsed", seq=n + 7)]

    assert judge([*tickets(2), *anew()]).ok
    assert judge([*tickets(3), *anew()]).broken == {"set"}


def test_one_seq_has_one_order_in_a_sale_that_was_made_anew_too() -> None:
    lines: list[Line] = [
        *polled("7-a", "ann", "reserved", order="A"),
        *polled("7-b", "bob", "reserved", order="B"),
        Sale(at=9.0, sale="s", state="closed", epoch=2, limit=1, standby=False, held=False, redis_epoch=2),
    ]
    assert "was given to 2 tickets" in str(judge(lines).results)
