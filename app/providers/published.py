"""Keeps this process' breakers in touch with the others' and with operators, over Redis.

Several times a second: a shared breaker looks at what is known to all (lua/breaker.lua), one of this process only looks
at what operators want; transitions that Redis has not recorded itself are added to the history. Once a second, in a
worker:
`fairdrop:providers` hash: supplier -> JSON report of the worker that wrote last (`Guard.report`, plus `worker`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

import msgspec
import structlog

from app import keys
from app.answers import Gone
from app.breaker import MODES
from app.errors import FairdropError
from app.providers.guard import Guard
from app.providers.registry import Providers
from app.providers.shared_breaker import SharedBreaker, fresh_ms, history_command, rules_text
from app.redis.link import Link
from app.scripts import Scripts
from app.settings import Settings

log = structlog.get_logger()

REPORT_EVERY_S = 1.0
BEAT_MAX_S = 0.25  # with FRESH_MAX_MS: an override is obeyed everywhere well within a second
BEAT_MIN_S = 0.02


def process_name(settings: Settings) -> str:
    """Who this is, in reports and in the history."""
    return settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"


async def run(
    link: Link, providers: Providers, settings: Settings, stopping: asyncio.Event, *, report: bool = True
) -> None:
    """Share the breakers and keep in touch until `stopping` is set. Without Redis the last overrides stay in force."""
    scripts, who, guards = Scripts(link), process_name(settings), providers.guards()
    if settings.breaker_shared:
        for guard in guards:
            if not isinstance(guard.breaker, SharedBreaker):
                guard.share(scripts, who=who, history_max=settings.breaker_history_max)
    # A third of the time for which a shared state is believed may pass before a beat asks again; the rest is one beat.
    beat_s = max(BEAT_MIN_S, min([BEAT_MAX_S, *(fresh_ms(guard.rules.breaker) * 0.0006 for guard in guards)]))
    report_at = 0.0
    while not stopping.is_set():
        try:
            await exchange(scripts, guards, who, settings.breaker_history_max)
            if report and time.monotonic() >= report_at:
                report_at = time.monotonic() + REPORT_EVERY_S
                await publish(link, guards, who)
        except FairdropError as error:
            log.warning("provider_states_not_exchanged", error=type(error).__name__)
        try:
            async with asyncio.timeout(beat_s):
                await stopping.wait()
        except TimeoutError:
            continue


async def exchange(scripts: Scripts, guards: list[Guard], who: str, history_max: int) -> None:
    """One beat of each breaker: learn what the others know and operators want, tell what only we know."""
    await asyncio.gather(*(_exchange(scripts, guard, who, history_max) for guard in guards))


async def _exchange(scripts: Scripts, guard: Guard, who: str, history_max: int) -> None:
    breaker = guard.breaker
    if isinstance(breaker, SharedBreaker):
        await breaker.beat()
        if breaker.alone:
            return
    else:
        stands = await scripts.breaker(
            name=guard.name, rules=rules_text(breaker.rules), rand=0.5, who=who, history_max=history_max,
            mode_first="",
        )  # fmt: skip
        for mode in MODES:
            if not isinstance(stands, Gone) and mode == stands.mode:
                breaker.set_mode(mode)
    unsent = guard.unsent
    unsent.extend(guard.untold(who))
    if unsent:
        replies = await scripts.link.pipeline(
            [history_command(guard.name, entry, history_max) for entry in unsent]
        )
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        unsent.clear()  # an answer that was lost: told twice rather than never


async def publish(link: Link, guards: list[Guard], who: str) -> None:
    """What this process sees of its suppliers, for operators."""
    fields: list[bytes | str] = []
    for guard in guards:
        fields += [guard.name, msgspec.json.encode({**guard.report(), "worker": who})]
    if fields:
        await link.call("HSET", keys.PROVIDERS, *fields)
