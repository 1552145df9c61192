"""The same POST again has one effect, whoever repeats it and whenever; and nothing is done halfway for good."""

from __future__ import annotations

import asyncio

from app.errors import Unknown
from app.settings import Settings
from tests.office.conftest import Office, document, open_office, stock


async def test_a_post_without_a_key_or_with_a_bad_one_is_refused(office: Office) -> None:
    headers = {"Authorization": f"Bearer {office.desk.settings.operator_key.get_secret_value()}"}
    answer = await office.http.post("/v1/admin/sales", json=document(), headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"path": "header.Idempotency-Key", "code": "missing"}]
    for key in ("", "a b", "x" * 129, "ü"):
        answer = await office.http.post(
            "/v1/admin/sales", json=document(), headers={**headers, "Idempotency-Key": key.encode("latin-1")}
        )
        assert answer.status_code == 422, key


async def test_the_same_key_is_answered_as_the_first_time(office: Office) -> None:
    doc = document()
    first = await office.post("/v1/admin/sales", doc, idem="k1")
    shuffled = dict(reversed(list(doc.items())))
    again = await office.post("/v1/admin/sales", shuffled, idem="k1")
    assert (again.status_code, again.json(), again.headers["etag"]) == (
        201,
        first.json(),
        first.headers["etag"],
    )
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    other = await office.post("/v1/admin/sales", {**doc, "title": "Other"}, idem="k1")
    assert (other.status_code, other.json()["code"]) == (409, "key_reused")
    elsewhere = await office.post("/v1/admin/sales/drop/publish", idem="k1")
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (409, "key_reused")
    assert len((await office.get("/v1/admin/journal")).json()["data"]) == 1


async def test_a_secret_is_answered_again_and_kept_sealed(office: Office) -> None:
    first = await office.post("/v1/admin/keys", {"name": "Mei", "role": "viewer"}, idem="k1")
    again = await office.post("/v1/admin/keys", {"name": "Mei", "role": "viewer"}, idem="k1")
    assert first.json() == again.json() and again.json()["key"].startswith("fdk_")
    assert len((await office.get("/v1/admin/keys")).json()["data"]) == 2


async def test_a_refusal_is_not_kept_so_the_key_may_be_used_when_it_holds(office: Office) -> None:
    await office.draft()
    assert (await office.post("/v1/admin/sales/drop/pause", idem="k1")).status_code == 409
    await office.post("/v1/admin/sales/drop/publish")
    assert (await office.post("/v1/admin/sales/drop/pause", idem="k1")).status_code == 200


async def test_keys_of_two_operators_do_not_meet(office: Office) -> None:
    other = await office.key_of("operator")
    assert (await office.post("/v1/admin/sales", document("a"), idem="k1")).status_code == 201
    assert (await office.post("/v1/admin/sales", document("b"), idem="k1", key=other)).status_code == 201


async def test_a_dry_run_leaves_the_key_free(office: Office) -> None:
    assert (await office.post("/v1/admin/sales", document(), idem="k1", dry_run=True)).status_code == 201
    assert (await office.post("/v1/admin/sales", document("other"), idem="k1")).status_code == 201


async def test_fifty_at_once_from_two_offices_have_one_effect(office: Office, settings: Settings) -> None:
    await office.publish()
    second = await open_office(settings)
    try:
        body = {"sku": "A", "units": 7}
        answers = await asyncio.gather(
            *(
                one.post("/v1/admin/sales/drop/top-up", body, idem="race")
                for one in (office, second)
                for _ in range(25)
            )
        )
    finally:
        await second.close()
    assert {answer.status_code for answer in answers} == {200}
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert await stock(office) == 17
    assert (await office.get("/v1/admin/sales/drop")).json()["items"][0]["units"] == 17


async def test_different_bodies_at_once_under_one_key_have_one_effect(office: Office) -> None:
    await office.publish()
    answers = await asyncio.gather(
        *(
            office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": n}, idem="race")
            for n in range(1, 9)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    added = (await office.get("/v1/admin/sales/drop")).json()["items"][0]["units"] - 10
    assert await stock(office) == 10 + added


async def test_more_requests_than_connections_do_not_lock_each_other_out(office: Office) -> None:
    await office.publish()
    answers = await asyncio.gather(
        *(office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": 1}) for _ in range(16))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert await stock(office) == 26


async def test_a_lost_answer_of_redis_is_repeated_under_the_same_key_with_one_effect(
    office: Office, monkeypatch
) -> None:
    """The take happened, the office did not hear of it (as if it had died): the same request goes on from there."""
    await office.publish()
    real, lost = office.desk.scripts.stock_add, []

    async def loses_the_answer(**given):
        answer = await real(**given)
        if not lost:
            lost.append(answer)
            raise Unknown("the connection was lost")
        return answer

    monkeypatch.setattr(office.desk.scripts, "stock_add", loses_the_answer)
    body = {"sku": "A", "units": -4}
    first = await office.post("/v1/admin/sales/drop/top-up", body, idem="take")
    assert first.status_code == 503 and first.headers["retry-after"]
    assert await stock(office) == 6
    assert (await office.get("/v1/admin/sales/drop")).json()["items"][0]["units"] == 10
    reused = await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -3}, idem="take")
    assert (reused.status_code, reused.json()["code"]) == (409, "key_reused")
    again = await office.post("/v1/admin/sales/drop/top-up", body, idem="take")
    assert again.status_code == 200, again.text
    assert (await stock(office), again.json()["items"][0]["units"]) == (6, 6)
    assert (await office.post("/v1/admin/sales/drop/top-up", body, idem="take")).json() == again.json()
    assert await stock(office) == 6


async def test_keys_are_forgotten_after_seven_days(office: Office) -> None:
    await office.post("/v1/admin/sales", document("a"), idem="k1")
    await office.sql("UPDATE idempotency SET created_at = now() - interval '8 days'")
    assert (await office.post("/v1/admin/sales", document("b"), idem="k1")).status_code == 201
