"""Keys and roles: who may do what, and that nobody else may."""

from __future__ import annotations

import asyncio

import pytest

from tests.office.conftest import FIRST_KEY, Office, document

SALES = "/v1/admin/sales"
READS = (
    "/v1/admin/sales", "/v1/admin/sales/drop", "/v1/admin/sales/drop/live", "/v1/admin/sales/drop/live/events",
    "/v1/admin/sales/drop/audit", "/v1/admin/sales/drop/orders", "/v1/admin/sales/drop/orders.csv",
    "/v1/admin/orders/0123456789ABCDEFGHIJ", "/v1/admin/providers", "/v1/admin/journal", "/v1/admin/journal/verify",
    "/v1/admin/events",
)  # fmt: skip
OPERATOR_POSTS = (
    (SALES, document("other")), (f"{SALES}/drop/publish", None), (f"{SALES}/drop/pause", None),
    (f"{SALES}/drop/resume", None), (f"{SALES}/drop/rate", {"rate_per_s": 1}), (f"{SALES}/drop/message", {"text": "x"}),
    (f"{SALES}/drop/top-up", {"sku": "A", "units": 1}), (f"{SALES}/drop/cancel-all", {"sku": "A"}),
    (f"{SALES}/drop/close", None), ("/v1/admin/orders/0123456789ABCDEFGHIJ/cancel", None),
    ("/v1/admin/orders/0123456789ABCDEFGHIJ/refund", {"restock": False}),
    ("/v1/admin/providers/sandbox/breaker", {"mode": "auto"}),
)  # fmt: skip
ADMIN_READS = ("/v1/admin/keys", "/v1/admin/webhooks")
ADMIN_POSTS = (
    ("/v1/admin/keys", {"name": "n", "role": "viewer"}),
    ("/v1/admin/webhooks", {"url": "https://shop.example/h", "events": ["order.paid"]}),
)
ADMIN_DELETES = ("/v1/admin/keys/key_0", "/v1/admin/webhooks/wh_0")


async def test_every_call_wants_a_key_that_works(office: Office) -> None:
    for key, code in ((None, "auth_missing"), ("wrong", "auth_invalid"), ("x" * 5000, "auth_invalid")):
        for path in (*READS, *ADMIN_READS):
            answer = await office.get(path, key=key)
            assert (answer.status_code, answer.json()["code"]) == (401, code), path
            assert answer.headers["www-authenticate"].startswith("Bearer")
        for path, body in (*OPERATOR_POSTS, *ADMIN_POSTS):
            assert (await office.post(path, body, key=key)).status_code == 401, path
        for path in ADMIN_DELETES:
            assert (await office.delete(path, key=key)).status_code == 401, path
    for other in ("Basic Zm9vOmJhcg==", "Bearer", FIRST_KEY, "bearer"):
        answer = await office.http.get("/v1/admin/sales", headers={"Authorization": other})
        assert answer.status_code == 401


@pytest.mark.parametrize(
    ("role", "operates", "administers"),
    [("viewer", False, False), ("operator", True, False), ("admin", True, True)],
)
async def test_each_role_may_do_what_it_may_and_no_more(
    office: Office, role: str, operates: bool, administers: bool
) -> None:
    await office.draft()
    key = await office.key_of(role)
    for path in READS:
        if not path.endswith("/events") or path == "/v1/admin/events":
            assert (await office.get(path, key=key)).status_code not in (401, 403, 500), path
    for path, body in OPERATOR_POSTS:
        assert ((await office.post(path, body, key=key)).status_code == 403) is not operates, path
    for method in ("patch", "delete"):
        call = (
            office.patch(f"{SALES}/none", {"title": "x"}, etag="*", key=key)
            if method == "patch"
            else office.delete(f"{SALES}/none", key=key)
        )
        assert ((await call).status_code == 403) is not operates
    for path in ADMIN_READS:
        assert ((await office.get(path, key=key)).status_code == 403) is not administers, path
    for path, body in ADMIN_POSTS:
        assert ((await office.post(path, body, key=key)).status_code == 403) is not administers, path
    for path in ADMIN_DELETES:
        assert ((await office.delete(path, key=key)).status_code == 403) is not administers, path


async def test_a_key_is_shown_once_kept_as_a_hash_and_ends_at_once(office: Office) -> None:
    made = (await office.post("/v1/admin/keys", {"name": "Mei", "role": "operator"})).json()
    key = made["key"]
    assert (await office.get(SALES, key=key)).status_code == 200
    listed = await office.get("/v1/admin/keys")
    assert key not in listed.text and [one["name"] for one in listed.json()["data"]] == ["first admin", "Mei"]
    for table in ("operator_key", "journal", "idempotency"):
        rows = await office.sql(f"SELECT t::text FROM {table} t")
        assert not any(key in str(row) for row in rows), table
        assert not any(key.encode().hex() in str(row) for row in rows), table
    assert (await office.delete(f"/v1/admin/keys/{made['id']}")).status_code == 204
    assert (await office.get(SALES, key=key)).status_code == 401
    assert (await office.delete(f"/v1/admin/keys/{made['id']}")).status_code == 404


async def test_the_last_admin_stays(office: Office) -> None:
    refused = await office.delete("/v1/admin/keys/first")
    assert (refused.status_code, refused.json()["code"]) == (409, "last_admin")
    a, b = [(await office.post("/v1/admin/keys", {"name": n, "role": "admin"})).json() for n in ("a", "b")]
    assert (await office.delete("/v1/admin/keys/first", key=a["key"])).status_code == 204
    # The two that are left revoke each other at once: one of them stays.
    answers = await asyncio.gather(
        office.delete(f"/v1/admin/keys/{b['id']}", key=a["key"]),
        office.delete(f"/v1/admin/keys/{a['id']}", key=b["key"]),
    )
    assert sorted(answer.status_code for answer in answers)[0] == 204
    left = [key for key in (a, b) if (await office.get(SALES, key=key["key"])).status_code == 200]
    assert len(left) == 1


@pytest.mark.parametrize(
    "body",
    [{"name": "", "role": "viewer"}, {"name": "x" * 65, "role": "viewer"}, {"name": "a\nb", "role": "viewer"},
     {"name": "x", "role": "root"}, {"name": "x"}, {"role": "viewer"}, {"name": "x", "role": "viewer", "key": "mine"}],
)  # fmt: skip
async def test_a_bad_key_is_not_made(office: Office, body: dict[str, str]) -> None:
    assert (await office.post("/v1/admin/keys", body)).status_code == 422
    assert len((await office.get("/v1/admin/keys")).json()["data"]) == 1
