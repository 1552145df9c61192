"""The breaker that all processes share over Redis: what one alone cannot show (the rest: tests/test_breaker.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import keys
from app.answers import Gone, Stands
from app.breaker import Counts, Event, Permit, Result, Rules, State, Stop
from app.embedded import Valkey
from app.providers import published, shared_breaker
from app.providers.answer import Answer, Done, MaybeDone, NotDone
from app.providers.guard import Guard, GuardRules
from app.providers.shared_breaker import SharedBreaker, SharedPermit, Told, fresh_ms, rules_text
from app.redis.link import Link
from app.scripts import Scripts
from tests.providers.server import until

S, F, I = Result.SUCCESS, Result.FAILURE, Result.IGNORED  # noqa: E741
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis whose disk is busy for a moment is waited for here; without it a breaker goes on alone."""
    monkeypatch.setattr(shared_breaker, "DEADLINE_S", 30.0)


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    link = Link(redis_url, deadline_s=30, name="test")
    await link.start()
    yield link
    await link.close()


def shared(
    link: Link, who: str = "w1", *, name: str = "shop", history_max: int = 100, **rules: Any
) -> SharedBreaker:
    return SharedBreaker(name, Rules(**rules), Scripts(link), who=who, history_max=history_max)


async def done(breaker: SharedBreaker, *permits: Permit | Stop, result: Result = F) -> None:
    for permit in permits:
        assert isinstance(permit, Permit)
        breaker.settle(permit, result, "create: http_500" if result is F else None)
    await breaker.idle()


async def trip(breaker: SharedBreaker) -> None:
    await breaker.beat()
    while breaker.state is State.CLOSED:
        await done(breaker, await breaker.take())


async def history(link: Link, name: str = "shop") -> list[Told]:
    entries = await link.call("XRANGE", keys.breaker_history_key(name), "-", "+")
    return [msgspec.json.decode(fields[1], type=Told) for _, fields in entries]


async def eventually(what: Callable[[], Any], within_s: float = 180.0) -> None:
    """Until `await what()` is true."""
    async with asyncio.timeout(within_s):
        while not await what():  # noqa: ASYNC110 - what happens is in Redis
            await asyncio.sleep(0.01)


async def interval_over(link: Link, breaker: SharedBreaker) -> None:
    """Until the open interval has ended by Redis' clock."""
    assert breaker._known is not None
    till = breaker._known.until_ms

    async def over() -> bool:
        seconds, micros = await link.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000 >= till

    await eventually(over)


# -- what a healthy call costs


async def calls_of_script(link: Link) -> int:
    found = (await link.call("INFO", "commandstats")).decode()
    for line in found.splitlines():
        if line.startswith("cmdstat_evalsha:"):
            return int(line.split("calls=")[1].split(",")[0])
    return 0


async def test_a_healthy_call_costs_one_round_trip_at_most_and_calls_at_once_share_them(link: Link) -> None:
    guard = Guard("shop", "payment", GuardRules(breaker=Rules(window_ms=600_000), wait_max_s=60.0))
    breaker = guard.share(Scripts(link), who="w1", history_max=100)

    async def send() -> Answer[int]:
        await asyncio.sleep(0)
        return Done(1)

    await breaker.beat()
    before, turns = await calls_of_script(link), breaker.turns
    for _ in range(200):
        assert await guard.call("create", send) == Done(1)
        await breaker.idle()  # as slow calls would find it; the caller does not wait for this
    assert await calls_of_script(link) - before == breaker.turns - turns <= 200
    assert breaker.counts() == Counts(200, 0, 0)

    before = await calls_of_script(link)
    await asyncio.gather(*(guard.call("create", send) for _ in range(1_000)))
    await breaker.idle()
    assert await calls_of_script(link) - before <= 1_000 / guard.rules.places_max * 2
    assert breaker.counts() == Counts(1_200, 0, 0)


async def test_a_call_does_not_wait_for_its_report(link: Link) -> None:
    guard = Guard("shop", "payment", GuardRules())
    breaker = guard.share(Scripts(link), who="w1", history_max=100)
    await breaker.beat()

    async def send() -> Answer[int]:
        return Done(1)

    await guard.call("create", send)
    assert breaker.counts().calls == 0  # not yet reported, and answered already
    await breaker.idle()
    assert breaker.counts().calls == 1


# -- many processes


