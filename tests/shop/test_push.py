"""The shop is told: every event that an endpoint asked for, signed, at least once, whatever its server does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs

from app import sealing
from app.breaker import State
from app.ledger import deliveries, events, operators
from app.ledger.engine import create_engine
from app.sealing import webhook_aad
from app.settings import Settings
from app.shop import push
from app.shop.push import Pusher
from clients.python.fairdrop_webhooks import NotOurs, verify
from tests.ledger.shop import looking_out, until

KEY = "11" * 32


@dataclass
class Ear:
    """A server of the shop that hears what is pushed and answers as `answer` says."""

    url: str = ""
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answer: Callable[[int], bytes] = lambda n: b"HTTP/1.1 204 No Content\r\n\r\n"
    hold: asyncio.Event | None = None  # answers wait for it

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers["content-length"]))
                self.heard.append(({**headers, ":path": head[0].split(" ")[1]}, body))
                if self.hold is not None:
                    await self.hold.wait()
                writer.write(self.answer(len(self.heard)))
                await writer.drain()
        writer.close()

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.heard]


def status(code: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {code} Whatever", "Content-Length: 0", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture
async def ear() -> AsyncIterator[Ear]:
    ear = Ear()
    server = await asyncio.start_server(ear.serve, "127.0.0.1", 0)
    ear.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?shop=1"
    yield ear
    server.close()


@pytest.fixture
def settings(database_url: str) -> Settings:
    return Settings(
        database_url=database_url, pii_keys=KEY, webhooks_allow_private=True, webhook_retry_first_s=0.05,
        webhook_deadline_s=60,
    )  # fmt: skip


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(settings, name="test")
    yield engine
    await engine.dispose()


async def endpoint(
    engine: AsyncEngine, url: str, *types: str, name: str = "wh_1", secret: bytes = b"s" * 32
) -> str:
    sealed = sealing.seal(sealing.sealing_keys(KEY), secret, webhook_aad(name))
    async with engine.begin() as conn:
        await operators.insert_endpoint(conn, name, url, types or ("order.paid", "sale.closed"), sealed)
    return name


async def happen(engine: AsyncEngine, *subjects: str, kind: str = "order.paid") -> None:
    """Numbered events, one for each subject."""
    async with engine.begin() as conn:
        for subject in subjects:
            await events.put(conn, kind, "drop", 1, {"order_no": subject, "buyer": "ann ☂"}, subject)
        await events.number(conn, 1000)


async def rows(engine: AsyncEngine) -> list[dict[str, Any]]:
    async with engine.connect() as conn:
        found = await conn.execute(
            text("SELECT *, next_at - now() AS wait FROM webhook_delivery ORDER BY endpoint, event")
        )
        return [dict(row) for row in found.mappings()]


async def states(engine: AsyncEngine) -> list[str]:
    return [row["state"] for row in await rows(engine)]


@contextlib.asynccontextmanager
async def pushing(engine: AsyncEngine, settings: Settings) -> AsyncIterator[None]:
    stopping = asyncio.Event()
    async with looking_out(engine) as lookout:
        running = asyncio.create_task(push.run(engine, settings, stopping, lookout))
        try:
            yield
        finally:
            stopping.set()
            await running


async def push_once(pusher: Pusher, count: int = 100) -> int:
    """Try everything that is due now, once."""
    leased = await pusher.lease(count)
    await asyncio.gather(*(pusher.push(row) for row in leased))
    return len(leased)


@pytest.fixture
async def pusher(engine: AsyncEngine, settings: Settings) -> AsyncIterator[Pusher]:
    pusher = Pusher(engine, settings)
    yield pusher
    await pusher.aclose()


async def test_an_endpoint_is_told_what_it_asked_for_as_the_feed_shows_it(
    engine: AsyncEngine, settings: Settings, ear: Ear
) -> None:
    await happen(engine, "before")
    await endpoint(engine, ear.url)
    async with pushing(engine, settings):
        await happen(engine, "a", "b")
        await happen(engine, "a", kind="order.expired")  # not asked for
        await happen(engine, "drop", kind="sale.closed")

        async def all_delivered() -> bool:
            return await states(engine) == ["delivered"] * 3

        await until(all_delivered, "three delivered")
    assert sorted(ear.ids()) == ["evt-a-1-paid", "evt-b-1-paid", "evt-drop-1-closed"]
    headers, body = ear.heard[0]
    told = msgspec.json.decode(body)
    assert set(told) == {"id", "type", "at", "version", "data"} and told["data"]["buyer"] == "ann ☂"
    assert headers[":path"] == "/hook?shop=1" and headers["host"] in ear.url
    assert headers["content-type"] == "application/json"
    assert verify(["whsec_" + b64encode(b"s" * 32).decode()], headers, body) == told
    with pytest.raises(NotOurs):
        verify(["whsec_" + b64encode(b"x" * 32).decode()], headers, body)


async def test_during_a_rotation_either_secret_verifies_and_afterwards_the_new_one_only(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    name = await endpoint(engine, ear.url, secret=b"o" * 32)
    new = sealing.seal(pusher.keys, b"n" * 32, webhook_aad(name))
    secrets = {one: "whsec_" + b64encode(one * 32).decode() for one in (b"o", b"n")}
    async with engine.begin() as conn:
        await operators.rotate_secret(conn, name, new, 60)
    await happen(engine, "a")
    await pusher.spread()
    assert await push_once(pusher) == 1
    assert all(verify([secret], *ear.heard[0])["id"] == "evt-a-1-paid" for secret in secrets.values())
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_endpoint SET secret_before_until = now() - interval '1 s'"))
    await happen(engine, "b")
    await pusher.spread()
    assert await push_once(pusher) == 1
    assert verify([secrets[b"n"]], *ear.heard[1])["id"] == "evt-b-1-paid"
    with pytest.raises(NotOurs):
        verify([secrets[b"o"]], *ear.heard[1])


async def test_what_is_not_taken_comes_again_with_the_same_id_and_waits_that_grow(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    ear.answer = lambda n: status(500) if n < 4 else status(200)
    await endpoint(engine, ear.url)
    await happen(engine, "a")
    await pusher.spread()
    waits = []
    for _ in range(3):
        assert await push_once(pusher) == 1
        (row,) = await rows(engine)
        assert (row["state"], row["code"], row["status"]) == ("due", "status_500", 500)
        waits.append(row["wait"].total_seconds())
        async with engine.begin() as conn:
            await conn.execute(text("UPDATE webhook_delivery SET next_at = now()"))
    for tries, wait in enumerate(waits):  # 0.05 s, doubled, ± 20 %; some of it has passed when it is read
        assert wait <= 0.05 * 2**tries * 1.2
    assert await push_once(pusher) == 1
    assert await states(engine) == ["delivered"]
    assert ear.ids() == ["evt-a-1-paid"] * 4


def test_waits_double_up_to_their_maximum(settings: Settings) -> None:
    pusher = Pusher.__new__(Pusher)
    pusher.settings = settings.model_copy(update={"webhook_retry_first_s": 5.0, "webhook_retry_max_s": 100.0})
    for tries, middle in ((1, 5), (2, 10), (4, 40), (6, 100), (10_000, 100)):
        assert middle * 0.8 <= pusher._wait_s(tries) <= middle * 1.2


async def test_retry_after_is_kept_to_and_a_redirect_is_not_followed(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    ear.answer = lambda n: status(503, "Retry-After: 900") if n == 1 else status(302, f"Location: {ear.url}")
    await endpoint(engine, ear.url)
    await happen(engine, "a")
    await pusher.spread()
    await push_once(pusher)
    (row,) = await rows(engine)
    assert 890 < row["wait"].total_seconds() <= 900
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_delivery SET next_at = now()"))
    await push_once(pusher)
    assert len(ear.heard) == 2 and (await rows(engine))[0]["code"] == "status_302"


async def test_after_72_hours_it_is_given_up_and_a_replay_brings_it_back(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    name = await endpoint(engine, ear.url)
    await happen(engine, "a")
    await pusher.spread()
    (row,) = await rows(engine)
    assert (row["expires_at"] - row["created_at"]).total_seconds() == 72 * 3600
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_delivery SET expires_at = now()"))
    assert await push_once(pusher) == 0
    with capture_logs() as logs:
        await pusher.sweep()
    assert await states(engine) == ["failed"]
    assert [line["alert"] for line in logs if "alert" in line] == ["webhooks_given_up"]
    async with engine.begin() as conn:
        assert await deliveries.replay(
            conn, name, after=None, after_position=0, until=None, keep_trying_s=60, limit=0
        ) is None  # fmt: skip
        assert await deliveries.replay(
            conn, name, after=None, after_position=0, until=None, keep_trying_s=60, limit=1
        ) == 1  # fmt: skip
    assert await push_once(pusher) == 1
    assert await states(engine) == ["delivered"]


async def test_410_disables_the_endpoint_and_nothing_more_is_sent(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    ear.answer = lambda n: status(410)
    await endpoint(engine, ear.url)
    await happen(engine, "a", "b")
    await pusher.spread()
    assert await push_once(pusher, 1) == 1
    await happen(engine, "c")
    await pusher.spread()
    assert await push_once(pusher) == 0
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_delivery SET leased_until = NULL"))
    await pusher.sweep()
    assert await states(engine) == ["failed"] * 2
    assert {row["code"] for row in await rows(engine)} == {"endpoint_gone"}
    async with engine.connect() as conn:
        noted = (await conn.execute(text("SELECT action, actor FROM journal"))).all()
    assert [tuple(row) for row in noted] == [("webhook.disable", "worker")]
    assert len(ear.heard) == 1


async def test_an_endpoint_that_is_enabled_again_is_told_what_it_missed_of_72_hours(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    ear.answer = lambda n: status(410)
    name = await endpoint(engine, ear.url)
    await happen(engine, "given-up", "too-old-by-now")
    await pusher.spread()
    async with engine.begin() as conn:
        assert await deliveries.enable(conn, name, 259_200) is None  # it is not disabled
        assert await deliveries.disable(conn, name, "gone")
    await pusher.sweep()
    await happen(engine, "long-ago", "while-away")  # no delivery is made while it is disabled
    await pusher.spread()
    assert await states(engine) == ["failed"] * 2
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE event SET at = now() - interval '73 h' WHERE order_no IN ('too-old-by-now', 'long-ago')"
            )
        )
        assert await deliveries.enable(conn, name, 259_200) == 1
    ear.answer = lambda n: status(204)
    while await pusher.spread():
        pass
    while await push_once(pusher):
        pass
    told = [msgspec.json.decode(body)["data"]["order_no"] for _, body in ear.heard]
    assert sorted(told) == ["given-up", "while-away"]
    assert sorted(await states(engine)) == ["delivered", "delivered", "failed"]


async def test_a_dead_address_is_left_alone_by_its_breaker_and_holds_up_no_other(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    await endpoint(engine, "http://127.0.0.1:9/dead", name="wh_dead")
    await endpoint(engine, ear.url, name="wh_fine")
    await happen(engine, *(f"o{n}" for n in range(20)))
    await pusher.spread()
    dead = "http://127.0.0.1:9/dead"
    for _ in range(4):
        await push_once(pusher, 32)
    assert pusher.ways[dead].breaker.state is State.OPEN and pusher.ways[dead].room() == 0
    assert len(ear.heard) == 20 == (await states(engine)).count("delivered")
    tried = sum(row["tries"] for row in await rows(engine) if row["endpoint"] == "wh_dead")
    assert 5 <= tried <= 16


async def test_a_lease_of_a_dead_worker_ends_and_its_late_result_changes_nothing(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    await endpoint(engine, ear.url)
    await happen(engine, "a")
    await pusher.spread()
    (mine,) = await pusher.lease(10)
    assert await pusher.lease(10) == []
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_delivery SET leased_until = now() - interval '1 s'"))
    (theirs,) = await pusher.lease(10)
    await pusher.push(theirs)
    async with engine.begin() as conn:
        assert not await deliveries.again(conn, mine, 0, "late", None)
    assert await states(engine) == ["delivered"] and len(ear.heard) == 1


async def test_an_answer_that_never_ends_and_one_that_never_begins_are_both_bounded(
    engine: AsyncEngine, settings: Settings, ear: Ear
) -> None:
    pusher = Pusher(engine, settings.model_copy(update={"webhook_answer_max_bytes": 1000}))
    ear.answer = lambda n: b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 100_000
    await endpoint(engine, ear.url)
    await happen(engine, "a")
    await pusher.spread()
    await push_once(pusher)
    assert await states(engine) == ["delivered"]
    await pusher.aclose()
    pusher = Pusher(engine, settings.model_copy(update={"webhook_deadline_s": 0.3}))
    ear.hold = asyncio.Event()
    await happen(engine, "b")
    await pusher.spread()
    begun = time.monotonic()
    await push_once(pusher)
    assert time.monotonic() - begun < settings.webhook_deadline_s / 2
    assert [(row["state"], row["code"]) for row in await rows(engine)][1] == ("due", "timeout")
    ear.hold.set()
    await pusher.aclose()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"]
)
async def test_an_address_of_our_own_network_is_refused_at_delivery(
    engine: AsyncEngine, settings: Settings, ear: Ear, host: str
) -> None:
    pusher = Pusher(engine, settings.model_copy(update={"webhooks_allow_private": False}))
    await endpoint(engine, ear.url.replace("127.0.0.1", host))
    await happen(engine, "a")
    await pusher.spread()
    assert await push_once(pusher) == 1
    assert ear.heard == []
    assert (await rows(engine))[0]["code"] in ("address_refused", "name_unknown")
    await pusher.aclose()


async def test_new_deliveries_are_made_page_by_page_and_old_records_are_forgotten(
    engine: AsyncEngine, pusher: Pusher, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "SPREAD_MAX", 2)
    await endpoint(engine, ear.url)
    await happen(engine, "a", "b", "c")
    assert await pusher.spread() and not await pusher.spread()
    assert len(await rows(engine)) == 3
    await push_once(pusher)
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE webhook_delivery SET ended_at = now() - interval '8 days' WHERE event = 'evt-a-1-paid'"
            )
        )
    await pusher.sweep()
    assert [row["event"] for row in await rows(engine)] == ["evt-b-1-paid", "evt-c-1-paid"]


async def test_an_endpoint_that_the_release_before_made_is_told_from_now_on(
    engine: AsyncEngine, pusher: Pusher, ear: Ear
) -> None:
    await happen(engine, "a")
    await endpoint(engine, ear.url)
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE webhook_endpoint SET told_to = NULL"))
    await pusher.spread()
    await happen(engine, "b")
    await pusher.spread()
    assert [row["event"] for row in await rows(engine)] == ["evt-b-1-paid"]


async def test_two_workers_share_the_work_and_send_each_event_once(
    engine: AsyncEngine, settings: Settings, ear: Ear
) -> None:
    await endpoint(engine, ear.url)
    async with pushing(engine, settings), pushing(engine, settings):
        await happen(engine, *(f"o{n}" for n in range(40)))

        async def all_delivered() -> bool:
            return await states(engine) == ["delivered"] * 40

        await until(all_delivered, "forty delivered")
    assert len(ear.heard) == len(set(ear.ids())) == 40
