"""`fairdrop demo`: what it prints, how it judges, and that killing the worker in the middle changes nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.demo.books import close_books
from app.demo.crowd import Buyer, Crowd, Doing, Wires, cast_crowd, may_follow
from app.errors import Unknown

CHECKOUT = Path(__file__).resolve().parents[1]
PATIENCE_S = 600.0  # some 30 at rest; how many it takes says how busy the machine is
FIELDS = [
    *(
        "buyers",
        "units",
        "joined",
        "claimed",
        "reserved",
        "paid",
        "expired",
        "released",
        "standby_wins",
        "refunded",
    ),
    *("oversold", "duplicates", "lost", "sms_sent", "seconds", "audit"),
]


def run_demo(*options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "demo", *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def kept(result: dict[str, Any]) -> bool:
    broken = [check for check in result["audit"] if not check["ok"]]
    assert not broken
    return bool(result["oversold"] == result["duplicates"] == result["lost"] == 0)


@pytest.mark.slow
@pytest.mark.serial
def test_a_whole_sale_prints_one_json_document_and_every_promise_is_kept() -> None:
    status, out, err = run_demo("--buyers", "400", "--units", "40", "--seed", "3", "--json")
    assert status == 0, err
    result = json.loads(out)  # nothing else on standard output
    assert list(result) == FIELDS
    assert kept(result)
    assert result["buyers"] == result["joined"] == 400
    assert result["units"] == 40
    assert 0 < result["paid"] <= 40
    assert result["claimed"] == result["reserved"] >= 40  # units that came back were sold again
    assert result["expired"] > 0
    assert result["released"] >= result["expired"]
    assert result["standby_wins"] > 0
    assert result["sms_sent"] > 0
    assert result["seconds"] > 0  # how many says how busy the machine is; run_demo has its own patience
    for check in result["audit"]:
        assert set(check) == {"name", "ok", "left", "right"}


@pytest.mark.slow
@pytest.mark.serial
def test_killing_the_worker_in_the_middle_changes_nothing_in_the_result() -> None:
    status, out, err = run_demo("--buyers", "400", "--units", "40", "--seed", "3", "--json", "--kill-worker")
    assert "kill -9 of the worker (process " in err
    assert "(process 0)" not in err
    assert status == 0, err
    result = json.loads(out)
    assert kept(result)
    assert result["joined"] == 400
    assert result["claimed"] >= 40


def test_bad_usage_is_exit_2_and_prints_nothing_on_standard_output() -> None:
    status, out, err = run_demo("--buyers", "0", "--json")
    assert (status, out) == (2, "")
    assert "buyers" in err


# --- the crowd -------------------------------------------------------------------------------------------------------


def test_the_same_seed_casts_the_same_crowd() -> None:
    assert cast_crowd(500, 20, 7) == cast_crowd(500, 20, 7)
    assert cast_crowd(500, 20, 7) != cast_crowd(500, 20, 8)


def test_the_crowd_has_bots_and_people_who_do_not_pay_who_leave_and_who_pay_late() -> None:
    crowd = cast_crowd(5_000, 200, 1)
    assert any(buyer.taps == 10 for buyer in crowd)
    assert any(not buyer.pays for buyer in crowd)
    assert {"waiting", "won"} <= {buyer.leaves for buyer in crowd}
    assert any(buyer.pays_late for buyer in crowd)
    assert any(buyer.phone for buyer in crowd)
    assert any(buyer.arrives_s < 0 for buyer in crowd)
    assert any(buyer.arrives_s > 0 for buyer in crowd)


@pytest.mark.parametrize(
    ("before", "after", "fine"),
    [
        ("waiting", "reserved", True),  # claimed was over before the next look
        ("waiting", "sold_out", True),
        ("expired", "paid", True),  # late money
        ("reserved", "waiting", False),
        ("paid", "reserved", False),
        ("sold_out", "waiting", False),
        ("reserved", "closed", False),
    ],
)
def test_states_only_move_along_the_arrows(before: str, after: str, fine: bool) -> None:
    assert may_follow(before, after) is fine


# --- the books -------------------------------------------------------------------------------------------------------


def person(name: str, *states: str, order_no: str | None = None, tickets: int = 1) -> Buyer:
    buyer = Buyer(name, 0.0, 0.0)
    buyer.states = list(states)
    buyer.state = states[-1]
    buyer.ticket_ids = {f"{name}-{number}" for number in range(tickets)}
    buyer.order_no = order_no
    return buyer


def row(order_no: str, buyer_id: str, state: str) -> dict[str, Any]:
    return {"order_no": order_no, "buyer_id": buyer_id, "state": state, "units": 1}


def broken(people: list[Buyer], orders: list[dict[str, Any]], units: int) -> tuple[dict[str, int], int]:
    figures, checks = close_books(people, orders, units)
    return figures, sum(not check.ok for check in checks)


def test_books_that_agree_have_nothing_to_say() -> None:
    people = [person("a", "waiting", "reserved", "paid", order_no="A"), person("b", "waiting", "closed")]
    figures, faults = broken(people, [row("A", "a", "paid")], 1)
    assert faults == 0
    assert (figures["paid"], figures["oversold"], figures["duplicates"], figures["lost"]) == (1, 0, 0, 0)


def test_a_buyer_who_was_told_reserved_and_has_no_order_is_lost() -> None:
    figures, faults = broken([person("a", "waiting", "reserved")], [], 1)
    assert (figures["lost"], faults) == (1, 1)


def test_a_buyer_who_was_told_claimed_and_then_nothing_is_lost() -> None:
    figures, faults = broken([person("a", "waiting", "claimed")], [], 1)
    assert figures["lost"] == 1
    assert faults >= 1


def test_an_order_number_that_belongs_to_somebody_else_is_lost() -> None:
    people = [person("a", "paid", order_no="B"), person("b", "paid", order_no="B")]
    figures, faults = broken(people, [row("A", "a", "paid"), row("B", "b", "paid")], 2)
    assert (figures["lost"], faults) == (1, 1)


def test_one_order_more_than_units_is_oversold() -> None:
    people = [person("a", "reserved", "paid"), person("b", "reserved", "paid")]
    figures, faults = broken(people, [row("A", "a", "paid"), row("B", "b", "paid")], 1)
    assert (figures["oversold"], faults) == (1, 1)


def test_two_tickets_or_two_orders_of_one_buyer_are_duplicates() -> None:
    people = [person("a", "reserved", "paid"), person("b", "waiting", "closed", tickets=2)]
    figures, faults = broken(people, [row("A", "a", "paid"), row("C", "a", "expired")], 2)
    assert (figures["duplicates"], faults) == (2, 1)


def test_a_buyer_who_was_told_paid_without_a_paid_order_breaks_a_promise() -> None:
    _, faults = broken([person("a", "reserved", "paid")], [row("A", "a", "expired")], 1)
    assert faults == 1


def test_a_state_that_went_backwards_is_noticed() -> None:
    crowd = Crowd([], front="http://127.0.0.1:1", sale="s", sku="k", seed=1)
    buyer = person("a", "reserved")
    crowd._move(buyer, "waiting")
    assert buyer.bent == "reserved -> waiting"
    assert broken([buyer], [row("A", "a", "reserved")], 1)[1] >= 1


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def moody() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers 503 with Retry-After, then drops the connection, then answers; all on request."""
    moods = [
        b"HTTP/1.1 503 x\r\nRetry-After: 0.01\r\nContent-Length: 2\r\n\r\n{}",
        b"",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ]
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            asked.append(head)
            while await reader.readline() != b"\r\n":
                pass
            mood = moods.pop(0)
            if not mood:
                break
            writer.write(mood)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def test_a_request_is_repeated_after_503_and_after_a_lost_answer(
    moody: tuple[str, list[bytes]],
) -> None:
    url, asked = moody
    crowd = Crowd([], front=url, sale="s", sku="k", seed=1)
    try:
        answer = await crowd._repeat(Doing("time", ""), "GET", "/v1/time", b"")
    finally:
        crowd.close()
    assert (answer.status, answer.body) == (200, b"{}")
    assert asked == [b"GET /v1/time HTTP/1.1\r\n"] * 3
    assert crowd.repeats == 2


async def test_no_server_is_an_unknown_outcome_not_a_crash() -> None:
    wires = Wires("http://127.0.0.1:1")
    with pytest.raises(Unknown):
        await wires.ask("GET", "/")