async def test_one_trip_stops_all_and_one_recovery_frees_all(link: Link) -> None:
    one, two = (
        shared(link, calls_min=4, probes_max=2, open_ms=3_000, jitter=0),
        shared(link, "w2", calls_min=4, probes_max=2, open_ms=3_000, jitter=0),
    )
    for breaker in (one, two, one, two):  # two failures each, none would have tripped alone
        await done(breaker, await breaker.take())
    for breaker in (one, two):
        await breaker.look()
        assert breaker.state is State.OPEN
        assert isinstance(await breaker.take(), Stop)
    await interval_over(link, one)
    probes = [await one.take(), await two.take(), await one.take(), await two.take()]
    assert [isinstance(probe, Permit) for probe in probes] == [True, True, False, False]
    await done(two, probes[0], result=S)  # whoever it was given to
    await done(one, probes[1], result=S)
    await two.look()
    assert (one.state, two.state) == (State.CLOSED, State.CLOSED)
    assert [(told.after.value, told.by) for told in await history(link)] == [
        ("open", "w2"), ("half_open", "w1"), ("closed", "w1"),
    ]  # fmt: skip


async def test_who_still_believes_closed_stops_believing_before_half_open_can_begin(link: Link) -> None:
    rules = {"calls_min": 1, "open_ms": 200, "jitter": 0.2, "probes_max": 1}
    passed_unaware = attempts = 0
    while not passed_unaware:  # or it shows nothing: a busy machine takes longer to trip than anyone believes
        attempts += 1
        assert attempts < 50
        sick, unaware = (shared(link, who, name=f"shop{attempts}", **rules) for who in ("w1", "w2"))
        await unaware.beat()
        await trip(sick)
        half_open = False
        while not half_open:
            # `unaware` never beats and never hears: the worst case. It asks Redis only when it stops believing.
            answer = unaware.take_now()
            passed_unaware += isinstance(answer, Permit)
            (state,) = await link.call("HMGET", keys.breaker_key(f"shop{attempts}"), "state")
            assert state == b"open"
            if sick.retry_in_ms() == 0:
                probe = await sick.take()
                half_open = isinstance(probe, SharedPermit)
        assert unaware.take_now() is None
        assert isinstance(await unaware.ask(), Stop)
    assert fresh_ms(Rules(**rules)) <= 200 * 0.8 / 2


CALLERS = """
import asyncio, sys, time
from app.breaker import Permit, Result, Rules
from app.providers import shared_breaker
from app.providers.shared_breaker import SharedBreaker
from app.redis.link import Link
from app.scripts import Scripts

shared_breaker.DEADLINE_S = 30.0  # as in the test's own process


async def main(url, who, name, callers, lease_ms):
    link = Link(url, name=who)
    await link.start()
    breaker = SharedBreaker(name, Rules(calls_min=1, open_ms=100, jitter=0, probes_max=7, half_open_max_ms=0,
        lease_ms=lease_ms), Scripts(link), who=who)
    await breaker.beat()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    answers = await asyncio.gather(*(breaker.take() for _ in range(callers)))
    print(sum(isinstance(answer, Permit) for answer in answers), len(answers), breaker.alone, breaker.turns, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)  # until it is killed

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
"""


class Callers:
    """A process of its own with many callers of the same breaker."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, url: str, who: str, name: str, callers: int, lease_ms: int) -> Callers:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(CALLERS), url, who, name, str(callers), str(lease_ms),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(180):
            assert await process.stdout.readline() == b"ready\n"
        return cls(process)

    async def go(self) -> tuple[int, int, bool, int]:
        """Everybody asks at once: permits, answers, whether Redis was gone, round trips."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"\n")
        async with asyncio.timeout(180):
            words = (await self.process.stdout.readline()).split()
        return int(words[0]), int(words[1]), words[2] == b"True", int(words[3])

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@pytest.mark.serial
async def test_ten_thousand_callers_in_four_processes_get_seven_probes_and_the_dead_are_forgotten(
    link: Link, redis_url: str
) -> None:
    """Longer leases only where the machine was too slow to tell: they are waited for."""
    for lease_ms in (5_000, 20_000, 60_000):
        if await told(link, redis_url, lease_ms):
            return
    pytest.fail("too slow a machine to tell")


