"""The batcher: coalesces without timers, within its limits, and gives every waiter its own answer."""

from __future__ import annotations

import asyncio

import pytest

from app.batcher import Batcher, Full
from app.errors import DidNotHappen, Unknown


class Sender:
    """Records batches; each call waits for `open` and then doubles its items."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.open.wait()
        self.at_once -= 1
        return [2 * item for item in items]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_idle_batcher_sends_at_once() -> None:
    sender = Sender()
    batcher = Batcher(sender)
    future = batcher.submit(1)
    await turns()
    assert sender.batches == [[1]]
    sender.open.set()
    assert await future == 2


async def test_what_arrives_while_calls_are_under_way_goes_into_the_next() -> None:
    sender = Sender()
    batcher = Batcher(sender, batch_max=4, in_flight_max=2)
    futures = []
    for item in range(2):
        futures.append(batcher.submit(item))
        await turns()
    futures += [batcher.submit(item) for item in range(2, 12)]
    await turns()
    assert sender.batches == [[0], [1]]
    assert len(batcher) == 10
    sender.open.set()
    assert await asyncio.gather(*futures) == [2 * item for item in range(12)]
    assert sender.batches == [[0], [1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert sender.most_at_once == 2
    assert (batcher.batches, batcher.items) == (5, 12)


async def test_everything_of_one_turn_of_the_loop_goes_together() -> None:
    sender = Sender()
    sender.open.set()
    batcher = Batcher(sender)
    assert await asyncio.gather(*[batcher.submit(item) for item in range(100)]) == [
        2 * item for item in range(100)
    ]
    assert len(sender.batches) == 1


async def test_a_full_queue_refuses_and_forgets_nothing() -> None:
    sender = Sender()
    batcher = Batcher(sender, batch_max=1, in_flight_max=1, queue_max=3)
    first = batcher.submit(0)
    await turns()
    queued = [batcher.submit(item) for item in (1, 2, 3)]
    with pytest.raises(Full):
        batcher.submit(4)
    assert issubclass(Full, DidNotHappen)
    sender.open.set()
    assert await asyncio.gather(first, *queued) == [0, 2, 4, 6]
    assert await batcher.submit(5) == 10


async def test_who_stopped_waiting_is_not_sent() -> None:
    sender = Sender()
    batcher = Batcher(sender, in_flight_max=1)
    first = batcher.submit(0)
    await turns()
    gone, stays = batcher.submit(1), batcher.submit(2)
    gone.cancel()
    sender.open.set()
    assert [await first, await stays] == [0, 4]
    assert sender.batches == [[0], [2]]


async def test_who_stops_waiting_while_the_call_is_under_way_harms_nobody() -> None:
    sender = Sender()
    batcher = Batcher(sender)
    gone, stays = batcher.submit(1), batcher.submit(2)
    await turns()
    gone.cancel()
    sender.open.set()
    assert await stays == 4


@pytest.mark.parametrize("error", [DidNotHappen("away"), Unknown("lost"), RuntimeError("bug")])
async def test_an_error_goes_to_everyone_of_its_batch_and_to_nobody_else(error: Exception) -> None:
    async def send(items: list[int]) -> list[int]:
        if 13 in items:
            raise error
        return items

    batcher = Batcher(send, batch_max=2)
    results = await asyncio.gather(
        *[batcher.submit(item) for item in (1, 2, 13, 4, 5)], return_exceptions=True
    )
    assert results == [1, 2, error, error, 5]


async def test_too_few_results_are_unknown_to_everyone() -> None:
    async def send(items: list[int]) -> list[int]:
        return items[1:]

    with pytest.raises(Unknown):
        await Batcher(send).submit(1)


async def test_draining_waits_for_everything_that_was_submitted() -> None:
    sender = Sender()
    batcher = Batcher(sender, batch_max=2, in_flight_max=1)
    futures = [batcher.submit(item) for item in range(7)]
    asyncio.get_running_loop().call_later(0.01, sender.open.set)
    await batcher.drain()
    assert all(future.done() for future in futures)
    await batcher.drain()


async def test_a_call_that_is_cancelled_leaves_its_waiters_with_unknown() -> None:
    async def send(items: list[int]) -> list[int]:
        raise asyncio.CancelledError

    batcher = Batcher(send)
    with pytest.raises(Unknown):
        await batcher.submit(1)
    await turns()
    assert batcher.in_flight == 0


async def test_ten_thousand_at_once_all_get_their_own_answer() -> None:
    async def send(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [-item for item in items]

    batcher = Batcher(send, batch_max=256)
    assert await asyncio.gather(*[batcher.submit(item) for item in range(10_000)]) == [
        -n for n in range(10_000)
    ]
    assert batcher.batches == 40


async def test_who_gives_a_callback_is_told_the_result_or_the_error_as_a_value() -> None:
    async def send(items: list[int]) -> list[int]:
        if 13 in items:
            raise DidNotHappen("away")
        return [2 * item for item in items]

    told: list[object] = []
    batcher = Batcher(send, batch_max=2)
    for item in (1, 2, 13):
        batcher.put(item, told.append)
    await batcher.drain()
    assert told[:2] == [2, 4]
    assert isinstance(told[2], DidNotHappen)


async def test_a_callback_that_fails_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def send(items: list[int]) -> list[int]:
        return items

    def broken(_given: object) -> None:
        raise RuntimeError("bug")

    told: list[object] = []
    batcher = Batcher(send)
    batcher.put(1, broken)
    batcher.put(2, told.append)
    await batcher.drain()
    assert told == [2]
    assert "could not tell" in caplog.text


async def test_a_call_is_made_beside_another_only_for_enough_items() -> None:
    sender = Sender()
    batcher = Batcher(sender, batch_max=4, in_flight_max=3, beside_min=3)
    futures = [batcher.submit(0)]
    await turns()
    futures += [batcher.submit(item) for item in (1, 2)]
    await turns()
    assert sender.batches == [[0]]
    futures.append(batcher.submit(3))
    await turns()
    assert sender.batches == [[0], [1, 2, 3]]
    futures += [batcher.submit(item) for item in (4, 5)]
    sender.open.set()  # who are too few for a call beside another go when none is under way
    assert await asyncio.gather(*futures) == [0, 2, 4, 6, 8, 10]
    assert sender.batches == [[0], [1, 2, 3], [4, 5]]


async def test_a_full_batch_is_always_enough_for_a_call_beside_another() -> None:
    sender = Sender()
    batcher = Batcher(sender, batch_max=1, in_flight_max=3, beside_min=64)
    futures = [batcher.submit(item) for item in range(3)]
    await turns()
    assert sender.batches == [[0], [1], [2]]
    sender.open.set()
    assert await asyncio.gather(*futures) == [0, 2, 4]
