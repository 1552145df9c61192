"""Operators see every breaker within a second, and what they order is obeyed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from app import keys
from app.breaker import State
from app.providers import published
from app.providers.registry import Providers, open_providers
from app.scripts import Link
from app.settings import Settings
from tests.providers.server import until


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    link = Link(redis_url, name="test")
    await link.start()
    yield link
    await link.close()


@pytest.fixture
async def providers() -> AsyncIterator[Providers]:
    providers = open_providers(Settings(env="development"))
    yield providers
    await providers.aclose()


async def test_states_are_published_and_modes_are_obeyed(link: Link, providers: Providers) -> None:
    payment, texts = providers.guards()
    await link.call("HSET", keys.PROVIDER_MODES, "sandbox", "forced_open", "sandbox-sms", "no-such-mode")
    await published.exchange(link, providers.guards(), "w1")
    assert payment.breaker.state is State.FORCED_OPEN
    assert texts.breaker.state is State.CLOSED
    shown = msgspec.json.decode(await link.call("HGET", keys.PROVIDERS, "sandbox"))
    assert (shown["state"], shown["mode"], shown["worker"], shown["kind"]) == (
        "forced_open", "forced_open", "w1", "payment",
    )  # fmt: skip
    assert shown["history"][-1]["why"] == "operator"
    await link.call("HDEL", keys.PROVIDER_MODES, "sandbox")
    await published.exchange(link, providers.guards(), "w1")
    assert payment.breaker.state is State.CLOSED


async def test_without_redis_the_last_order_stays_in_force(link: Link, providers: Providers) -> None:
    await link.call("HSET", keys.PROVIDER_MODES, "sandbox", "disabled")
    stopping = asyncio.Event()
    task = asyncio.create_task(published.run(link, providers, Settings(env="development"), stopping))
    payment = providers.guards()[0]
    await until(lambda: payment.breaker.state is State.DISABLED)
    await link.close()
    await until(lambda: not link.connected)
    assert payment.breaker.state is State.DISABLED
    assert not task.done()
    stopping.set()
    await task