async def told(link: Link, redis_url: str, lease_ms: int) -> bool:
    """False: the leases ended before all was seen."""
    name = f"shop-{lease_ms}"
    rules: dict[str, Any] = {
        "calls_min": 1,
        "open_ms": 100,
        "jitter": 0,
        "probes_max": 7,
        "half_open_max_ms": 0,
    }
    breaker = shared(link, name=name, **rules, lease_ms=lease_ms)
    processes = await asyncio.gather(
        *(Callers.start(redis_url, f"p{number}", name, 2_500, lease_ms) for number in range(4))
    )
    try:
        await trip(breaker)
        await interval_over(link, breaker)
        asked_at = time.monotonic()
        found = await asyncio.gather(*(process.go() for process in processes))
        assert sum(answers for _, answers, _, _ in found) == 10_000
        assert not any(alone for _, _, alone, _ in found)
        if time.monotonic() - asked_at >= lease_ms / 1000:
            return False
        assert sum(permits for permits, _, _, _ in found) == 7
        assert sum(turns for _, _, _, turns in found) < 100
        # They are killed with their probes in hand. Nobody gets one before the leases are over; then all are free.
        for process in processes:
            await process.kill()
        refused = await breaker.take()
        if time.monotonic() - asked_at >= lease_ms / 1000:
            return False
        assert isinstance(refused, Stop)

        async def freed() -> bool:
            permit = await breaker.take()
            if isinstance(permit, Permit):
                await done(breaker, permit, result=S)
                return True
            return False

        await eventually(freed)
        assert time.monotonic() - asked_at >= lease_ms / 1000
        await done(breaker, *[await breaker.take() for _ in range(6)], result=S)
        assert breaker.state is State.CLOSED
        return True
    finally:
        for process in processes:
            await process.kill()


