"""Serves an ASGI application until SIGTERM: listens, starts it, drains, stops. For front, office and sandbox.

SIGTERM: /readyz says 503 `draining` (`app.drain()`, or `app.state.draining = True`) for `drain_s`, so that a load
balancer looks away first; new connections are served on meanwhile, and every answer says `Connection: close`. Then
whoever has connected is still taken, the port is closed, and requests under way get `close_within_s`. Ctrl-C, or a
second SIGTERM, skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from types import FrameType
from typing import Any, cast

import structlog
import uvicorn
import uvloop

from app.errors import CannotStart
from app.serving import rsgi_lane
from app.serving.overload import keep_looking
from app.serving.wire import Express, Lane, gate_of, http_protocol, limit_of_connections
from app.settings import Settings

log = structlog.get_logger("serve")

# New objects between two looks of the collector. By default (700, 10, 10) a busy front looks through everything
# once a second: 55-85 ms in which nobody is answered. A join makes some 25: after 10,000 the collector ran whenever
# a few hundred more had come, and found them all alive.
COLLECT_AFTER = (100_000, 20, 20)

Message = MutableMapping[str, Any]
Application = Callable[[Any, Any, Any], Awaitable[None]]


def listen(
    host: str, port: int, backlog: int, *, what: str, option: str = "", share: bool = False
) -> socket.socket:
    """A listening socket. share: further sockets on the same port may follow, and the kernel spreads connections.

    CannotStart: the port is taken or may not be used; the sentence names `what` and the `option` to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wire = socket.socket(family, socket.SOCK_STREAM)
    try:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        wire.bind((host, port))
        wire.listen(backlog)
    except OSError as error:
        wire.close()
        raise cannot_listen(host, port, error, what=what, option=option) from error
    except OverflowError as error:
        wire.close()
        raise CannotStart(f"{what}: {port} is no TCP port") from error
    return wire


def drop_who_does_not_read(wire: socket.socket, within_s: float) -> None:
    """Let the kernel end connections whose other side has taken nothing for so long; they inherit it from `wire`.

    A client that stops reading would hold its answer in our memory for as long as it likes.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT") and wire.family in (socket.AF_INET, socket.AF_INET6):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(within_s * 1000)))


def cannot_listen(host: str, port: int, error: OSError, *, what: str, option: str) -> CannotStart:
    instead = f"; choose another with {option}" if option else ""
    if error.errno == errno.EADDRINUSE:
        return CannotStart(f"{what}: port {port} on {host} is in use{instead}")
    return CannotStart(f"{what}: cannot listen on {host}:{port}: {error.strerror or error}{instead}")


def listen_together(
    host: str, port: int, backlog: int, count: int, *, what: str, option: str = ""
) -> list[socket.socket]:
    """One socket for each of `count` processes, all on one port.

    The port is first asked for alone: SO_REUSEPORT would quietly share it with any process of the same user.
    """
    if count == 1:
        return [listen(host, port, backlog, what=what, option=option)]
    alone = listen(host, port, 1, what=what, option=option)
    chosen = alone.getsockname()[1]
    alone.close()
    return [listen(host, chosen, backlog, what=what, option=option, share=True) for _ in range(count)]


def keep_what_has_started() -> None:
    """Spare the collector what lives as long as the process: modules, routes, models. Call once all has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def start_draining(app: Application) -> None:
    """Make /readyz say `draining`; nothing else changes."""
    drain = getattr(app, "drain", None)
    if callable(drain):
        drain()
    elif hasattr(app, "state"):
        app.state.draining = True


