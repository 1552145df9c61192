"""The load generator measures the server, not itself: closed loop counts answers, open loop charges every wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import repeat

import pytest

from loadtest.generator import closed_loop, open_loop

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
