"""One look for all loops: who is told, when it is made, and what happens when it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import due
from app.ledger.due import Due, Kind
from app.ledger.engine import create_engine
from app.work.lookout import ASK_YOURSELVES_S, Lookout
from tests.ledger.shop import looking_out, settings_of
from tests.providers.server import until


@pytest.fixture
async def engine(redis_url: str, database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(settings_of(redis_url, database_url))
    yield engine
    await engine.dispose()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Due]:
    """What every look finds."""
    rows: list[Due] = []

    async def look(*_: object) -> list[Due]:
        return rows

    monkeypatch.setattr(due, "look", look)
    return rows


def quiet(lookout: Lookout, *kinds: tuple[Kind, str]) -> list[asyncio.Event]:
    bells = [lookout.bell(*kind) for kind in kinds]
    for bell in bells:
        bell.clear()
    return bells


async def test_only_those_are_rung_for_who_have_work(engine: AsyncEngine, found: list[Due]) -> None:
    lookout = Lookout(engine, 0.01, clock=lambda: ASK_YOURSELVES_S / 2)
    bells = quiet(lookout, ("starts", "a"), ("starts", "b"), ("polls", "a"), ("late", ""))
    found += [Due("starts", "b", -1.0), Due("polls", "gone", 0.0), Due("late", "", 0.005)]
    await lookout.turn()
    assert [bell.is_set() for bell in bells] == [False, True, False, False]
    found[:] = [Due("starts", "", 0.0)]  # of whomever
    await lookout.turn()
    assert [bell.is_set() for bell in bells] == [True, True, False, False]


async def test_a_look_that_fails_has_everybody_ask_for_themselves(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookout = Lookout(engine, 0.01)
    bells = quiet(lookout, ("starts", "a"), ("late", ""))
    monkeypatch.setattr(due, "LOOK", "SELECT $1::float8, $2::float8, nonsense")
    with pytest.raises(Exception, match="nonsense"):
        await lookout.turn()
    assert all(bell.is_set() for bell in bells)


async def test_everybody_asks_for_themselves_now_and_then_whatever_is_seen(
    engine: AsyncEngine, found: list[Due]
) -> None:
    now = ASK_YOURSELVES_S
    lookout = Lookout(engine, 0.01, clock=lambda: now)
    (bell,) = quiet(lookout, ("late", ""))
    await lookout.turn()
    assert bell.is_set()
    bell.clear()
    now += ASK_YOURSELVES_S - 1
    await lookout.turn()
    assert not bell.is_set()
    now += 1
    await lookout.turn()
    assert bell.is_set()


@pytest.mark.parametrize("why", ["it is due", "something was written"])
async def test_the_next_look_is_made_before_its_time_when_there_is_reason(
    engine: AsyncEngine, found: list[Due], why: str
) -> None:
    """With an hour between looks the second one would never come."""
    lookout = Lookout(engine, 3_600.0)
    await asyncio.wait_for(first(lookout), 180)
    if why == "it is due":
        found += [Due("late", "", 0.1)]
        lookout.wrote()
        await asyncio.wait_for(lookout.turn(), 180)
    else:
        lookout.wrote()
    await asyncio.wait_for(lookout.turn(), 180)


async def first(lookout: Lookout) -> None:
    lookout.wrote()
    await lookout.turn()


async def test_what_is_said_to_be_there_is_rung_for_at_once(engine: AsyncEngine) -> None:
    lookout = Lookout(engine)
    outbox, late = quiet(lookout, ("outbox", ""), ("late", ""))
    lookout.wrote("outbox")
    assert (outbox.is_set(), late.is_set()) == (True, False)


async def test_looks_go_on_after_an_outage_of_postgres(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, broken = 0, True

    async def look(*_: object) -> list[Due]:
        nonlocal looks
        looks += 1
        if broken:
            raise ConnectionRefusedError("no Postgres")
        return [Due("late", "", 0.0)]

    monkeypatch.setattr(due, "look", look)
    async with looking_out(engine) as lookout:
        await until(lambda: looks >= 3)
        broken = False
        (bell,) = quiet(lookout, ("late", ""))
        await until(bell.is_set)
