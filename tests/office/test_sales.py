"""Sales at the desk: drafts, publish, switches, and what a bad request is told."""

from __future__ import annotations

import json

import pytest

from app.ledger import confirming
from tests.office.conftest import FIRST_KEY, Office, document, iso, redis_sale, stock, timed, until


async def test_a_draft_is_made_read_listed_changed_and_deleted(office):
    made = await office.post("/v1/admin/sales", (doc := document()))
    assert made.status_code == 201
    assert made.headers["etag"] == '"1"'
    sale = made.json()
    assert (sale["id"], sale["state"], sale["version"], sale["seed_hash"]) == ("drop", "draft", 1, None)
    assert sale["items"][0]["units"] == doc["items"][0]["units"]
    assert sale["opens_at"].endswith("Z") and len(sale["opens_at"]) == 24
    read = await office.get("/v1/admin/sales/drop")
    assert read.json() == sale and read.headers["etag"] == '"1"'
    changed = await office.patch("/v1/admin/sales/drop", {"title": "Other"}, etag='"1"')
    assert changed.status_code == 200, changed.text
    assert (changed.json()["title"], changed.headers["etag"]) == ("Other", '"2"')
    listed = await office.get("/v1/admin/sales", state="draft")
    assert [one["id"] for one in listed.json()["data"]] == ["drop"]
    assert (await office.delete("/v1/admin/sales/drop")).status_code == 204
    assert (await office.get("/v1/admin/sales/drop")).status_code == 404


async def test_a_sales_id_is_never_used_again(office):
    await office.draft()
    again = await office.post("/v1/admin/sales", document())
    assert (again.status_code, again.json()["code"]) == (409, "sale_exists")
    await office.delete("/v1/admin/sales/drop")
    again = await office.post("/v1/admin/sales", document())
    assert (again.status_code, again.json()["code"]) == (409, "sale_exists")


