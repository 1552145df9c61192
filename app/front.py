"""The front door process: wiring and lifespan. It needs Redis only, and starts and stays up without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from app import problems
from app.buyer.challenge import Challenges
from app.buyer.identity import Identity
from app.door import pages, passes, probes, sales, tickets
from app.door.address import networks
from app.door.counts import Counts
from app.door.hot import HotRoutes
from app.errors import CannotStart
from app.purchase.accept import Door
from app.purchase.follow import EventStreams
from app.purchase.track import Tracker
from app.redis.cluster import open_link
from app.resources import release
from app.sale.public import PublicDocuments
from app.sale.snapshot import Snapshots
from app.scripts import Scripts
from app.sealing import sealing_keys
from app.settings import Settings
from app.telemetry import Metrics
from app.tokens import Keyring, signing_keys

FORGET_EVERY_TICKS = 100  # of the snapshot: about every 10 s

DESCRIPTION = """\
The buyers' side of a flash sale. Get a pass before the minute, join once, poll as told or stream, pay.

Every refusal is a problem document (RFC 9457) with a stable `code`. 429 and 503 carry `Retry-After`; a join may be
repeated unchanged after a lost reply, 429 or 503. Unknown states mean: keep polling. Further fields may appear.
"""


def create_app(settings: Settings) -> HotRoutes:
    """The front door as an ASGI application. CannotStart: a secret or address is missing or bad."""
    ring = Keyring(signing_keys(settings.signing_keys.get_secret_value()))
    seal_keys = sealing_keys(settings.pii_keys.get_secret_value())
    if not seal_keys:
        raise CannotStart("FAIRDROP_PII_KEYS is missing: contacts could not be sealed")
    if not settings.redis_url:
        raise CannotStart("FAIRDROP_REDIS_URL is missing")
    networks(settings.trusted_proxies)
    identity = Identity(settings, ring)
    challenges = Challenges(settings, ring)
    link = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="fairdrop-front")
    scripts = Scripts(link)
    snapshots = Snapshots(link, settings)
    tracker = Tracker(settings, link, ring, snapshots)
    streams = EventStreams(settings, tracker, snapshots)
    documents = PublicDocuments(snapshots, settings.poll_min_ms, settings.poll_max_ms)
    door = Door(settings, snapshots, ring, identity, tracker, streams, documents, link, scripts)
    counts = Counts(door)
    ticks = 0

    def forget() -> None:
        nonlocal ticks
        ticks += 1
        if ticks % FORGET_EVERY_TICKS == 0:
            door.claims.forget()
            documents.forget(view.id for view in snapshots)

    snapshots.on_tick += [counts, forget]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await link.start()
        await snapshots.start()
        try:
            yield
        finally:
            streams.drain()
            with contextlib.suppress(TimeoutError):  # what is left is answered 503 when the link closes
                async with asyncio.timeout(settings.redis_deadline_s):
                    await door.claims.drain()
                    await tracker.drain()
            await snapshots.close()
            counts.flush()
            await challenges.close()
            await link.close()

    typed = FastAPI(
        title="Fairdrop front",
        summary="Flash sales: a fair line, a true place in it, one tap.",
        description=DESCRIPTION,
        version=release(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    typed.state.door = door
    typed.state.challenges = challenges
    typed.state.seal_keys = seal_keys
    typed.state.metrics = Metrics(settings)
    typed.state.draining = False
    problems.install(typed)
    for router in (sales.router, passes.router, tickets.router, probes.router, pages.buyers_pages(settings)):
        typed.include_router(router)
    return HotRoutes(door, typed, settings, streams.drain)