async def test_cancelled_askers_give_their_permits_back(link: Link) -> None:
    breaker = shared(link, calls_min=1, open_ms=10, probes_max=3, half_open_max_ms=0, lease_ms=60_000)
    await trip(breaker)
    await interval_over(link, breaker)
    for turns in range(12):  # cancelled before the turn, under way, when it has come
        askers = [asyncio.create_task(breaker.ask()) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for asker in askers:
            asker.cancel()
        for answer in await asyncio.gather(*askers, return_exceptions=True):
            if isinstance(answer, Permit):
                breaker.settle(answer, I)
        await breaker.idle()
    permits = [await breaker.ask() for _ in range(4)]
    assert [isinstance(permit, Permit) for permit in permits] == [True, True, True, False]


# -- without Redis


async def test_without_redis_each_process_goes_on_alone_and_comes_back(
    valkey: Valkey, redis_url: str
) -> None:
    link = Link(redis_url, deadline_s=30, name="test")
    await link.start()
    events: list[Event] = []
    guard = Guard(
        "shop",
        "payment",
        GuardRules(breaker=Rules(calls_min=3, open_ms=60_000, open_max_ms=60_000, probes_max=1)),
    )
    breaker = guard.share(Scripts(link), who="w1", history_max=100)
    breaker._on_event = events.append

    async def fails() -> Answer[int]:
        return MaybeDone("http_500")

    async def works() -> Answer[int]:
        return Done(1)

    try:
        assert await guard.call("create", works) == Done(1)
        await breaker.idle()
        valkey.kill()
        await until(lambda: not link.connected)
        # A call under way when Redis went is learned here, so is everything after it; no call fails for lack of Redis.
        for _ in range(3):
            assert await guard.call("create", fails) == MaybeDone("http_500")
            await breaker.idle()
        assert breaker.alone
        assert breaker.state is State.OPEN
        refused = await guard.call("create", works)
        assert isinstance(refused, NotDone)
        assert (refused.code, refused.retry_in_ms > 40_000) == ("breaker_open", True)
        assert guard.report()["alone"] is True
        assert breaker.lost_count == 0

        valkey.start()
        await until(lambda: link.connected)
        await published.exchange(Scripts(link), [guard], "w1", 100)
        assert not breaker.alone
        assert breaker.state is State.CLOSED  # what the others know counts again
        assert await guard.call("create", works) == Done(1)
        (told,) = await history(link)
        assert (told.after, told.why, told.by, told.last_error) == (
            State.OPEN, "failure_rate", "w1 (alone)", "create: http_500",
        )  # fmt: skip
        assert [event.after for event in events] == [State.OPEN]
    finally:
        await breaker.idle()
        await link.close()


async def test_an_open_interval_runs_on_without_redis(link: Link) -> None:
    breaker = shared(link, calls_min=1, open_ms=3_000, jitter=0, probes_max=1)
    await trip(breaker)
    await link.close()
    await breaker.look()
    assert breaker.alone
    assert breaker.state is State.OPEN
    assert 0 < breaker.retry_in_ms() <= 3_000
    await until(lambda: breaker.retry_in_ms() == 0)
    probe = await breaker.take()
    assert isinstance(probe, Permit)
    assert isinstance(await breaker.take(), Stop)  # its own half-open has its own limit
    breaker.settle(probe, F)
    assert 3_000 < breaker.retry_in_ms() <= 6_000  # and the interval grows as it would have


async def test_a_redis_that_lost_everything_gets_the_override_back_and_believes_no_old_result(
    link: Link,
) -> None:
    breaker = shared(link, calls_min=1)
    old = await breaker.take()
    breaker.set_mode("metrics_only")
    await breaker.idle()
    await link.call("FLUSHALL")
    await breaker.look()
    assert breaker.state is State.METRICS_ONLY
    await done(breaker, old)
    assert breaker.counts() == Counts()
    assert breaker.late_count == 1
    await done(breaker, await breaker.take())
    assert breaker.counts() == Counts(1, 1, 0)


# -- the script


async def turn(link: Link, now_ms: int, rules: Rules, **more: Any) -> Stands:
    stands = await Scripts(link).breaker(
        name="shop", rules=rules_text(rules), rand=0.5, who="w1", history_max=more.pop("history_max", 10),
        now_ms=now_ms, **more,
    )  # fmt: skip
    assert isinstance(stands, Stands)
    return stands


async def test_only_looking_makes_nothing(link: Link) -> None:
    found = await Scripts(link).breaker(
        name="shop", rules=rules_text(Rules()), rand=0.5, who="office", history_max=10, mode_first=""
    )
    assert found == Gone()
    assert await link.call("DBSIZE") == 0


async def test_a_refusal_changes_nothing(link: Link) -> None:
    rules = Rules(calls_min=1, probes_max=1, open_ms=100, jitter=0, half_open_max_ms=0)
    first = await turn(link, 1_000_000, rules)
    await turn(link, 1_000_000, rules, results=[(first.generation, 0, 1, "f", "boom")])
    for now_ms in (1_000_099, 1_000_100, 1_000_101):
        if now_ms == 1_000_100:
            assert (await turn(link, now_ms, rules, wanted=1)).granted == 1
        before = await link.call("DUMP", keys.breaker_key("shop"))
        assert (await turn(link, now_ms, rules, wanted=1)).granted == 0
        late = await turn(link, now_ms, rules, results=[(first.generation, 0, 1, "f", "late")])
        assert (late.settled, late.last_error) == ("l", "boom")
        assert await link.call("DUMP", keys.breaker_key("shop")) == before


async def test_the_history_keeps_the_newest(link: Link) -> None:
    rules = Rules()
    for number, mode in enumerate(["forced_open", "auto"] * 5):
        await turn(link, 1_000_000 + number, rules, switch_to=mode, history_max=3)
    found = await history(link)
    assert [told.at_ms for told in found] == [1_000_007, 1_000_008, 1_000_009]


@pytest.mark.parametrize("back_ms", [0, 1, 3_600_000])
async def test_a_clock_that_was_set_back_neither_reopens_nor_wedges(link: Link, back_ms: int) -> None:
    rules = Rules(calls_min=1, open_ms=1_000, jitter=0)
    first = await turn(link, 10_000_000, rules)
    await turn(link, 10_000_000, rules, results=[(first.generation, 0, 1, "f", "boom")])
    wall = 10_000_000 - back_ms
    assert (await turn(link, wall, rules, wanted=1)).state == "open"
    assert (await turn(link, wall + 999, rules, wanted=1)).state == "open"
    assert (await turn(link, wall + 1_000, rules, wanted=1)).state == "half_open"


async def test_the_redis_clock_is_used_when_none_is_given(link: Link) -> None:
    stands = await turn(link, 0, Rules())
    assert abs(stands.now_ms - time.time() * 1000) < 60_000


async def test_a_window_of_another_kind_counts_from_nothing(link: Link) -> None:
    """Settings changed between two releases: the worker of yesterday wrote buckets, today's counts calls."""
    by_time, by_count = Rules(calls_min=2), Rules(window="count", calls_min=2)
    first = await turn(link, 1_000_000, by_time)
    failed = [(first.generation, 0, 1, "f", "boom")]
    await turn(link, 1_000_000, by_time, results=failed)
    stands = await turn(link, 1_000_000, by_count, results=failed)
    assert (stands.state, stands.calls) == ("closed", 1)
    stands = await turn(link, 1_000_000, by_time, results=failed)
    assert (stands.state, stands.calls) == ("closed", 1)