@pytest.mark.parametrize(
    ("change", "path", "code"),
    [
        ({"id": "Bad Id"}, "id", "string_pattern_mismatch"),
        ({"id": "x" * 49}, "id", "string_pattern_mismatch"),
        ({"title": ""}, "title", "too_short"),
        ({"title": "x" * 201}, "title", "too_long"),
        ({"title": "a\u0000b"}, "title", "invalid"),
        ({"surprise": 1}, "surprise", "unknown_field"),
        ({"limit_per_buyer": "1"}, "limit_per_buyer", "wrong_type"),
        ({"limit_per_buyer": True}, "limit_per_buyer", "wrong_type"),
        ({"limit_per_buyer": 0}, "limit_per_buyer", "greater_than_equal"),
        ({"limit_per_buyer": 101}, "limit_per_buyer", "less_than_equal"),
        ({"limit_per_buyer": 2, "standby": True}, "standby", "standby_needs_limit_1"),
        ({"rate_per_s": 0}, "rate_per_s", "greater_than_equal"),
        ({"rate_per_s": 1e9}, "rate_per_s", "less_than_equal"),
        ({"pay_within_s": 86401}, "pay_within_s", "less_than_equal"),
        ({"line_max": 0}, "line_max", "greater_than_equal"),
        ({"challenge": "pow"}, "challenge", "challenge_needs_pass"),
        ({"channels": ["a"], "default_channel": "b"}, "default_channel", "not_in_channels"),
        ({"channels": ["a", "a"]}, "channels", "not_unique"),
        ({"return_urls": ["javascript:alert(1)"]}, "return_urls.0", "not_an_address"),
        ({"return_urls": ["http://shop.example/"]}, "return_urls.0", "not_an_address"),
        ({"beacon": "http://169.254.1.1/x"}, "beacon", "not_an_address"),
        ({"items": []}, "items", "too_short"),
        ({"items": None}, "items", "missing"),
        ({"opens_at": "yesterday at ten"}, "opens_at", "not_a_time"),
        ({"opens_at": "2026-02-30T10:00:00Z"}, "opens_at", "not_a_time"),
        ({"opens_at": "9999-01-01T10:00:00Z"}, "opens_at", "out_of_range"),
        ({"time_zone": "Mars/Olympus"}, "time_zone", "unknown_time_zone"),
        ({"time_zone": "../../etc/passwd"}, "time_zone", "unknown_time_zone"),
        ({"draw_freeze_s": 3600}, "draw_freeze_s", "before_line_opens"),
    ],
)
async def test_a_bad_document_is_told_each_path_and_code(office, change, path, code):
    answer = await office.post("/v1/admin/sales", document(**change))
    assert answer.status_code == 422, answer.text
    assert {"path": path, "code": code} in answer.json()["errors"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert (await office.get("/v1/admin/sales")).json()["data"] == []


async def test_naive_times_need_a_time_zone(office):
    times = {
        "line_opens_at": "2027-01-01T10:00:00",
        "opens_at": "2027-01-01T10:10:00",
        "closes_at": "2027-01-01T12:00:00",
    }
    refused = await office.post("/v1/admin/sales", document(**times))
    assert (refused.status_code, refused.json()["code"]) == (422, "time_without_zone")
    assert {one["path"] for one in refused.json()["errors"]} == set(times)
    made = await office.post("/v1/admin/sales", document(time_zone="Asia/Shanghai", **times))
    assert made.json()["opens_at"] == "2027-01-01T02:10:00.000Z"


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed"),
        (b"\xff\xfe", "application/json", 400, "malformed"),
        (b'{"id": NaN}', "application/json", 400, "malformed"),
        (b'{"id":"\\ud800"}', "application/json", 400, "malformed"),
        (b"[" * 20000, "application/json", 413, "too_large"),
        (b"[" * 5000, "application/json", 400, "malformed"),
        (b"id=drop", "application/x-www-form-urlencoded", 415, "not_json"),
        (b"[]", "application/json", 422, "invalid"),
        (b"null", "application/json", 422, "invalid"),
        (b"", "application/json", 422, "invalid"),
        (b'"\\u0000"', "application/json", 422, "invalid"),
    ],
)
async def test_a_body_that_is_no_document_is_refused(office, content, kind, status, code):
    headers = {"Authorization": f"Bearer {FIRST_KEY}", "Idempotency-Key": "k1", "Content-Type": kind}
    answer = await office.http.post("/v1/admin/sales", content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_a_copy_takes_what_is_not_given(office):
    await office.draft("first", limit_per_buyer=3, standby=False, rate_per_s=7, pay_within_s=120)
    times = {name: value for name, value in document().items() if name.endswith("_at")}
    made = await office.post(
        "/v1/admin/sales", {"id": "encore", "copy_of": "first", "title": "Encore", **times}
    )
    assert made.status_code == 201, made.text
    sale = made.json()
    assert (sale["title"], sale["limit_per_buyer"], sale["rate_per_s"], sale["pay_within_s"]) == (
        "Encore",
        3,
        7,
        120,
    )
    assert (sale["copy_of"], sale["items"][0]["sku"]) == ("first", "A")
    unknown = await office.post("/v1/admin/sales", {"id": "third", "copy_of": "nothing", **times})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "no_such_sale")


async def test_publish_puts_the_sale_into_redis_once_and_commits_to_the_seed(office):
    await office.draft(rate_per_s=50, limit_per_buyer=2, standby=False)
    answer = await office.post("/v1/admin/sales/drop/publish", {"reason": "it is time"})
    assert answer.status_code == 200, answer.text
    sale = answer.json()
    assert sale["state"] == "scheduled" and len(sale["seed_hash"]) == 64
    told = await redis_sale(office)
    assert told["seed_hash"] == sale["seed_hash"] and len(told["seed"]) == 64
    assert (told["limit"], told["rate_milli"], told["standby"], told["paused"], told["closed"]) == (
        "2",
        "50000",
        "0",
        "0",
        "0",
    )
    assert json.loads(told["doc"])["items"] == [
        {"sku": "A", "title": "Thing", "price_minor": 500, "currency": "EUR", "units": 10}
    ]
    assert await stock(office) == 10
    assert json.loads(await office.redis("HGET", "fairdrop:sales", "drop")) == {
        "version": sale["version"],
        "ended": False,
    }
    events = (await office.get("/v1/admin/events")).json()["data"]
    assert [(e["type"], e["data"]["sale"]) for e in events] == [("sale.published", "drop")]
    twice = await office.post("/v1/admin/sales/drop/publish")
    assert (twice.status_code, twice.json()["code"]) == (409, "wrong_state")
    assert told["seed"] not in json.dumps(sale)


