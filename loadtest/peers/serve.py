"""Serves one peer as the front is served: the same server program, one process, the port shared if there are several.

    python -m loadtest.peers.serve loadtest.peers.limits:r1 --port 9000 --server uvicorn

uvicorn is the plain one of its authors: uvloop, httptools, no access log. granian runs embedded, as in the front.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
import socket
from typing import Any

import uvicorn
import uvloop

BACKLOG = 4_096


def shared_wire(port: int) -> socket.socket:
    """A listening socket whose port further processes may share."""
    wire = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    wire.bind(("127.0.0.1", port))
    wire.listen(BACKLOG)
    return wire


async def with_uvicorn(app: Any, port: int) -> None:
    config = uvicorn.Config(
        app, loop="none", http="httptools", ws="none", interface="asgi3", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_graceful_shutdown=1,
    )  # fmt: skip
    await uvicorn.Server(config).serve(sockets=[shared_wire(port)])


async def with_granian(app: Any, port: int) -> None:
    from granian.constants import HTTPModes, Interfaces
    from granian.server.embed import Server

    server = Server(
        app, address="127.0.0.1", port=port, interface=Interfaces.ASGI, http=HTTPModes.http1, websockets=False,
        backlog=BACKLOG, log_enabled=False, log_access=False,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, server.stop)
    await server.serve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("app", help="module:name of an ASGI application")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server", choices=("uvicorn", "granian"), default="uvicorn")
    options = parser.parse_args()
    module, _, name = options.app.partition(":")
    app = getattr(importlib.import_module(module), name)
    serve = with_granian if options.server == "granian" else with_uvicorn
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, options.port))


if __name__ == "__main__":
    main()
