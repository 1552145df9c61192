"""SMS through Tencent Cloud (SendSms of 2021-01-11), signed TC3-HMAC-SHA256.

Sources: cloud.tencent.com/document/api/382/52072 (signature v3), /55981 (SendSms), /59177 and /52075 (error codes).
Limits: 3,000 requests a second; a number gets what the console's frequency limits allow (by default one of the same
content in 30 s: tencentcloud.com/document/product/382/13303). Reports are not signed: see reports.py. There is no
idempotency key: `SessionContext` only comes back in receipts. So an unknown result is never repeated.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

import httpx
import msgspec

from app.breaker import Result
from app.providers import reports, wire
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import HookForged
from app.providers.sms import Sent, SmsStatus, Text
from app.providers.templates import Templates

API_URL: Final = "https://sms.tencentcloudapi.com"
ALGORITHM: Final = "TC3-HMAC-SHA256"
SERVICE: Final = "sms"
CONTENT_TYPE: Final = "application/json; charset=utf-8"
SESSION_MAX = 512  # bytes of SessionContext

# Keys, rights, money, the account's own limits: nothing was sent, another supplier can, and this one is not well.
_CHANNEL = (
    "AuthFailure", "UnauthorizedOperation", "FailedOperation.InsufficientBalanceInSmsPackage", "IpNotInWhitelist",
    "IpInBlacklist", "InvalidParameterValue.SdkAppIdNotExist", "FailedOperation.JsonParseFail", "NoSuchVersion",
    "InvalidAction", "UnsupportedOperation.UnsupportedRegion", "FailedOperation.ForbidAddMarketingTemplates",
    "LimitExceeded.AppDailyLimit", "LimitExceeded.AppGlobalDailyLimit", "LimitExceeded.DailyLimit",
    "LimitExceeded.AppCountryOrRegionDailyLimit", "LimitExceeded.AppMainlandChinaDailyLimit",
    "FailedOperation.FailResolvePacket", "InternalError.SigVerificationFail", "InternalError.SigFieldMissing",
    "InternalError.RestApiInterfaceNotExist",
)  # fmt: skip
# Too many to this number: not sent, and nobody is ill. Later it may go, or by another supplier.
_LIMITED = (
    "LimitExceeded.PhoneNumberThirtySecondLimit", "LimitExceeded.PhoneNumberOneHourLimit",
    "LimitExceeded.PhoneNumberDailyLimit", "LimitExceeded.PhoneNumberSameContentDailyLimit",
    "LimitExceeded.DeliveryFrequencyLimit",
)  # fmt: skip
LIMITED_MS = 60_000
# About this number or this text, wherever it is sent from.
_FINAL = (
    "InvalidParameterValue.IncorrectPhoneNumber", "FailedOperation.PhoneNumberInBlacklist",
    "FailedOperation.ContainSensitiveWord",
)  # fmt: skip


class _Status(msgspec.Struct, rename="pascal", kw_only=True):
    code: str
    serial_no: str = ""


class _Error(msgspec.Struct, rename="pascal", kw_only=True):
    code: str


class _Response(msgspec.Struct, rename="pascal", kw_only=True):
    send_status_set: list[_Status] = []
    error: _Error | None = None


class _Reply(msgspec.Struct, rename="pascal"):
    response: _Response


def authorization(secret_id: str, secret_key: str, host: str, body: bytes, at_s: int) -> str:
    """The Authorization header of a POST to `/` with `content-type` and `host` signed."""
    day = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d")
    scope = f"{day}/{SERVICE}/tc3_request"
    digest = hashlib.sha256(body).hexdigest()
    request = f"POST\n/\n\ncontent-type:{CONTENT_TYPE}\nhost:{host}\n\ncontent-type;host\n{digest}"
    message = f"{ALGORITHM}\n{at_s}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"TC3{secret_key}".encode()
    for part in (day, SERVICE, "tc3_request", message):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return (
        f"{ALGORITHM} Credential={secret_id}/{scope}, SignedHeaders=content-type;host, Signature={key.hex()}"
    )


class _Report(msgspec.Struct):
    """One state of the call-back."""

    sid: str
    report_status: str
    errmsg: str = ""


class TencentSms:
    """SMS through Tencent Cloud."""

    name = "tencent-sms"
    report_answer = b'{"result":0,"errmsg":"OK"}'

    def __init__(
        self,
        *,
        secret_id: str,
        secret_key: str,
        app_id: str,
        signature: str,
        templates: Templates,
        deadline_s: float,
        connections_max: int,
        region: str = "ap-guangzhou",
        url: str = API_URL,
        report_token: str = "",
    ) -> None:
        """app_id: SmsSdkAppId. signature: the approved 签名 that heads every text. report_token: see reports.py."""
        self.report_token = report_token
        self._secret_id, self._secret_key, self._app_id = secret_id, secret_key, app_id
        self._signature, self._templates, self._region = signature, templates, region
        self._host = urlsplit(url).netloc
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, text: Text) -> Answer[Sent]:
        found = self._templates.of(text)
        if isinstance(found, Refused):
            return found
        code, values = found
        body = msgspec.json.encode(
            {
                "PhoneNumberSet": [text.phone],
                "SmsSdkAppId": self._app_id,
                "SignName": self._signature,
                "TemplateId": code,
                "TemplateParamSet": list(values.values()),
                "SessionContext": text.id[:SESSION_MAX],
            }
        )
        at_s = int(time.time())
        headers = {
            "host": self._host,
            "content-type": CONTENT_TYPE,
            "x-tc-action": "SendSms",
            "x-tc-version": "2021-01-11",
            "x-tc-timestamp": str(at_s),
            "x-tc-region": self._region,
            "authorization": authorization(self._secret_id, self._secret_key, self._host, body, at_s),
        }
        try:
            reply = await self._client.post("/", content=body, headers=headers)
        except httpx.HTTPError as error:
            return wire.failed(error)
        return _meaning(reply)

    def read_reports(self, raw_body: bytes) -> Sequence[SmsStatus] | HookForged:
        """The JSON array of the status call-back; what it says of the phone number is not read."""
        found = reports.rows(raw_body, _Report)
        if isinstance(found, HookForged):
            return found
        arrived = {"SUCCESS": True, "FAIL": False}
        return [
            SmsStatus(
                event_id=f"{one.sid}:{one.report_status}", provider_ref=one.sid, status=one.report_status,
                arrived=arrived.get(one.report_status),
                code=f"tencent_{one.errmsg}"[: reports.CODE_MAX] if one.report_status == "FAIL" else None,
            )
            for one in found
        ]  # fmt: skip


def _meaning(reply: httpx.Response) -> Answer[Sent]:
    """Everything comes with status 200: an Error for the request, or a Code for the number."""
    try:
        response = msgspec.json.decode(reply.content, type=_Reply).response
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return MaybeDone("malformed_answer" if reply.status_code == 200 else f"http_{reply.status_code}")
    if response.error is not None:
        code = response.error.code
    elif len(response.send_status_set) == 1:
        code = response.send_status_set[0].code
        if code == "Ok":
            return Done(Sent(response.send_status_set[0].serial_no or None))
    else:
        return MaybeDone("malformed_answer")
    if code.startswith("RequestLimitExceeded"):
        return NotDone(code, 1_000, Result.IGNORED)  # of requests a second: the next second has its own
    if code in _LIMITED:
        return NotDone(code, LIMITED_MS, Result.IGNORED)
    if (
        code.startswith("InternalError") and code not in _CHANNEL
    ):  # also InternalError.Timeout: handed on, no answer
        return MaybeDone(code)
    if code.startswith(_CHANNEL):
        return NotDone(code)
    return Refused(code, other_may=not code.startswith(_FINAL))
