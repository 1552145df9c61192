"""A body has to come in time, also where the server itself would wait for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from app.serving.patience import Patience

Message = dict[str, Any]


async def echo(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """What it was sent, or "gone"."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            body, more = b"gone", False
        else:
            body += message["body"]
            more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def ask(pieces: list[bytes], method: str = "POST", app: Any = echo) -> list[Message]:
    """What is sent to a client who sends these pieces and then nothing more; the last one of b"" ends the body."""
    given = list(pieces)
    sent: list[Message] = []

    async def receive() -> Message:
        if not given:
            await asyncio.Event().wait()
        piece = given.pop(0)
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(180):
        await Patience(app, 0.05)({"type": "http", "method": method}, receive, send)
    return sent


async def test_a_whole_body_is_answered() -> None:
    start, body = await ask([b"ab", b"cd", b""])
    assert (start["status"], body["body"]) == (200, b"abcd")


@pytest.mark.parametrize("pieces", [[], [b"ab"]])
async def test_a_body_that_does_not_come_is_408_once_and_the_application_sees_its_client_gone(
    pieces: list[bytes],
) -> None:
    start, body = await ask(pieces)  # echo answers "gone", which goes nowhere
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b'"too_slow"' in body["body"]


async def test_an_answer_that_has_begun_is_left_as_it_is() -> None:
    async def early(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"

    assert [message.get("status") for message in await ask([], app=early)] == [200]


async def test_who_waits_for_its_client_to_go_after_the_body_may_wait() -> None:
    async def streams(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    assert [message["status"] for message in await ask([b""], app=streams)] == [200]
    assert [message["status"] for message in await ask([b""], "GET", streams)] == [200]
