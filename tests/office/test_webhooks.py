"""Endpoints get new secrets and the past again; both once for each Idempotency-Key, and in the journal."""

from __future__ import annotations

import json
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app import sealing
from app.sealing import webhook_aad
from tests.office.conftest import Office

EVENTS = ["sale.published", "sale.paused"]


async def make(office: Office, *events: str) -> dict[str, Any]:
    body = {"url": "https://shop.example/hook", "events": list(events) or EVENTS}
    made = await office.post("/v1/admin/webhooks", body)
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


async def test_a_rotated_secret_is_new_and_the_old_one_is_kept_for_the_overlap(office: Office) -> None:
    made = await make(office)
    path = f"/v1/admin/webhooks/{made['id']}/rotate"
    tried = await office.post(path, {"overlap_s": 60}, dry_run="true")
    assert tried.status_code == 200 and "secret" not in tried.json()
    rotated = await office.post(path, {"overlap_s": 60}, idem="r")
    assert rotated.status_code == 200, rotated.text
    assert rotated.json()["secret"] != made["secret"] and rotated.json()["secret_before_until"] is not None
    assert (await office.post(path, {"overlap_s": 60}, idem="r")).json() == rotated.json()
    ((row_id, secret, before, left),) = await office.sql(
        "SELECT id, secret, secret_before, extract(epoch FROM secret_before_until - now()) FROM webhook_endpoint"
    )
    aad = webhook_aad(row_id)
    opened = [sealing.unseal(office.desk.seal_keys, bytes(one), aad) for one in (secret, before)]
    assert opened == [b64decode(one[6:]) for one in (rotated.json()["secret"], made["secret"])]
    assert 50 < left <= 60
    listed = await office.get("/v1/admin/webhooks")
    assert rotated.json()["secret"] not in listed.text
    assert listed.json()["data"][0]["secret_before_until"] == rotated.json()["secret_before_until"]
    noted = (await office.get("/v1/admin/journal")).json()["data"]
    assert [one["action"] for one in noted].count("webhook.rotate") == 1
    assert rotated.json()["secret"] not in json.dumps(noted)


async def test_the_past_is_due_again_by_time_and_by_cursor(office: Office) -> None:
    start = datetime.now(UTC) - timedelta(seconds=5)
    await office.publish()
    cursor = (await office.get("/v1/admin/events")).json()["next_cursor"]
    made = await make(office)
    await office.post("/v1/admin/sales/drop/pause")
    await office.post("/v1/admin/sales/drop/resume")  # not asked for
    await office.get("/v1/admin/events")  # numbers them
    path = f"/v1/admin/webhooks/{made['id']}/replay"
    tried = await office.post(path, {"after": start.isoformat()}, dry_run="true")
    assert tried.json() == {"id": made["id"], "replayed": 2}
    assert await office.sql("SELECT event FROM webhook_delivery") == []
    by_cursor = await office.post(path, {"after": cursor}, idem="c")
    assert (by_cursor.status_code, by_cursor.json()["replayed"]) == (202, 1), by_cursor.text
    assert (await office.post(path, {"after": cursor}, idem="c")).json() == by_cursor.json()
    await office.sql("UPDATE webhook_delivery SET state = 'delivered', ended_at = now(), tries = 3")
    by_time = await office.post(path, {"after": start.isoformat()})
    assert by_time.json()["replayed"] == 2
    rows = await office.sql("SELECT split_part(event, '-', 4), state, tries FROM webhook_delivery ORDER BY 1")
    assert [tuple(row)[1:] for row in rows] == [("due", 0)] * 2
    before = await office.post(path, {"after": start.isoformat(), "until": start.isoformat()})
    assert before.json()["replayed"] == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"after": "2026-11-11T00:00:00"}, 422),
        ({"after": "yesterday"}, 422),
        ({"after": "x" * 600}, 422),
        ({"after": "2026-11-11T00:00:00Z", "until": "soon"}, 422),
        ({}, 422),
        ({"after": 5}, 422),
    ],
)
async def test_a_replay_of_no_time_changes_nothing(office: Office, body: dict[str, Any], status: int) -> None:
    made = await make(office)
    assert (await office.post(f"/v1/admin/webhooks/{made['id']}/replay", body)).status_code == status
    assert await office.sql("SELECT 1 FROM webhook_delivery") == []


async def test_unknown_deleted_and_disabled_endpoints_and_other_roles(office: Office) -> None:
    body = {"after": "2026-11-11T00:00:00Z"}
    operator = await office.key_of("operator")
    made = await make(office)
    for action, sent in (("rotate", {}), ("replay", body), ("enable", {})):
        path = f"/v1/admin/webhooks/{made['id']}/{action}"
        assert (await office.post(path, sent, key=operator)).status_code == 403
        assert (await office.post(f"/v1/admin/webhooks/wh_nobody/{action}", sent)).status_code == 404
    working = await office.post(f"/v1/admin/webhooks/{made['id']}/enable")
    assert (working.status_code, working.json()["code"]) == (409, "wrong_state")
    await office.sql("UPDATE webhook_endpoint SET disabled_at = now(), disabled_why = 'gone'")
    refused = await office.post(f"/v1/admin/webhooks/{made['id']}/replay", body)
    assert (refused.status_code, refused.json()["code"]) == (409, "wrong_state")
    assert (await office.get("/v1/admin/webhooks")).json()["data"][0]["disabled_why"] == "gone"
    await office.delete(f"/v1/admin/webhooks/{made['id']}")
    for action, sent in (("rotate", {}), ("replay", body), ("enable", {})):
        assert (await office.post(f"/v1/admin/webhooks/{made['id']}/{action}", sent)).status_code == 404


async def test_an_endpoint_is_enabled_once_for_each_key_and_in_the_journal(office: Office) -> None:
    made = await make(office)
    await office.sql("UPDATE webhook_endpoint SET disabled_at = now(), disabled_why = 'gone'")
    path = f"/v1/admin/webhooks/{made['id']}/enable"
    assert (await office.post(path, dry_run="true")).status_code == 202
    assert await office.sql("SELECT 1 FROM webhook_endpoint WHERE disabled_at IS NOT NULL")
    enabled = await office.post(path, idem="e")
    assert (enabled.status_code, enabled.json()) == (202, {"id": made["id"], "due": 0})
    assert (await office.post(path, idem="e")).json() == enabled.json()
    listed = (await office.get("/v1/admin/webhooks")).json()["data"][0]
    assert listed["disabled_at"] is None and listed["disabled_why"] is None
    noted = (await office.get("/v1/admin/journal")).json()["data"]
    assert [one["action"] for one in noted].count("webhook.enable") == 1
