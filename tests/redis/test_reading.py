"""Long values are read in pieces, whole and in order, whatever their length."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.redis import reading
from app.redis.link import Link

pytestmark = pytest.mark.any_keys


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    link = Link(redis_url, deadline_s=10, name="test")
    await link.start()
    yield link
    await link.close()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ENTRIES_A_CALL", 3)
    monkeypatch.setattr(reading, "ENTRIES_FIRST", 2)
    monkeypatch.setattr(reading, "BYTES_A_CALL", 4)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 10])
async def test_every_entry_of_a_stream_is_read_once(link: Link, count: int) -> None:
    for number in range(1, count + 1):
        await link.call("XADD", "s", f"{number}-0", "c", f"v{number}")
    ids = [entry[0] for entry in await reading.entries(link, "s", pairs_max=100)]
    assert ids == [b"%d-0" % number for number in range(1, count + 1)]
    ids = [entry[0] for entry in await reading.entries(link, "s", after=b"2-0", upto=b"5-0", pairs_max=100)]
    assert ids == [b"%d-0" % number for number in range(3, min(count, 5) + 1)]
    assert len(await reading.entries(link, "s", pairs_max=4)) == min(count, 4)


async def test_long_entries_are_read_few_at_a_time(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece holds Redis up by what its entries hold, not by how many they are."""
    monkeypatch.setattr(reading, "ENTRIES_A_CALL", 50)
    monkeypatch.setattr(reading, "PAIRS_A_CALL", 100)
    for number in range(1, 41):
        pairs = [value for at in range(40 if number > 20 else 1) for value in (f"f{at}", "v")]
        await link.call("XADD", "s", f"{number}-0", *pairs)
    pieces = [len(page) async for page in reading.pieces(link, "s", pairs_max=10_000)]
    assert pieces == [2, 38]  # the third part of the pieces is a guess: entries were short so far
    pieces = [len(page) async for page in reading.pieces(link, "s", after=b"20-0", pairs_max=10_000)]
    assert pieces == [2] * 10
    assert len(await reading.entries(link, "s", after=b"20-0", pairs_max=100)) == 3


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11, 12])
async def test_the_first_bytes_of_a_string_are_read_whole(link: Link, length: int) -> None:
    text = b"abcdefghijk"
    await link.call("SET", "t", text)
    assert await reading.first_bytes(link, "t", length) == text[:length]
    assert await reading.first_bytes(link, "none", length) == b""