async def test_a_publish_that_redis_did_not_hear_of_is_finished_by_itself(office, valkey):
    await office.draft()
    valkey.kill()
    await until(lambda: not office.desk.link.connected)
    answer = await office.post("/v1/admin/sales/drop/publish")
    assert answer.status_code == 202, answer.text
    valkey.start()
    await office.sql("UPDATE sale SET published_at = now() - interval '1 minute'")
    await until(lambda: office.desk.link.connected)
    assert await until(lambda: redis_sale(office))
    assert await stock(office) == 10


async def test_a_sale_that_would_be_over_is_not_published(office):
    await office.draft(line_opens_at=iso(-100), opens_at=iso(-90), closes_at=iso(-10))
    answer = await office.post("/v1/admin/sales/drop/publish")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"path": "closes_at", "code": "in_the_past"}]


async def test_pause_resume_rate_message_and_close_are_in_redis_when_they_are_answered(office):
    await office.open_sale()
    for path, body, expected in (
        ("pause", None, {"paused": "1", "state_word": "paused"}),
        ("rate", {"rate_per_s": 2.5}, {"rate_milli": "2500", "burst": "2", "paused": "1"}),
        ("resume", {"reason": "go on"}, {"paused": "0"}),
        ("message", {"text": "Almost there"}, {"message": "Almost there"}),
        ("message", {"text": None}, {"message": ""}),
        ("rate", {"rate_per_s": None}, {"rate_milli": "-1"}),
        ("close", None, {"closed": "1", "state_word": "closed"}),
    ):
        before = (await redis_sale(office))["version"]
        answer = await office.post(f"/v1/admin/sales/drop/{path}", body)
        assert answer.status_code == 200, answer.text
        told = await redis_sale(office)
        assert expected.items() <= told.items(), path
        assert int(told["version"]) == answer.json()["version"] > int(before)
    waiting = await office.sql("SELECT count(*) FROM outbox WHERE state = 'due'")
    assert waiting[0][0] == 0
    types = [e["type"] for e in (await office.get("/v1/admin/events")).json()["data"]]
    assert types == ["sale.published", "sale.paused", "sale.resumed", "sale.closed"]


@pytest.mark.parametrize("call", ["pause", "resume", "close", "rate", "message", "top-up"])
async def test_what_a_state_does_not_allow_is_refused_and_changes_nothing(office, call):
    body = {"rate": {"rate_per_s": 1}, "message": {"text": "x"}, "top-up": {"sku": "A", "units": 1}}.get(call)
    await office.draft()
    refused = await office.post(f"/v1/admin/sales/drop/{call}", body)
    assert (refused.status_code, refused.json()["code"]) == (409, "not_published")
    await office.post("/v1/admin/sales/drop/publish")
    if call == "resume":
        refused = await office.post("/v1/admin/sales/drop/resume")
        assert (refused.status_code, refused.json()["code"]) == (409, "wrong_state")
    if call == "pause":
        await office.post("/v1/admin/sales/drop/pause")
        refused = await office.post("/v1/admin/sales/drop/pause")
        assert (refused.status_code, refused.json()["code"]) == (409, "wrong_state")
    await office.post("/v1/admin/sales/drop/close")
    before = await redis_sale(office)
    refused = await office.post(f"/v1/admin/sales/drop/{call}", body)
    assert (refused.status_code, refused.json()["code"]) == (410, "sale_closed")
    assert await redis_sale(office) == before
    missing = await office.post(f"/v1/admin/sales/none/{call}", body)
    assert (missing.status_code, missing.json()["code"]) == (404, "no_such_sale")


