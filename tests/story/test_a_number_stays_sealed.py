"""A buyer's phone number goes through a whole purchase, reaches the SMS supplier, and is nowhere else to be read.
Nor is their id at the payment channel, which they give when they ask for a link.

It is looked for in everything that is kept or shown: every value in Redis, every row of Postgres, every file of the
data directory (append-only file, write-ahead log, logs), metrics, the shop's feed, refusals. It would be found as text,
as hex (how Postgres shows bytes) and as Base64 (how JSON carries them).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import redis.asyncio as redis_async

from app.demo.servers import Urls
from tests.story.conftest import Town
from tests.story.people import until

NOT_OURS = (
    "postgres/base",
    "postgres/global",
)  # pages, read as rows instead; written at the next checkpoint only


def needles(phone: str) -> list[bytes]:
    """The number as it may be written. Without the country code: somebody may have cut it off."""
    digits = phone[-9:].encode()
    found = [digits, digits.hex().encode()]
    for shift in range(
        3
    ):  # Base64 of a text that has the number somewhere inside: without the bits of its neighbours
        coded = b64encode(b"\0" * shift + digits)
        found.append(coded[(0, 2, 3)[shift] : len(coded.rstrip(b"=")) - 1])
    return found


def test_the_needles_find_what_they_are_for() -> None:
    for before in ("", "a", "ab", "abc", "abcd"):
        text = f'{before}{{"phone":"+8613912345678"}}'.encode()
        for form in (text, text.hex().encode(), b64encode(text)):
            assert any(needle in form for needle in needles("+8613912345678")), form


@pytest.fixture
def data_dir(running: Urls, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the running `up` keeps everything."""
    for file in tmp_path_factory.getbasetemp().glob("story-up*/urls.json"):
        if json.loads(file.read_text())["front"] == running.front:
            return file.parent
    raise AssertionError("no running `up`")


async def values_of_redis(url: str) -> dict[str, list[bytes]]:
    client = redis_async.Redis.from_url(url)
    found: dict[str, list[bytes]] = {}
    try:
        async for key in client.scan_iter(count=1000):
            kind = await client.type(key)
            read: dict[bytes, Any] = {
                b"string": client.get,
                b"hash": client.hgetall,
                b"list": lambda k: client.lrange(k, 0, -1),
                b"stream": client.xrange,
            }
            found[key.decode()] = _leaves([key, await read[kind](key)])
    finally:
        await client.aclose()
    return found


def _leaves(value: Any) -> list[bytes]:
    if isinstance(value, bytes):
        return [value]
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return [leaf for part in parts or () for leaf in _leaves(part)]


async def rows_of_postgres(url: str) -> dict[str, list[bytes]]:
    connection = await asyncpg.connect(url)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {
            table: [row[0].encode() for row in await connection.fetch(f'SELECT t::text FROM "{table}" t')]
            for (table,) in tables
        }
    finally:
        await connection.close()


async def asyncpg_rows(url: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(query))
    finally:
        await connection.close()


def files_of(folder: Path) -> dict[str, list[bytes]]:
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(NOT_OURS):
            try:
                found[name] = [path.read_bytes()]
            except (FileNotFoundError, PermissionError):
                continue  # it went while we looked, or its owner alone may read it
    return found


