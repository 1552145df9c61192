"""One sale on a real server, driven through the binding, with the whole key state to look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from app import alike
from app.answers import Joined, Published
from app.draw import seed_hash
from app.keys import SaleKeys
from app.redis.link import Link
from app.scripts import Scripts

T0 = 1_800_000_000_000  # ms: the line opens
FREEZE = T0 + 50_000
OPENS = T0 + 60_000
CLOSES = T0 + 600_000
SEED = bytes(range(32))
BACKLOG = 1_000


class Stage:
    """A published sale `x` with the items A and B, and every call of it with fewer words. `now` is the sale clock."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.scripts = Scripts(link)
        self.keys = SaleKeys("x")
        self.now = OPENS
        self.epoch = 1
        self.skus = ["A", "B"]

    def fields(self, **changed: Any) -> dict[str, Any]:
        return {
            "epoch": 1, "version": 1, "line_opens_ms": T0, "opens_ms": OPENS, "closes_ms": CLOSES, "freeze_ms": FREEZE,
            "beacon_source": "none", "beacon_wait_ms": 5_000, "rate_milli": -1, "burst": 100, "limit": 2,
            "line_max": 1_000, "standby": 0, "seed": SEED.hex(), "items": ",".join(self.skus), "doc": "{}",
        } | changed  # fmt: skip

    async def publish(self, units: int = 5, **changed: Any) -> Stage:
        published = await self.scripts.sale_publish(
            sale="x",
            fields=self.fields(**changed),
            items=[(sku, units) for sku in self.skus],
            seed_hash=seed_hash(SEED),
            now_ms=T0 - 1_000,
        )
        assert published == Published()
        return self

    def at(self, now: int) -> Stage:
        self.now = now
        return self

    @staticmethod
    def hash_of(buyer: str) -> bytes:
        return buyer.encode().rjust(10, b"#")[-10:]

    async def batch(
        self,
        *buyers: str | tuple[Any, ...],
        sku: str = "A",
        backlog_max: int = BACKLOG,
        epoch: int | None = None,
    ) -> Any:
        """buyers: "ann" or ("ann", units) or ("ann", units, again). The whole reply."""
        rows = []
        for buyer in buyers:
            name, units, again = (*((buyer,) if isinstance(buyer, str) else buyer), 1, False)[:3]
            if not isinstance(buyer, str) and len(buyer) == 2:
                again = False
            rows.append((str(name).encode(), int(units), bool(again), self.hash_of(str(name))))
        return await self.scripts.line_join(
            sale="x",
            epoch=epoch or self.epoch,
            sku=sku,
            skus=self.skus,
            buyers=rows,
            backlog_max=backlog_max,
            now_ms=self.now,
        )

    async def join(
        self, *buyers: str | tuple[Any, ...], sku: str = "A", backlog_max: int = BACKLOG
    ) -> list[Any]:
        """The answers, one for each buyer."""
        reply = await self.batch(*buyers, sku=sku, backlog_max=backlog_max)
        assert isinstance(reply, Joined), reply
        return list(reply.answers)

    def _common(self) -> dict[str, Any]:
        return {"sale": "x", "epoch": self.epoch, "now_ms": self.now}

    async def leave(self, seq: int, sku: str = "A") -> Any:
        return await self.scripts.line_leave(sku=sku, seq=seq, **self._common())

    async def advance(self, sku: str = "A", work_max: int = 1_000, backlog_max: int = BACKLOG) -> Any:
        return await self.scripts.line_advance(
            sku=sku, work_max=work_max, backlog_max=backlog_max, **self._common()
        )

    async def release(
        self, seq: int, version: int, *, to: bytes = b"e", units: int = 1, backlog_max: int = BACKLOG
    ) -> Any:
        return await self.scripts.units_release(
            sku="A",
            seq=seq,
            units=units,
            version=version,
            to_byte=to,
            status_json='{"order":null}',
            work_max=1_000,
            backlog_max=backlog_max,
            **self._common(),
        )

    async def retake(self, seq: int, version: int, units: int = 1) -> Any:
        return await self.scripts.units_retake(
            sku="A", seq=seq, units=units, version=version, **self._common()
        )

    async def add(self, units: int, name: str, sku: str = "A") -> Any:
        return await self.scripts.stock_add(
            sku=sku, units=units, id=name, work_max=1_000, backlog_max=BACKLOG, **self._common()
        )

    async def mark(
        self, seq: int, version: int, byte: bytes, *, json: str = "{}", keep_ask: bool = False
    ) -> Any:
        return await self.scripts.ticket_mark(
            sku="A",
            seq=seq,
            version=version,
            byte=byte,
            status_json=json,
            keep_ask=keep_ask,
            **self._common(),
        )

    async def ask(
        self, seq: int, kind: Any, *, arg: str = "-", channel: str = "-", buyer: str = "ann"
    ) -> Any:
        return await self.scripts.ask_put(
            sku="A",
            seq=seq,
            buyer_id=buyer,
            kind=kind,
            arg=arg,
            channel=channel,
            repeat_ms=10_000,
            **self._common(),
        )

    async def switch(self, version: int, **changes: Any) -> Any:
        return await self.scripts.sale_switch(version=version, changes=changes, **self._common())

    # what is stored
    async def units_left(self, sku: str = "A") -> int:
        return int(await self.link.call("HGET", self.keys.stock, sku))

    async def outcome(self, sku: str = "A") -> bytes:
        return await self.link.call("GET", self.keys.outcome(sku)) or b""

    async def item(self, sku: str = "A") -> dict[str, str]:
        return _hash(await self.link.call("HGETALL", self.keys.item(sku)))

    async def sale(self) -> dict[str, str]:
        return _hash(await self.link.call("HGETALL", self.keys.sale))

    async def status(self) -> dict[str, str]:
        return _hash(await self.link.call("HGETALL", self.keys.status))

    async def told(self) -> dict[str, str]:
        """`status` as its readers see it: without the forms, filled in."""
        status = await self.status()
        told: dict[str, str] = {}
        for field, value in status.items():
            version, _, text = value.partition("|")
            like = alike.cut(text[2:].encode())
            if like is not None:
                form = status[alike.field_of(like[0])].encode()
                value = f"{version}|{text[:2]}{alike.filled(form, like[1]).decode()}"
            if not field.startswith("="):
                told[field] = value
        return told

    async def buyers(self) -> dict[str, str]:
        return _hash(await self.link.call("HGETALL", self.keys.buyers))

    async def line(self, sku: str = "A") -> dict[str, bytes]:
        entries = await self.link.call("XRANGE", self.keys.line(sku), "-", "+")
        return {entry[0].decode(): entry[1][1] for entry in entries}

    async def claims(self) -> list[str]:
        """Every claim of the stream, in order: `1|epoch|sku|seq|units|claimed_ms|buyer_id`."""
        entries = await self.link.call("XRANGE", self.keys.orders, "-", "+")
        return [claim for entry in entries for claim in claims_of(entry)]

    async def claimed_seqs(self) -> list[int]:
        return [int(claim.split("|")[3]) for claim in await self.claims()]

    async def dump(self) -> dict[bytes, Any]:
        """Every key of the server as it is stored, to the byte."""
        found = sorted(await self.link.call("KEYS", "*"))
        return dict(zip(found, await self.link.pipeline([("DUMP", key) for key in found]), strict=True))


def claims_of(entry: Any) -> list[str]:
    """What an entry of `orders` says, written out claim by claim."""
    (word, shared), *claims = zip(entry[1][::2], entry[1][1::2], strict=True)
    assert word == b"c"
    form, epoch, sku, ms = shared.decode().split("|")
    return [
        "|".join(
            (form, epoch, sku, *ticket.decode().split(":"), ms, buyer.decode("utf-8", "backslashreplace"))
        )
        for ticket, buyer in claims
    ]


def _hash(flat: list[bytes]) -> dict[str, str]:
    values = [value.decode() for value in flat]
    return dict(zip(values[::2], values[1::2], strict=True))


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    link = Link(redis_url, deadline_s=10, name="test")
    await link.start()
    assert link.connected, link.trouble
    yield link
    await link.close()


@pytest.fixture
async def stage(link: Link) -> Stage:
    """Nothing is published yet: `await stage.publish(units, **fields)`."""
    return Stage(link)


@pytest.fixture
def unchanged(stage: Stage) -> Callable[[Any], Any]:
    """`await unchanged(call)`: the reply of a call that must not change one byte of any key."""

    async def run(call: Any) -> Any:
        before = await stage.dump()
        reply = await call
        assert await stage.dump() == before
        return reply

    return run
