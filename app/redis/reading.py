"""Long values of Redis, read in pieces: a reader of books must not keep buyers waiting.

Redis answers nobody else while it copies: 100,000 pairs of a stream hold it for some 100 ms, ten million bytes for
5. A piece takes a fraction of a millisecond. What moves meanwhile is the caller's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from app.redis.link import Link

ENTRIES_A_CALL = (
    100  # at most, and few at first: what an entry of the next piece holds is known only once it is read
)
ENTRIES_FIRST = 4
PAIRS_A_CALL = 1_000
BYTES_A_CALL = 65_536

Entry = Any  # [id, [field, value, …]], bytes throughout


async def pieces(
    link: Link, key: str, *, after: bytes = b"", upto: bytes = b"+", pairs_max: int
) -> AsyncIterator[list[Entry]]:
    """The entries of a stream with `after` < id ≤ `upto`, piece by piece, until they hold so many pairs or there are no
    more. An entry may hold one pair or a thousand, so the next piece has as many entries as the last one makes likely.
    DidNotHappen, Unknown: nothing more is known."""
    count = ENTRIES_FIRST
    while pairs_max > 0:
        page = await link.call("XRANGE", key, b"(" + after if after else b"-", upto, "COUNT", count)
        if page:
            yield page
        if len(page) < count:
            return
        after = page[-1][0]
        pairs_max -= pairs_in(page)
        count = likely(page, min(PAIRS_A_CALL, pairs_max), ENTRIES_A_CALL)


def pairs_in(entries: Sequence[Entry]) -> int:
    """How many pairs of field and value these entries hold."""
    return sum(len(fields) for _, fields in entries) // 2


def likely(entries: Sequence[Entry], pairs: int, entries_max: int) -> int:
    """As many entries as hold so many pairs, if those to come are as long as these; never none."""
    return max(1, min(entries_max, pairs * len(entries) // max(1, pairs_in(entries))))


async def entries(
    link: Link, key: str, *, after: bytes = b"", upto: bytes = b"+", pairs_max: int
) -> list[Entry]:
    """The entries of a stream with `after` < id ≤ `upto`, until they hold so many pairs. Errors: see pieces."""
    return [
        entry
        async for page in pieces(link, key, after=after, upto=upto, pairs_max=pairs_max)
        for entry in page
    ]


async def first_bytes(link: Link, key: str, length: int) -> bytes:
    """The first `length` bytes of a string, fewer if it is shorter."""
    parts: list[bytes] = []
    for start in range(0, length, BYTES_A_CALL):
        stop = min(start + BYTES_A_CALL, length)
        parts.append(await link.call("GETRANGE", key, start, stop - 1))
    return b"".join(parts)
