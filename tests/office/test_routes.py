"""Operators see where payments and texts go and change it live; no sale is published with a channel to nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.errors import DidNotHappen
from app.providers import routes
from app.providers.registry import open_providers
from app.repair.reconcile import copy_routes
from tests.office.conftest import Office, document, open_office, settings_for, until

ROUTES = "/v1/admin/providers/routes"


@pytest.fixture
async def office(redis_url: str, database_url: str) -> AsyncIterator[Office]:
    two = {
        "payment_also": "sandbox-2",
        "sandbox_2_url": "http://127.0.0.1:1",
        "payment_routes": '{"card": {"sandbox": 1}}',
    }
    office = await open_office(settings_for(redis_url, database_url, **two))
    try:
        yield office
    finally:
        await office.close()


def _route(found: Any, channel: str | None) -> tuple[dict[str, int], str]:
    (one,) = [one for one in found["data"] if one["channel"] == channel]
    return {share["name"]: share["weight"] for share in one["suppliers"]}, one["set_by"]


def _to(channel: str | None = "card", **weights: int) -> dict[str, Any]:
    names = [{"name": name.replace("_", "-"), "weight": weight} for name, weight in weights.items()]
    return {"kind": "payment" if channel else "sms", "channel": channel, "suppliers": names}


async def test_routes_are_shown_changed_live_once_and_left_to_the_settings_again(office: Office) -> None:
    shown = (await office.get(ROUTES)).json()
    assert _route(shown, "sandbox") == ({"sandbox": 1, "sandbox-2": 0}, "settings")
    assert _route(shown, "card") == ({"sandbox": 1}, "settings")
    assert _route(shown, None) == ({"sandbox-sms": 1}, "settings")

    tried = await office.post(ROUTES, _to(sandbox_2=2, sandbox=1), dry_run=True)
    assert (tried.status_code, tried.headers["Dry-Run"]) == (200, "true")
    assert _route((await office.get(ROUTES)).json(), "card") == ({"sandbox": 1}, "settings")

    body = {**_to(sandbox_2=2, sandbox=1), "reason": "their bad day"}
    done = await office.post(ROUTES, body, idem="r1")
    assert done.json()["suppliers"] == [{"name": "sandbox-2", "weight": 2}, {"name": "sandbox", "weight": 1}]
    again = await office.post(ROUTES, body, idem="r1")
    assert again.headers["Idempotency-Replayed"] == "true"
    assert (await office.post(ROUTES, _to(sandbox=1), idem="r1")).status_code == 409
    assert _route((await office.get(ROUTES)).json(), "card") == ({"sandbox-2": 2, "sandbox": 1}, "operators")
    entry = (await office.get("/v1/admin/journal")).json()["data"][0]
    assert (entry["action"], entry["reason"]) == ("provider.route", "their bad day")
    assert entry["detail"]["before"] == [{"name": "sandbox", "weight": 1}]

    back = await office.post(ROUTES, {"kind": "payment", "channel": "card", "suppliers": None})
    assert back.json() == {
        "kind": "payment",
        "channel": "card",
        "suppliers": [{"name": "sandbox", "weight": 1}],
        "set_by": "settings",
    }


async def test_every_process_follows_within_a_second(office: Office) -> None:
    """This office changes it in its own memory at once; another process looks by itself."""
    other = open_providers(office.desk.settings)
    stopping = asyncio.Event()
    following = asyncio.create_task(routes.run(office.desk.link, other.routes, stopping))
    try:
        await office.post(ROUTES, _to(sandbox_2=1))
        assert routes.EVERY_S < 1.0  # on a busy machine a look may take longer, which is not its fault
        await until(lambda: other.payment_for("card", "ORDER") == "sandbox-2")
    finally:
        stopping.set()
        await following
        await other.aclose()


async def test_routes_outlive_a_redis_that_lost_them(office: Office) -> None:
    """Postgres has them: the worker gives Redis, and so every process, what operators set."""
    await office.post(ROUTES, _to(sandbox_2=2, sandbox=1))
    await office.post(ROUTES, _to("gone", sandbox=1))
    await office.post(ROUTES, {"kind": "payment", "channel": "gone", "suppliers": None})
    before = await office.redis("HGETALL", "fairdrop:provider_routes")
    assert before
    await office.redis("DEL", "fairdrop:provider_routes")
    assert _route((await office.get(ROUTES)).json(), "card") == ({"sandbox": 1}, "settings")

    assert await copy_routes(office.desk.engine, office.desk.link)
    assert await office.redis("HGETALL", "fairdrop:provider_routes") == before
    shown = _route((await office.get(ROUTES)).json(), "card")
    assert shown == ({"sandbox-2": 2, "sandbox": 1}, "operators") and list(shown[0]) == [
        "sandbox-2",
        "sandbox",
    ]
    assert not await copy_routes(office.desk.engine, office.desk.link)  # they agree

    # What is in Redis only, or otherwise, is not what an operator set.
    await office.redis("HSET", "fairdrop:provider_routes", "payment:alipay", '{"sandbox":1}')
    await office.redis("HSET", "fairdrop:provider_routes", "payment:card", '{"sandbox":1}')
    assert await copy_routes(office.desk.engine, office.desk.link)
    assert await office.redis("HGETALL", "fairdrop:provider_routes") == before


async def test_a_route_set_while_redis_is_away_is_told_to_all_when_it_is_back(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise DidNotHappen("no connection")

    with monkeypatch.context() as patched:
        patched.setattr(office.desk.link, "call", away)
        done = await office.post(ROUTES, _to(sandbox_2=1))
        assert done.status_code == 200, done.text
    assert await copy_routes(office.desk.engine, office.desk.link)
    assert _route((await office.get(ROUTES)).json(), "card") == ({"sandbox-2": 1}, "operators")


@pytest.mark.parametrize(
    ("body", "path", "code"),
    [
        (_to(paypal=1), "suppliers.0.name", "unknown_supplier"),
        (_to(None, sandbox=1), "suppliers.0.name", "unknown_supplier"),
        ({**_to(), "suppliers": [{"name": "sandbox", "weight": 1}] * 2}, "suppliers.1.name", "not_unique"),
        ({**_to(sandbox=1), "channel": None}, "channel", "payment_needs_channel"),
        ({**_to(None), "channel": "card", "suppliers": None}, "channel", "payment_needs_channel"),
        (_to(sandbox=-1), "suppliers.0.weight", "greater_than_equal"),
        (_to(sandbox=1001), "suppliers.0.weight", "less_than_equal"),
        (_to(), "suppliers", "too_short"),
        (_to("No Word", sandbox=1), "channel", "string_pattern_mismatch"),
    ],
)
async def test_what_is_no_route_is_refused_and_changes_nothing(
    office: Office, body: dict[str, Any], path: str, code: str
) -> None:
    refused = await office.post(ROUTES, body)
    assert refused.status_code == 422, refused.text
    assert {"path": path, "code": code}.items() <= refused.json()["errors"][0].items()
    assert await office.redis("EXISTS", "fairdrop:provider_routes") == 0
    assert not await copy_routes(office.desk.engine, office.desk.link)


async def test_a_channel_that_leads_to_no_supplier_is_refused_at_publish(office: Office) -> None:
    drafted = await office.post("/v1/admin/sales", document(channels=["card", "alipay", "sandbox-2"]))
    assert drafted.status_code == 201, drafted.text
    for dry_run in (True, False):
        refused = await office.post("/v1/admin/sales/drop/publish", dry_run=dry_run)
        assert (refused.status_code, refused.json()["code"]) == (422, "unknown_channel")
        assert refused.json()["errors"] == [{"path": "channels.1", "code": "unknown_channel"}]
        assert "channels are: card, sandbox, sandbox-2, sandbox-qr" in refused.json()["detail"]
    assert (await office.get("/v1/admin/sales/drop")).json()["state"] == "draft"

    # An operator gives the channel a route: then it leads somewhere, and the dry run says where.
    await office.post(ROUTES, _to("alipay", sandbox_2=1))
    tried = await office.post("/v1/admin/sales/drop/publish", dry_run=True)
    assert tried.status_code == 200, tried.text
    assert tried.json()["routes"] == {
        "card": [{"name": "sandbox", "weight": 1}],
        "alipay": [{"name": "sandbox-2", "weight": 1}],
        "sandbox-2": [{"name": "sandbox-2", "weight": 1}],
    }
    assert (await office.get("/v1/admin/sales/drop")).json()["state"] == "draft"
    published = await office.post("/v1/admin/sales/drop/publish")
    assert published.status_code == 200 and published.json()["routes"] == tried.json()["routes"]
