"""Real HTTP servers on loopback, in a thread each: async adapters and suppliers' blocking SDKs both call them.

Also what the stand-ins share: RSA keys made once, faults that strike the next call, and call-backs that are repeated
on the supplier's documented schedule (played `speed` times as fast) until the shop answers as the supplier wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STARTED_WITHIN_S = 60.0

Work = Callable[[Request, bytes], Response]


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One key a name for the whole test run: making one takes a tenth of a second."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: rsa.RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_pem(key: rsa.RSAPrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def bare(text: str) -> str:
    """PEM without its armour: how Alipay's console shows keys."""
    return "".join(line for line in text.splitlines() if not line.startswith("-----"))


class Faults:
    """What happens to the next calls: a status and body before or after the work, or no answer for a while."""

    def __init__(self) -> None:
        self._next: deque[tuple[str, Response | float]] = deque()

    def refuse(self, response: Response) -> None:
        """The next call is answered so, and nothing is done."""
        self._next.append(("before", response))

    def lose(self, response: Response) -> None:
        """The next call IS done, and answered so all the same."""
        self._next.append(("after", response))

    def stall(self, seconds: float) -> None:
        """The next call is done, and its answer comes so late."""
        self._next.append(("stall", seconds))

    def take(self) -> tuple[str, Response | float] | None:
        return self._next.popleft() if self._next else None


def routes(paths: Mapping[tuple[str, str], Work], faults: Faults, calls: list[str]) -> Starlette:
    """An application of blocking handlers; each call is noted as "METHOD path"."""

    def endpoint(work: Work) -> Callable[[Request], Awaitable[Response]]:
        async def run(request: Request) -> Response:
            body = await request.body()
            calls.append(f"{request.method} {request.url.path}")
            fault = faults.take()
            if fault is not None and fault[0] == "before":
                assert isinstance(fault[1], Response)
                return fault[1]
            answer = work(request, body)
            if fault is not None and fault[0] == "after":
                assert isinstance(fault[1], Response)
                return fault[1]
            if fault is not None:
                assert isinstance(fault[1], float)
                await asyncio.sleep(fault[1])  # not a wait: the fault itself
            return answer

        return run

    return Starlette(
        routes=[Route(path, endpoint(work), methods=[method]) for (method, path), work in paths.items()]
    )


@contextlib.contextmanager
def serve(app: Any) -> Iterator[str]:
    """The address of a server that runs until the end of the block."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", loop="asyncio", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="standin", daemon=True)
    thread.start()
    ends = time.monotonic() + STARTED_WITHIN_S
    while not server.started:
        if time.monotonic() > ends or not thread.is_alive():
            raise RuntimeError("the stand-in did not start")
        time.sleep(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(STARTED_WITHIN_S)


class Shop:
    """Where call-backs arrive: keeps each as (headers, body) and answers what the test says."""

    def __init__(self, answers: Sequence[tuple[int, bytes]] = ((200, b""),)) -> None:
        """answers: one for each call-back in turn; the last one for all that follow."""
        self.got: list[tuple[dict[str, str], bytes]] = []
        self._answers = list(answers)

    @contextlib.contextmanager
    def open(self) -> Iterator[str]:
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                shop.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status, answer = shop._answers.pop(0) if len(shop._answers) > 1 else shop._answers[0]
                self.send_response(status)
                if status != 204:
                    self.send_header("content-length", str(len(answer)))
                self.end_headers()
                if status != 204:
                    self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/hooks/x"
        finally:
            server.shutdown()
            server.server_close()
            thread.join(STARTED_WITHIN_S)


def deliver(
    url: str,
    make: Callable[[], tuple[dict[str, str], bytes]],
    schedule_s: Sequence[float],
    accepted: Callable[[httpx.Response], bool],
    speed: float,
) -> tuple[int, bool]:
    """Send a call-back until it is accepted or the schedule is over. Returns the tries, and whether it was accepted."""
    tries = 0
    for wait_s in (0.0, *schedule_s):
        time.sleep(wait_s / speed)
        headers, body = make()
        tries += 1
        answer = httpx.post(url, headers=headers, content=body, timeout=60, trust_env=False)
        if accepted(answer):
            return tries, True
    return tries, False