async def test_a_phone_number_goes_through_a_purchase_and_is_nowhere_to_be_read(
    town: Town, data_dir: Path
) -> None:
    phone = f"+86139{secrets.randbelow(10**8):08d}"
    openid = f"oPaid{secrets.randbelow(10**9):09d}"
    wanted = needles(phone) + needles(openid)
    urls = json.loads((data_dir / "urls.json").read_text())
    looked_at: set[str] = set()

    def nowhere(where: str, places: dict[str, list[bytes]]) -> None:
        looked_at.update(f"{where}:{name}" for name, values in places.items() if any(values))
        leaks = [n for n, values in places.items() if any(needle in v for v in values for needle in wanted)]
        assert not leaks, f"{where}: {leaks}"

    async def nowhere_kept() -> None:
        nowhere("redis", await values_of_redis(urls["redis"]))
        nowhere("postgres", await rows_of_postgres(urls["database"]))
        nowhere("file", files_of(data_dir))

    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=60.0, channels=["sandbox", "sandbox-qr"])
    lin = town.buyer("lin", sale)
    await lin.gets_a_pass(phone=phone)
    await lin.taps()
    await nowhere_kept()  # the contact is in Redis
    assert f"redis:{{sale:{sale}}}:contact" in looked_at

    await town.operator.opens(sale, in_s=0.5)
    order = (await lin.is_told("reserved"))["order"]

    # The plant works: the supplier was given the number, and the office finds the order by it.
    async def texts() -> Any:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as anyone:
            return (await anyone.get(f"{town.urls.sandbox}/sms", params={"limit": 10_000})).json()["data"]

    await until(texts, lambda seen: any(one["phone"] == phone for one in seen))
    found = await town.operator.get(f"/v1/admin/sales/{sale}/orders", phone=phone)
    assert [one["order_no"] for one in found["data"]] == [order["order_no"]]
    await nowhere_kept()  # the contact is in Postgres
    limits = [name for name in looked_at if name.startswith("redis:{sms:")]
    assert limits  # texts to the number are counted

    # Who pays is told when another link is asked for: sealed in Redis, in Postgres, and opened for the call only.
    wish = {"channel": "sandbox-qr", "payer": {"openid": openid}}
    asked = await lin.http.post(f"/v1/tickets/{lin.ticket}/payment", json=wish)
    assert asked.status_code == 202, asked.text
    await nowhere_kept()
    await until(lin.looks, lambda seen: seen["payment"]["channel"] == "sandbox-qr")
    (stored,) = await asyncpg_rows(
        urls["database"], "SELECT payer FROM payment_attempt WHERE payer IS NOT NULL"
    )
    assert set(json.loads(stored["payer"])) == {"sealed"}
    await nowhere_kept()

    # No channel takes the next text: it is on the ticket, in Postgres and in Redis, without the number.
    async with httpx.AsyncClient(timeout=60, trust_env=False) as anyone:
        control = f"{town.urls.sandbox}/control"
        assert (await anyone.post(control, json={"sms": {"refuse_rate": 1}})).status_code == 200
        try:
            await lin.pays()
            await lin.is_told("paid")
            said = await until(lin.looks, lambda ticket: bool(ticket["message"]))
        finally:
            assert (await anyone.post(control, json={"sms": {"refuse_rate": 0}})).status_code == 200
    assert order["order_no"] in said["message"]
    await nowhere_kept()

    # What is shown: refusals of what holds the number, metrics, the feed, the order.
    shown: dict[str, list[bytes]] = {}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as anyone:
        stranger = {"X-Buyer-Id": "stranger"}
        path = f"{town.urls.front}/v1/sales/{sale}/pass"
        for name, body in (
            ("bad number", {"contact": {"phone": f"{phone}x", "language": "zh"}}),
            ("other field", {"phone": phone}),
            ("number as language", {"contact": {"phone": phone, "language": phone * 9}}),
        ):
            refused = await anyone.post(path, json=body, headers=stranger)
            assert refused.status_code == 422, refused.text
            shown[name] = [refused.content]
        for name, url in (
            ("number as ticket", f"{town.urls.front}/v1/tickets/{phone}"),
            ("number as sale", f"{town.urls.front}/v1/sales/{phone}"),
            ("metrics of front", f"{town.urls.front}/metrics"),
            ("metrics of office", f"{town.urls.office}/metrics"),
            ("metrics of worker", f"{town.urls.worker}/metrics"),
        ):
            shown[name] = [(await anyone.get(url, headers=stranger)).content]
        for name in (
            "twilio",
            "sandbox-sms",
            "sandbox",
        ):  # a report, or a payer's address, that nobody vouches for
            body = f"MessageSid=SM1&MessageStatus=delivered&To=%2B{phone[1:]}&client_ip={phone}"
            answer = await anyone.post(f"{town.urls.office}/v1/hooks/{name}", content=body.encode())
            assert answer.status_code in (401, 404), answer.text
            shown[f"hook {name}"] = [answer.content]
    day = datetime.now(UTC).date().isoformat()
    for words in (
        ("sms", "preview", "--sale", sale, "--json", "--data-dir", str(data_dir)),
        ("reconcile-bill", day, "--json", "--data-dir", str(data_dir)),
    ):
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "app.cli", *words], capture_output=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        shown[words[0]] = [ran.stdout, ran.stderr]
    office = town.operator.http
    for path in (
        f"/v1/admin/sales/{sale}/orders?phone={phone[1:]}",
        f"/v1/admin/sales/{sale}/orders",
        f"/v1/admin/sales/{sale}/orders.csv",
        f"/v1/admin/orders/{order['order_no']}",
        f"/v1/admin/sales/{sale}/live",
        f"/v1/admin/events?sale={sale}",
        "/v1/admin/journal",
    ):
        shown[path] = [(await office.get(path)).content]
    nowhere("shown", shown)
    await nowhere_kept()
    assert {"postgres:purchase_order", "postgres:sms", "postgres:event"} <= looked_at
    logs = {name for name in looked_at if name.startswith("file:logs/") or name.endswith("demo-up.log")}
    assert logs and any(".aof" in name for name in looked_at) and any("pg_wal" in name for name in looked_at)
