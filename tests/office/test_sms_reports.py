"""An SMS supplier's reports of what became of a text: once, never by a forger, and without the number."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.office.conftest import Office, open_office, settings_for, write_order
from tests.providers.standins.sms_apis import TwilioApi
from tests.providers.test_registry import TEMPLATES

STATUS_URL = "https://shop.example/v1/hooks/twilio"
SID, OTHER = "SM" + "1" * 32, "SM" + "2" * 32
API = TwilioApi()


@pytest.fixture
async def office(redis_url: str, database_url: str) -> AsyncIterator[Office]:
    settings = settings_for(
        redis_url, database_url, sms_provider="twilio", sms_also="sandbox-sms", twilio_account_sid=API.account_sid,
        twilio_auth_token=API.auth_token, twilio_sender="+15017122661", twilio_status_url=STATUS_URL,
    )  # fmt: skip
    running = await open_office(settings)
    try:
        await running.open_sale()
        number = await write_order(running)
        for sid, template in ((SID, "reserved"), (OTHER, "paid")):
            await running.sql(
                "INSERT INTO sms (id, order_no, sale, template, state, provider, provider_ref, expires_at)"
                " VALUES (:id, :no, 'drop', :template, 'sent', 'twilio', :ref, now())",
                id=sid, no=number, template=template, ref=sid,
            )  # fmt: skip
        yield running
    finally:
        await running.close()


async def report(office: Office, sid: str, status: str, *, bent: bool = False) -> httpx.Response:
    headers, body = API.status_call(STATUS_URL, sid, status)
    headers = {**headers, "content-type": "application/x-www-form-urlencoded"}
    return await office.http.post("/v1/hooks/twilio", content=body + b"&x=1" * bent, headers=headers)


async def told(office: Office) -> dict[str, tuple[str, str | None, bool]]:
    rows = await office.sql("SELECT id, state, code, delivered_at IS NOT NULL FROM sms")
    return {row[0]: tuple(row)[1:] for row in rows}


async def test_a_text_that_arrived_and_one_that_never_will(office: Office) -> None:
    assert (await report(office, SID, "sent")).status_code == 204  # still on its way
    assert (await told(office))[SID] == ("sent", None, False)
    for _ in range(2):  # a copy
        assert (await report(office, SID, "delivered")).status_code == 204
        assert (await report(office, OTHER, "undelivered")).status_code == 204
    assert await told(office) == {SID: ("sent", None, True), OTHER: ("failed", "twilio_30003", False)}
    assert (
        await report(office, SID, "failed")
    ).status_code == 204  # after it arrived: a mistake, or out of order
    assert (await told(office))[SID] == ("sent", None, True)
    assert (await report(office, "SM" + "9" * 32, "delivered")).status_code == 204  # not ours


async def test_a_forged_report_changes_nothing_and_no_number_is_kept(office: Office) -> None:
    before = await told(office)
    forged = await report(office, SID, "delivered", bent=True)
    assert (forged.status_code, forged.json()["code"]) == (401, "hook_refused")
    assert (await office.http.post("/v1/hooks/twilio", content=b"{}")).status_code == 401
    assert (
        await office.http.post("/v1/hooks/sandbox-sms", content=b"{}")
    ).status_code == 404  # it sends no reports
    assert await told(office) == before
    await report(office, SID, "delivered")
    for table in ("sms", "webhook_inbox", "journal", "event"):
        assert "5558675310" not in repr(await office.sql(f"SELECT * FROM {table}"))


# Aliyun and Tencent Cloud do not sign their reports: a secret in the address vouches for them, or none are taken.

TOKEN = "a-token-that-nobody-guesses-1"
OUTSIDE = "13812345678"


def aliyun(ref: str, arrived: bool) -> dict[str, Any]:
    """As in help.aliyun.com/document_detail/101867.htm."""
    return {
        "phone_number": OUTSIDE, "send_time": "2026-11-11 00:00:00", "report_time": "2026-11-11 00:00:03",
        "success": arrived, "err_code": "DELIVERED" if arrived else "MK:0001", "err_msg": "x", "sms_size": "1",
        "biz_id": ref, "out_id": "67890",
    }  # fmt: skip


def tencent(ref: str, arrived: bool) -> dict[str, Any]:
    """As in cloud.tencent.com/document/product/382/5807."""
    return {
        "user_receive_time": "2026-11-11 00:00:03", "nationcode": "86", "mobile": OUTSIDE,
        "report_status": "SUCCESS" if arrived else "FAIL", "errmsg": "DELIVRD" if arrived else "MK:0001",
        "description": "x", "sid": ref,
    }  # fmt: skip


SPEAKS = {
    "aliyun-sms": (aliyun, {"code": 0, "msg": "OK"}),
    "tencent-sms": (tencent, {"result": 0, "errmsg": "OK"}),
}


async def chinese(redis_url: str, database_url: str, token: str) -> Office:
    settings = settings_for(
        redis_url, database_url, sms_provider="aliyun-sms", sms_also="tencent-sms", aliyun_sms_key_id="LTAI",
        aliyun_sms_key_secret="x", aliyun_sms_signature="s", aliyun_sms_templates=TEMPLATES,
        tencent_sms_secret_id="AKID", tencent_sms_secret_key="x", tencent_sms_app_id="1400", tencent_sms_signature="s",
        tencent_sms_templates=TEMPLATES, aliyun_sms_report_token=token, tencent_sms_report_token=token,
    )  # fmt: skip
    return await open_office(settings)


@pytest.mark.parametrize("name", list(SPEAKS))
async def test_unsigned_reports_are_taken_where_the_address_vouches_for_them(
    redis_url: str, database_url: str, name: str
) -> None:
    office = await chinese(redis_url, database_url, TOKEN)
    try:
        await office.open_sale()
        number = await write_order(office)
        for ref, template in (("r1", "reserved"), ("r2", "paid")):
            await office.sql(
                "INSERT INTO sms (id, order_no, sale, template, state, provider, provider_ref, expires_at)"
                " VALUES (:ref, :no, 'drop', :template, 'sent', :name, :ref, now())",
                ref=ref, no=number, template=template, name=name,
            )  # fmt: skip
        said, answer = SPEAKS[name]
        body = json.dumps([said("r1", True), said("r2", False), said("not ours", True)]).encode()
        before = await told(office)
        for path, content in (
            (f"/v1/hooks/{name}/{TOKEN[:-1]}2", body),
            (f"/v1/hooks/{name}", body),
            (f"/v1/hooks/{name}/{TOKEN}", b"[{}]"),
        ):
            refused = await office.http.post(path, content=content)
            assert refused.status_code in (401, 404), refused.text
            assert TOKEN not in refused.text
        assert await told(office) == before
        for _ in range(2):  # a copy
            taken = await office.http.post(f"/v1/hooks/{name}/{TOKEN}", content=body)
            assert (taken.status_code, taken.json()) == (200, answer), taken.text
        code = {"aliyun-sms": "aliyun_MK:0001", "tencent-sms": "tencent_MK:0001"}[name]
        assert await told(office) == {"r1": ("sent", None, True), "r2": ("failed", code, False)}
        for table in ("sms", "webhook_inbox", "journal", "event"):
            assert OUTSIDE not in repr(await office.sql(f"SELECT * FROM {table}"))
    finally:
        await office.close()


async def test_without_a_token_there_is_no_address_for_unsigned_reports(
    redis_url: str, database_url: str
) -> None:
    office = await chinese(redis_url, database_url, "")
    try:
        for name in (*SPEAKS, "sandbox-sms", "stripe"):
            refused = await office.http.post(f"/v1/hooks/{name}/{TOKEN}", content=b"[]")
            assert (refused.status_code, refused.json()["code"]) == (404, "no_such_provider")
    finally:
        await office.close()
