"""Legal histories pass, and each single thing that may go wrong is found, by the check that is there for it."""

from __future__ import annotations

import json
from pathlib import Path

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
from app.record import Item, Line, Mark, Op, Recorder, Sale, Ticket, encode, read
from tests.history.legal import SKU, Play
from tests.history.wrong import (
    FOUND_AS,
    Change,
    Dice,
    Nothing,
    change,
    charged_twice,
    item,
    paid_then_reserved,
)

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


@pytest.mark.parametrize("wrong", FOUND_AS, ids=lambda wrong: wrong.__name__)
@settings(max_examples=8, deadline=None)
@given(play=plays, seed=st.integers(0, 2**16))
def test_each_single_fault_is_found_and_said(wrong: Change, play: Play, seed: int) -> None:
    lines = play.play()
    try:
        broken = wrong(lines, Dice(seed))
    except Nothing:
        assume(False)
    verdict = judge(broken)
    check, words = FOUND_AS[wrong]
    found = next(result for result in verdict.results if result.name == check)
    assert any(words in finding.what for finding in found.findings), "\n".join(report(verdict, broken))


@settings(max_examples=30, deadline=None)
@given(play=plays, seed=st.integers(0, 2**16))
def test_a_history_that_broke_off_is_judged_by_what_clients_and_supplier_said(play: Play, seed: int) -> None:
    lines = play.play()
    said = lines[: next(at for at, line in enumerate(lines) if isinstance(line, Sale))]
    broken_off = said[: Dice(seed).randrange(len(said) + 1)]
    assert judge(broken_off).ok
    try:
        broken = paid_then_reserved(broken_off, Dice(seed))
    except Nothing:
        assume(False)
    assert judge(broken).broken == {"states"}


@settings(max_examples=30, deadline=None)
@given(play=plays)
def test_nothing_that_a_foreign_redis_says_is_held_against_a_sale(play: Play) -> None:
    """Redis is not the home of the sale any more: what it has is of another time, or of nobody."""
    lines = play.play()
    lines = change(lines, next(line for line in lines if isinstance(line, Sale)), held=False, redis_epoch=0)
    lines = change(lines, item(lines), left=None, outcome="", served=0, drawn_hashes="")
    verdict = judge([line for line in lines if not isinstance(line, Ticket)])
    assert verdict.ok, "\n".join(report(verdict, lines))


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


def test_in_a_sale_made_anew_the_commitment_stands() -> None:
    assert judge(anew()).ok
    assert judge(anew(seed_hash="0" * 64)).broken == {"draw"}
    assert judge(anew(drawn_n=1)).broken == {"draw"}, "a draw without its tickets"


def test_a_rank_that_was_lost_with_redis_binds_no_later_draw() -> None:
    """The same buyer may get the same place of the next line: a ticket of the same name, with another rank."""

    def with_ranks(lines: list[Line]) -> list[Line]:
        return [msgspec.structs.replace(line, rank=int(line.at) or None) for line in lines]

    lapsed = with_ranks(polled("7-a", "ann", "waiting", "waiting", "lapsed"))
    assert judge([*lapsed, *anew(outcome="......w")]).ok
    kept = with_ranks(polled("7-a", "ann", "waiting", "waiting", "waiting"))
    assert judge([*kept, *anew(outcome="......w")]).broken == {"draw"}


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
