"""Connections that do nothing of themselves, for tests of what clients may cost, and an address where nobody is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clients(
    port: int, count: int, *, small: bool = False, within_s: float = 20.0
) -> Iterator[list[socket.socket]]:
    """So many connected sockets. small: with little room for what is not read. within_s: the patience of each."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            one = socket.socket()
            if small:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            one.settimeout(within_s)
            one.connect(("127.0.0.1", port))
            opened.append(one)
        yield opened
    finally:
        for one in opened:
            one.close()


@contextmanager
def nobody() -> Iterator[int]:
    """A port that refuses connections: it is bound, so that no other test's server takes it, and not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
