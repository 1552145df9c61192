"""Every way to flip one bit of a call-back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def flips(data: bytes) -> Iterator[bytes]:
    """The data with each of its bits flipped in turn."""
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def header_flips(headers: Mapping[str, str], name: str) -> Iterator[dict[str, str]]:
    """The headers with each bit of one value flipped in turn, and once without it."""
    for value in flips(headers[name].encode("latin-1")):
        yield {**headers, name: value.decode("latin-1")}
    yield {other: value for other, value in headers.items() if other != name}
