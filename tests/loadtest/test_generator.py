"""The load generator measures the server, not itself: closed loop counts answers, open loop charges every wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import repeat

import pytest

from loadtest import generator
from loadtest.generator import answer_bytes, closed_loop, open_loop

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def slow_server() -> AsyncIterator[int]:
    """Takes 50 ms for each answer, on as many connections as there are."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            await asyncio.sleep(0.05)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: x\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_closed_loop_sends_the_next_request_when_the_answer_has_come(slow_server: int) -> None:
    result, bodies = await closed_loop(
        "127.0.0.1", slow_server, iter([REQUEST] * 20), connections=4, seconds=5, keep_bodies=True
    )
    assert (result.answers, dict(result.statuses), bodies) == (20, {200: 20}, [b"{}"] * 20)
    assert result.seconds >= 5 * 0.05  # 20 requests on 4 connections are 5 rounds
    assert result.quantile_ms(0.5) >= 50


async def test_open_loop_counts_the_wait_for_a_free_connection(slow_server: int) -> None:
    result = await open_loop("127.0.0.1", slow_server, repeat(REQUEST), per_s=100, connections=1, seconds=0.2)
    assert result.answers == 20
    # One connection takes 20 a second; the last of 20 requests, due after 0.19 s, is answered after 1 s.
    assert max(result.latencies_ms) >= 700


async def test_open_loop_gives_up_what_found_no_connection_in_time(slow_server: int) -> None:
    result = await open_loop(
        "127.0.0.1", slow_server, repeat(REQUEST), per_s=100, connections=1, seconds=0.2, give_up=True
    )
    assert result.answers + result.unsent == 20
    assert result.unsent >= 10
    assert result.in_time[200] < result.answers  # the last answer came after the last request was due


# --- every answer is looked at ----------------------------------------------------------------------------------------

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def serving(*parts: bytes) -> AsyncIterator[int]:
    """A server that answers each request with these parts, and closes behind an empty one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            for part in parts:
                writer.write(part)
                await writer.drain()
            if b"" in parts:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (ANSWER, len(ANSWER)),
        (ANSWER[:-1], len(ANSWER)),
        (ANSWER[:30], 0),
        (b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n", 38),
        (b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\n{}", 39),
        (b"HTTP/1.1 204 No Content\r\n\r\nContent-Length: 9", 27),
    ],
)
def test_the_length_of_an_answer_is_in_its_head(data: bytes, length: int) -> None:
    assert answer_bytes(data) == length


async def test_an_answer_in_parts_is_one_answer() -> None:
    async with serving(ANSWER[:5], ANSWER[5:30], ANSWER[30:]) as port:
        result, bodies = await closed_loop(
            "127.0.0.1", port, iter([REQUEST] * 6), connections=2, seconds=5, keep_bodies=True
        )
    assert (dict(result.statuses), bodies) == ({200: 6}, [b"{}"] * 6)


@pytest.mark.parametrize(
    "parts", [(ANSWER + b"!",), (ANSWER + ANSWER,), (b"SSH-2.0\r\n\r\n",), (ANSWER[:-1], b"")]
)
@pytest.mark.parametrize("way", ["closed", "open"])
async def test_what_is_not_one_whole_answer_is_counted_as_none(way: str, parts: tuple[bytes, ...]) -> None:
    async with serving(*parts) as port:
        if way == "closed":
            result, _ = await closed_loop("127.0.0.1", port, repeat(REQUEST), connections=1, seconds=5)
        else:
            result = await open_loop(
                "127.0.0.1", port, repeat(REQUEST), per_s=100, connections=1, seconds=0.02, give_up=True
            )
    assert dict(result.statuses) == {0: 1}
    assert result.answers == 0


# --- the rate was offered, or it says that it was not -----------------------------------------------------------------


@pytest.mark.parametrize(("late_s", "behind"), [(-60.0, True), (60.0, False)])
async def test_requests_that_leave_late_are_counted(
    monkeypatch: pytest.MonkeyPatch, late_s: float, behind: bool
) -> None:
    monkeypatch.setattr(generator, "LATE_S", late_s)
    async with serving(ANSWER) as port:
        result = await open_loop("127.0.0.1", port, repeat(REQUEST), per_s=200, connections=4, seconds=0.1)
    assert (result.due, result.late, result.behind) == (20, 20 if behind else 0, behind)


async def test_too_few_requests_are_no_rate() -> None:
    async with serving(ANSWER) as port:
        with pytest.raises(ValueError, match="3 requests are too few"):
            await open_loop("127.0.0.1", port, iter([REQUEST] * 3), per_s=1000, connections=2, seconds=0.01)