async def test_a_switch_without_redis_is_committed_and_left_to_the_relay(office, valkey):
    await office.open_sale()
    valkey.kill()
    await until(lambda: not office.desk.link.connected)
    answer = await office.post("/v1/admin/sales/drop/pause")
    assert (answer.status_code, answer.json()["state"]) == (202, "paused")
    due = await office.sql("SELECT kind, payload->'changes'->>'paused' FROM outbox WHERE state = 'due'")
    assert [tuple(row) for row in due] == [("switch", "1")]


async def test_a_dry_run_says_what_would_happen_and_changes_nothing(office):
    tried = await office.post("/v1/admin/sales", document(), dry_run=True)
    assert tried.status_code == 201 and tried.headers["dry-run"] == "true"
    assert (await office.get("/v1/admin/sales/drop")).status_code == 404
    await office.publish()
    before, journal = await redis_sale(office), (await office.get("/v1/admin/journal")).json()
    for path, body in (
        ("pause", None), ("close", None), ("rate", {"rate_per_s": 3}), ("top-up", {"sku": "A", "units": 5}),
        ("top-up", {"sku": "A", "units": -5}),
    ):  # fmt: skip
        tried = await office.post(f"/v1/admin/sales/drop/{path}", body, dry_run=True)
        assert tried.status_code == 200, tried.text
    assert (await office.change("drop", {"title": "Other"})).status_code == 200
    tried = await office.patch("/v1/admin/sales/drop", {"title": "Third"}, etag="*", dry_run=True)
    assert tried.json()["title"] == "Third"
    assert (await office.get("/v1/admin/sales/drop")).json()["title"] == "Other"
    await office.change("drop", {"title": "Drop"})
    after = await redis_sale(office)
    assert {k: v for k, v in after.items() if k not in ("version", "last_ms", "tokens_micro")} == {
        k: v for k, v in before.items() if k not in ("version", "last_ms", "tokens_micro")
    }
    assert await stock(office) == 10
    assert len((await office.get("/v1/admin/journal")).json()["data"]) == len(journal["data"]) + 2


async def test_pages_of_sales_are_signed_and_complete(office):
    for at in range(5):
        await office.draft(f"drop-{at}")
    seen, cursor = [], None
    while True:
        page = (await office.get("/v1/admin/sales", limit=2, **({"cursor": cursor} if cursor else {}))).json()
        seen += [one["id"] for one in page["data"]]
        if (cursor := page["next_cursor"]) is None:
            break
        for at in range(0, len(cursor), 7):
            bent = cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1 :]
            refused = await office.get("/v1/admin/sales", cursor=bent)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
        other_list = await office.get("/v1/admin/keys", cursor=cursor)
        assert other_list.status_code == 422
    assert seen == [f"drop-{at}" for at in (4, 3, 2, 1, 0)]
    for limit in (0, 1001, "x"):
        assert (await office.get("/v1/admin/sales", limit=limit)).status_code == 422


@pytest.mark.parametrize(
    "path", ["/v1/admin/sales/Bad%20Id", "/v1/admin/sales/" + "x" * 60, "/v1/admin/sales/%00"]
)
async def test_a_hostile_path_is_no_sale(office, path):
    answer = await office.get(path)
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_the_api_document_is_served_without_anything_from_elsewhere(office):
    spec = (await office.get("/openapi.json", key=None)).json()
    assert "/v1/admin/sales/{sale}/publish" in spec["paths"]
    docs = await office.get("/docs", key=None)
    assert docs.status_code == 200
    assert "http://" not in docs.text and "https://" not in docs.text


