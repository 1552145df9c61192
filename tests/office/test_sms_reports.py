"""An SMS supplier's signed reports of what became of a text: once, never by a forger, and without the number."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.office.conftest import Office, open_office, settings_for, write_order
from tests.providers.standins.sms_apis import TwilioApi

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