class Lifespan:
    """Runs the application's own start and stop, and keeps what went wrong (also the form that uvicorn expects)."""

    def __init__(self, config: uvicorn.Config) -> None:
        self.app = cast(Application, config.loaded_app)
        self.state: dict[str, Any] = {}
        self.should_exit = False
        self.failure: BaseException | None = None
        self._inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue(2)
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        self._task = asyncio.create_task(self._run(), name="lifespan")
        await self._inbox.put({"type": "lifespan.startup"})
        await self._started.wait()
        self.should_exit = self.failure is not None

    async def shutdown(self) -> None:
        if self.failure is None and self._task is not None:
            await self._inbox.put({"type": "lifespan.shutdown"})
            await self._ended.wait()
            await self._task

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self.app(scope, self._inbox.get, self._send)
            if not self._started.is_set():
                self.failure = CannotStart("the application ended before it started")
        except Exception as error:  # noqa: BLE001 - raised again by whoever runs the server
            self.failure = error
        finally:
            self._started.set()
            self._ended.set()

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._started.set()
            case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                # Replaced by the exception itself if the application raises it, as Starlette does.
                self.failure = CannotStart(
                    (message.get("message") or "it gave no reason").strip().splitlines()[-1]
                )
            case "lifespan.shutdown.complete":
                self._ended.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn with our signals: the first SIGTERM drains."""

    def __init__(self, config: uvicorn.Config, app: Application, lane: Lane, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._lane = lane
        self._drain_s = drain_s
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._lane.draining = True
        start_draining(self._app)
        if sig == signal.SIGTERM and self._stop_at is None and self._drain_s > 0 and self.started:
            self._stop_at = time.monotonic() + self._drain_s
            return
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take whoever waits in the kernel's queue, then close the port: closing it would reset them."""
        waiting = [wire for listener in sockets or [] for wire in _accepted(listener)]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for wire in waiting:
            with contextlib.suppress(OSError):  # it has gone already
                await loop.connect_accepted_socket(self._protocol, wire)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn's own start does
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        keep_what_has_started()

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            return True
        return await super().on_tick(counter)


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Connections that the kernel has made and nobody has taken yet."""
    listener.setblocking(False)
    while True:
        try:
            wire, _ = listener.accept()
        except OSError:  # there are no more
            return
        wire.setblocking(False)
        yield wire


async def serve_uvicorn(
    app: Application, settings: Settings, wires: list[socket.socket], drain_s: float
) -> None:
    for wire in wires:
        drop_who_does_not_read(wire, settings.read_within_s)
    protocol = http_protocol(settings, app if isinstance(app, Express) else None)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        backlog=settings.listen_backlog,
        timeout_keep_alive=max(1, round(settings.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(settings.close_within_s)),
    )
    config.load()
    config.lifespan_class = Lifespan
    server = _Uvicorn(config, app, protocol.lane, drain_s)
    try:
        await server.serve(sockets=wires)
    except SystemExit:
        if not isinstance(server.lifespan, Lifespan) or server.lifespan.failure is None:
            raise
    if isinstance(server.lifespan, Lifespan) and server.lifespan.failure is not None:
        raise server.lifespan.failure


class Granian:
    """granian's server in this loop, on a listening socket of ours, which it takes over.

    Its own embedded server makes a task of each request and the socket itself: here every request is the lane's.
    """

    def __init__(self, app: Application, settings: Settings, wire: socket.socket) -> None:
        from granian import _granian
        from granian.http import HTTP1Settings

        rust: Any = _granian  # its type information is that of an older version

        logging.getLogger("_granian").setLevel(logging.WARNING)  # it tells of each start and stop
        self._loop = asyncio.get_running_loop()
        gate = gate_of(settings)
        if gate is not None:
            keep_looking(gate, self._loop, time.perf_counter)
        express = app if isinstance(app, rsgi_lane.Express) else None
        self.lane = rsgi_lane.Lane(app, express, settings, gate, self._loop)
        drop_who_does_not_read(wire, settings.read_within_s)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._worker = rust.RSGIWorker(
            1,
            (None, rust.SocketHolder(wire.detach(), False, settings.listen_backlog)),
            None,
            backpressure=limit_of_connections(settings.connections_max),  # those beyond wait in the kernel
            http1_opts=HTTP1Settings(
                header_read_timeout=round(settings.head_within_s * 1000),
                max_buffer_size=max(8192, settings.head_max_bytes),
            ),
        )
        self._scheduler = rust.CallbackScheduler(self._loop, None, None, None, None)
        self._scheduler._schedule_fn = self.lane.take
        self._ended = asyncio.Event()
        self._signal = rust.WorkerSignal()
        self._signal.add_cb(lambda: self._loop.call_soon_threadsafe(self._ended.set))

    async def serve(self) -> None:
        """Serve until `stop`, and until whoever has begun to ask by then is answered."""
        self._worker.serve_async(self._scheduler, self._loop, self._signal)
        await self._ended.wait()

    def stop(self) -> None:
        self._signal.set()


async def serve_granian(app: Application, settings: Settings, wire: socket.socket, drain_s: float) -> None:
    """The same on granian, which answers HTTP in Rust threads."""
    config = uvicorn.Config(app, interface="asgi3", log_config=None, access_log=False)
    config.load()
    lifespan = Lifespan(config)
    await lifespan.startup()
    if lifespan.failure is not None:
        raise lifespan.failure
    keep_what_has_started()
    loop = asyncio.get_running_loop()
    server = Granian(app, settings, wire)

    def on_term() -> None:
        start_draining(app)
        if server.lane.draining:
            server.stop()
        else:
            server.lane.draining = True
            loop.call_later(drain_s, server.stop)

    def on_interrupt() -> None:
        start_draining(app)
        server.lane.draining = True
        server.stop()

    loop.add_signal_handler(signal.SIGTERM, on_term)
    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    await server.serve()
    await lifespan.shutdown()


def run(work: Awaitable[None]) -> None:
    """Run one coroutine on uvloop until it ends."""

    async def main() -> None:
        await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def serve(
    what: str,
    create_app: Callable[[Settings], Any],
    settings: Settings,
    *,
    host: str,
    port: int,
    fd: int | None = None,
    drain_s: float = 0.0,
    server: str = "uvicorn",
) -> None:
    """Serve `create_app(settings)` until a signal ends it.

    fd: a listening socket that the parent opened, instead of host and port. CannotStart: one sentence says why.
    """
    if server == "granian":
        # Several processes of ours may share the port: granian's supervisor opens none for them.
        wire = listen(host, port, settings.listen_backlog, what=what, option=f"--{what}-port", share=True)
        run(serve_granian(create_app(settings), settings, wire, drain_s))
        return
    if fd is not None:
        wire = socket.socket(fileno=fd)
    else:
        wire = listen(host, port, settings.listen_backlog, what=what, option="--port")
        address = wire.getsockname()
        sys.stderr.write(f"{what}: http://{address[0]}:{address[1]}\n")
    run(serve_uvicorn(create_app(settings), settings, [wire], drain_s))
