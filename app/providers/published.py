"""Shows breakers to operators, and makes breakers obey operators' overrides: once a second, over Redis.

`fairdrop:providers` hash: supplier -> JSON report of the worker that wrote last (`Guard.report`, plus `worker`).
`fairdrop:provider_modes` hash: supplier -> auto | forced_open | disabled | metrics_only; none there: auto.
"""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec
import structlog

from app import keys
from app.breaker import MODES
from app.errors import FairdropError
from app.providers.guard import Guard
from app.providers.registry import Providers
from app.scripts import Link
from app.settings import Settings

log = structlog.get_logger()

EVERY_S = 1.0


async def run(link: Link, providers: Providers, settings: Settings, stopping: asyncio.Event) -> None:
    """Exchange states and overrides until `stopping` is set. Without Redis the last overrides stay in force."""
    worker = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
    while not stopping.is_set():
        try:
            await exchange(link, providers.guards(), worker)
        except FairdropError as error:
            log.warning("provider_states_not_exchanged", error=type(error).__name__)
        try:
            async with asyncio.timeout(EVERY_S):
                await stopping.wait()
        except TimeoutError:
            continue


async def exchange(link: Link, guards: list[Guard], worker: str) -> None:
    """One round: take over the overrides, then publish what that makes of each breaker."""
    names = [guard.name for guard in guards]
    found = await link.call("HMGET", keys.PROVIDER_MODES, *names)
    assert isinstance(found, list)
    for guard, raw in zip(guards, found, strict=True):
        wanted = raw.decode() if isinstance(raw, bytes) else "auto"
        for mode in MODES:
            if mode == wanted:
                guard.breaker.set_mode(mode)
                break
        else:
            log.warning("provider_mode_unknown", provider=guard.name)
    fields: list[bytes | str] = []
    for guard in guards:
        fields += [guard.name, msgspec.json.encode({**guard.report(), "worker": worker})]
    await link.call("HSET", keys.PROVIDERS, *fields)
