"""Long values of Redis, read in pieces: a reader of books must not keep buyers waiting.

Redis answers nobody else while it copies: 100,000 entries of a stream hold it for some 100 ms, ten million bytes for
5. A piece takes a fraction of a millisecond. What moves meanwhile is the caller's business.
"""

from __future__ import annotations

from typing import Any

from app.link import Link

ENTRIES_A_CALL = 500
BYTES_A_CALL = 65_536

Entry = Any  # [id, [field, value, …]], bytes throughout


async def entries(
    link: Link, key: str, *, after: bytes = b"", upto: bytes = b"+", count_max: int
) -> list[Entry]:
    """The entries of a stream with `after` < id ≤ `upto`, at most so many. DidNotHappen, Unknown: nothing is known."""
    found: list[Entry] = []
    while len(found) < count_max:
        begin = b"(" + after if after else b"-"
        count = min(ENTRIES_A_CALL, count_max - len(found))
        page = await link.call("XRANGE", key, begin, upto, "COUNT", count)
        found += page
        if len(page) < count:
            break
        after = page[-1][0]
    return found


async def first_bytes(link: Link, key: str, length: int) -> bytes:
    """The first `length` bytes of a string, fewer if it is shorter."""
    parts: list[bytes] = []
    for start in range(0, length, BYTES_A_CALL):
        stop = min(start + BYTES_A_CALL, length)
        parts.append(await link.call("GETRANGE", key, start, stop - 1))
    return b"".join(parts)