async def test_resume_lets_an_item_go_on_that_was_stopped_for_lack_of_stock(office: Office) -> None:
    """Postgres had no unit for a claim, so the worker stopped the item: a person looks, then says go on."""
    sku = (await office.open_sale())["items"][0]["sku"]
    async with office.desk.engine.begin() as conn:
        assert await confirming.pause_item(conn, "drop", sku, 1)
    assert (await office.get("/v1/admin/sales/drop")).json()["items"][0]["paused"]
    answer = await office.post("/v1/admin/sales/drop/resume")
    assert answer.status_code == 200, answer.text
    assert not answer.json()["items"][0]["paused"]
    told = await office.sql("SELECT payload FROM outbox WHERE kind = 'switch' AND state = 'due' ORDER BY id")
    assert [row.payload for row in told] == [
        {"sku": sku, "item_paused": "1"},
        {"sku": sku, "item_paused": "0"},
    ]
    again = await office.post("/v1/admin/sales/drop/resume")
    assert (again.status_code, again.json()["code"]) == (409, "wrong_state")


WORDS = {
    "scheduled": {"line_opens_at": 60, "opens_at": 120},
    "line_open": {"line_opens_at": -60, "opens_at": 120},
    "open": {"line_opens_at": -60, "opens_at": -30},
    "sold_out": {"line_opens_at": -60, "opens_at": -30},
    "paused": {"line_opens_at": -60, "opens_at": -30},
    "closed": {"line_opens_at": -60, "opens_at": -30},
}


@pytest.mark.parametrize("word", WORDS)
async def test_a_sale_and_the_list_say_the_word_of_the_live_document(office, word):
    await office.draft("draft")
    await office.publish(**timed(WORDS[word]), draw_freeze_s=0)
    if word == "sold_out":  # as the worker notes it
        await office.redis("HSET", "{sale:drop}:stock", "A", 0)
        await office.sql("UPDATE sale SET sold_out_at = now() WHERE id = 'drop'")
    elif word in ("paused", "closed"):
        changed = await office.post(f"/v1/admin/sales/drop/{'pause' if word == 'paused' else 'close'}")
        assert changed.json()["state"] == word
    assert (await office.get("/v1/admin/sales/drop/live")).json()["state"] == word
    assert (await office.get("/v1/admin/sales/drop")).json()["state"] == word
    listed = (await office.get("/v1/admin/sales")).json()["data"]
    assert {one["id"]: one["state"] for one in listed} == {"draft": "draft", "drop": word}
    for asked in WORDS:
        found = (await office.get("/v1/admin/sales", state=asked)).json()["data"]
        assert [one["id"] for one in found] == (["drop"] if asked == word else [])


async def test_a_captcha_that_nobody_could_have_checked_is_refused_at_publish(office, monkeypatch):
    await office.draft(**{"pass": "required", "challenge": "captcha"})
    for dry_run in (True, False):
        refused = await office.post("/v1/admin/sales/drop/publish", dry_run=dry_run)
        assert (refused.status_code, refused.json()["code"]) == (422, "no_captcha")
        assert refused.json()["errors"] == [{"path": "challenge", "code": "no_captcha"}]
        assert "FAIRDROP_CAPTCHA_VERIFY_URL" in refused.json()["detail"]
    assert (await office.get("/v1/admin/sales/drop")).json()["state"] == "draft"
    monkeypatch.setattr(office.desk.settings, "captcha_verify_url", "https://captcha.example/siteverify")
    assert (await office.post("/v1/admin/sales/drop/publish")).status_code == 200


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"limit_per_buyer": 0}, "limit_per_buyer: input should be greater than or equal to 1"),
        ({"opens_at": -1, "line_opens_at": 5}, "opens_at: comes before the line opens"),
        ({"closes_at": "2027-01-01T10:00:00"}, "closes_at: has no offset; give it one, or the document a time_zone"),
        ({"colour": "red"}, "colour: is no field that is known here"),
        ({"title": "a\u0000"}, "title: control characters are not allowed"),
        ({"challenge": "pow"}, "challenge: is asked for with the pass; set pass to required"),
    ],
)  # fmt: skip
async def test_a_mistake_in_a_sale_is_told_in_words(office, changed, says):
    refused = await office.post("/v1/admin/sales", document(**timed(changed)))
    assert (refused.status_code, refused.json()["detail"]) == (422, says)
