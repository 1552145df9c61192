"""The live document, its stream, and probes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from app.settings import Settings
from tests.office.conftest import FIRST_KEY, Office, open_office, settings_for, sse, until, write_order
from tests.sockets import quiet_port


async def test_one_document_says_how_a_sale_is_doing(office: Office) -> None:
    await office.open_sale(rate_per_s=9)
    await write_order(office, seq=1)
    await write_order(office, seq=2, buyer="b2", state="paid")
    await office.redis("HSET", "{sale:drop}:item:A", "next_seq", 8)
    await office.redis(
        "HSET", "fairdrop:providers", "sandbox", json.dumps({"kind": "payment", "state": "open", "calls": 3})
    )
    await office.post("/v1/admin/providers/sandbox/breaker", {"mode": "disabled"})
    doc = (await office.get("/v1/admin/sales/drop/live")).json()
    assert (doc["state"], doc["joined"], doc["served"], doc["waiting"]) == ("open", 7, 2, 5)
    assert (doc["reserved"], doc["paid"], doc["expired"], doc["units"], doc["units_left"]) == (1, 1, 0, 10, 8)
    assert doc["conversion"] == {"joined_to_reserved": 0.2857, "reserved_to_paid": 0.5}
    assert doc["rates"]["limit_per_s"] == 9 and doc["sms"]["sent"] == 0
    assert doc["latency"]["confirm_p50_ms"] is not None
    provider = doc["providers"][0]
    assert (provider["name"], provider["state"], provider["mode"], provider["calls"]) == (
        "sandbox",
        "open",
        "disabled",
        3,
    )

    async def audited() -> dict[str, Any] | None:
        found: dict[str, Any] | None = (await office.get("/v1/admin/sales/drop/live")).json()["invariants"]
        return found

    invariants = await until(audited)
    assert {"name", "ok", "left", "right"} == set(invariants["checks"][0])


async def test_a_draft_or_nothing_has_no_live_document(office: Office) -> None:
    await office.draft()
    for path in ("live", "live/events", "audit"):
        refused = await office.get(f"/v1/admin/sales/drop/{path}")
        assert (refused.status_code, refused.json()["code"]) == (409, "not_published")
        missing = await office.get(f"/v1/admin/sales/none/{path}")
        assert (missing.status_code, missing.json()["code"]) == (404, "no_such_sale")


async def stream(
    office: Office, key: str, seconds: float, heard: list[str] | None = None
) -> tuple[str, bool]:
    """What the stream says within some time, and whether the office ended it; `heard` has it already while it comes."""
    said = ""
    try:
        async with asyncio.timeout(seconds):
            headers = {"Authorization": f"Bearer {key}"}
            async with office.http.stream(
                "GET", "/v1/admin/sales/drop/live/events", headers=headers
            ) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                async for text in answer.aiter_text():
                    said += text
                    if heard is not None:
                        heard.append(text)
        return said, True
    except TimeoutError:
        return said, False


async def test_the_stream_tells_once_a_second_and_ends_with_the_key(office: Office) -> None:
    await office.open_sale()
    made = (await office.post("/v1/admin/keys", {"name": "v", "role": "viewer"})).json()
    heard: list[str] = []

    def states() -> list[str]:
        return [doc["state"] for doc in sse("".join(heard).rpartition("\n\n")[0])]

    began = time.monotonic()
    watching = asyncio.create_task(stream(office, made["key"], 60, heard))
    await until(lambda: len(states()) >= 2)
    await office.post("/v1/admin/sales/drop/pause")
    await until(lambda: states()[-1] == "paused")
    await office.delete(f"/v1/admin/keys/{made['id']}")
    said, ended = await watching
    assert ended
    assert states()[0] == "open" and len(states()) <= time.monotonic() - began + 2
    assert said.startswith("retry: ") and "event: live" in said
    await until(lambda: office.app.state.watch.streams == 0)


async def test_draining_says_so_serves_on_and_ends_streams(office: Office) -> None:
    await office.open_sale()
    assert (await office.get("/readyz", key=None)).json() == {
        "status": "ready",
        "reasons": [],
        "durability": "local",
    }
    watching = asyncio.create_task(stream(office, FIRST_KEY, 20))
    await until(lambda: office.app.state.watch.streams == 1)
    office.app.drain()  # type: ignore[attr-defined]
    ready = await office.get("/readyz", key=None)
    assert (ready.status_code, ready.json()["code"]) == (503, "draining") and ready.headers["retry-after"]
    assert (await watching)[1]
    assert (await office.get("/v1/admin/sales")).status_code == 200
    assert (await office.get("/healthz", key=None)).json() == {"status": "ok"}
    assert (await office.get("/v1/admin/sales/drop/live/events")).status_code == 503


async def test_without_redis_the_office_says_what_is_wrong_and_comes_back(
    office: Office, valkey: Any
) -> None:
    await office.open_sale()
    valkey.kill()
    await until(lambda: not office.desk.link.connected)
    ready = await office.get("/readyz", key=None)
    assert ready.status_code == 503 and ready.json()["reasons"][0].startswith("redis:")
    for path in ("/v1/admin/sales/drop/audit", "/v1/admin/providers"):
        answer = await office.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, "busy"), path
        assert answer.headers["retry-after"]
    assert (await office.get("/v1/admin/sales")).status_code == 200
    assert (await office.get("/healthz", key=None)).status_code == 200
    valkey.start()

    async def ready_again() -> bool:
        return (await office.get("/readyz", key=None)).status_code == 200

    await until(ready_again)


async def test_without_postgres_every_call_is_503_and_none_is_500(office: Office, postgres: Any) -> None:
    await office.open_sale()
    postgres.kill()
    for path in ("/v1/admin/sales", "/v1/admin/sales/drop/live", "/v1/admin/events", "/readyz"):
        answer = await office.get(path)
        assert answer.status_code == 503, (path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json" and answer.headers["retry-after"]
    postgres.start()

    async def back() -> bool:
        return (await office.get("/v1/admin/sales")).status_code == 200

    await until(back)


async def test_metrics_are_for_those_who_are_allowed(office: Office, settings: Settings) -> None:
    answer = await office.get("/metrics", key=None)
    assert answer.status_code == 200 and "process_cpu_seconds_total" in answer.text
    other = await open_office(settings.model_copy(update={"metrics_allow": "10.0.0.0/8"}))
    try:
        assert (await other.get("/metrics", key=None)).status_code == 403
    finally:
        await other.close()


async def test_what_the_office_tells_is_kept_by_no_cache(office: Office) -> None:
    await office.open_sale()
    paths = (
        "sales", "sales/drop", "sales/drop/orders", "sales/drop/audit", "sales/drop/live", "journal", "keys",
        "webhooks", "events", "providers", "bills",
    )  # fmt: skip
    for path in paths:
        answer = await office.get(f"/v1/admin/{path}")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store"), path


async def test_the_page_is_served_with_nothing_from_elsewhere(office: Office) -> None:
    for path in ("/", "/live/drop"):
        page = await office.get(path, key=None)
        assert page.status_code == 200 and "Fairdrop office" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http:" not in page.text and "https:" not in page.text
    for name in ("live.js", "live.css", "docs.js", "icon.svg"):
        assert (await office.get(f"/pages/{name}", key=None)).status_code == 200
    assert (await office.get("/pages/buyer.js", key=None)).status_code == 404


async def test_hooks_have_a_listener_of_their_own_if_asked(redis_url: str, database_url: str) -> None:
    port = quiet_port()
    office = await open_office(settings_for(redis_url, database_url, hooks_port=port))
    try:
        assert (await office.http.post("/v1/hooks/sandbox", content=b"{}")).status_code == 404
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as outside:
            assert (await outside.post("/v1/hooks/sandbox", content=b"{}")).status_code == 401
            assert (await outside.get("/v1/admin/sales")).status_code == 404
            assert (await outside.get("/openapi.json")).status_code == 404
    finally:
        await office.close()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/hooks/sandbox", b"{}", 401),
        ("/v1/hooks/sandbox", b"\x00\xff", 401),
        ("/v1/hooks/sandbox", b"x" * 70_000, 413),
        ("/v1/hooks/nobody", b"{}", 404),
        ("/v1/hooks/%00", b"{}", 422),
    ],
)
async def test_a_forged_call_back_is_refused(office: Office, path: str, body: bytes, status: int) -> None:
    answer = await office.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")


async def test_the_live_document_says_how_much_slower_the_sale_serves_and_why(office: Office) -> None:
    await office.open_sale(rate_per_s=9)
    url = "/v1/admin/sales/drop/live"
    doc = (await office.get(url)).json()
    assert (doc["slowdown"], doc["notices"]) == (None, [])
    until_ms = int(time.time() * 1000) + 60_000
    fields = ("slow_milli", 2500, "slow_base_milli", 9000, "slow_reason", "confirm_lag", "notices", "payment")
    await office.redis("HSET", "{sale:drop}:sale", "advice_until_ms", until_ms, *fields)

    async def slowed() -> dict[str, Any] | None:
        found: dict[str, Any] = (await office.get(url)).json()
        return found if found["slowdown"] else None

    doc = await until(slowed)
    assert doc["notices"] == ["payment"]
    assert (doc["slowdown"]["reason"], doc["slowdown"]["rate_per_s"], doc["slowdown"]["from_per_s"]) == (
        "confirm_lag",
        2.5,
        9.0,
    )
    assert doc["rates"]["limit_per_s"] == 9  # the operator's
