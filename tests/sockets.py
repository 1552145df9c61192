"""Connections that do nothing of themselves, to see what clients may cost; ports where nobody is, and free ones."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clients(
    port: int, count: int, *, small: bool = False, within_s: float = 180.0
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


_given: set[int] = set()


def quiet_port() -> int:
    """A free TCP port for a process that takes seconds to bind it, and no port twice. Not one that the kernel chooses:
    those it gives to outgoing connections too, of which other tests make hundreds meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # Linux begins at 32,768, others at 49,152
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
