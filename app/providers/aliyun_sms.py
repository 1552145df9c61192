"""SMS through Aliyun (Short Message Service, SendSms of 2017-05-25), signed ACS3-HMAC-SHA256.

Sources: help.aliyun.com/zh/sdk/product-overview/v3-request-structure-and-signature;
help.aliyun.com/zh/sms/developer-reference/api-error-codes; limits: 50 notices a day for one number, signature and
template, 1 a minute, 5 an hour, 10 a day of verification codes (developer.aliyun.com/ask/218440, /ask/474934).
Reports (help.aliyun.com/zh/sms/developer-reference/smsreport-2) are not signed: see reports.py.
There is no idempotency key: `OutId` only comes back in receipts. So an unknown result is never repeated.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from app.breaker import Result
from app.providers import reports, wire
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import HookForged
from app.providers.sms import Sent, SmsStatus, Text
from app.providers.templates import Templates

API_URL: Final = "https://dysmsapi.aliyuncs.com"
ALGORITHM: Final = "ACS3-HMAC-SHA256"
OUT_ID_MAX = 256

# The account or the channel as a whole: nothing was sent, another supplier can, and this one is not well.
_CHANNEL = frozenset(
    {
        "isp.RAM_PERMISSION_DENY",
        "isv.ACCOUNT_ABNORMAL",
        "isv.ACCOUNT_NOT_EXISTS",
        "isv.AMOUNT_NOT_ENOUGH",
        "isv.DAY_LIMIT_CONTROL",
        "isv.DENY_IP_RANGE",
        "isv.MONTH_LIMIT_CONTROL",
        "isv.OUT_OF_SERVICE",
        "isv.PRODUCT_UNSUBSCRIBE",
        "isv.PRODUCT_UN_SUBSCRIPT",
        "isv.RAM_PERMISSION_DENY",
        "isv.SECURITY_FROZEN_ACCOUNT",
    }
)
# About this number or this text, wherever it is sent from.
_FINAL = frozenset(["isv.MOBILE_NUMBER_ILLEGAL", "isv.MOBILE_COUNT_OVER_LIMIT", "isv.SMS_CONTENT_ILLEGAL"])
_UNKNOWN = frozenset({"isp.SYSTEM_ERROR"})
# Too many to this number, or of this text: not sent, and nobody is ill. In a minute it may go, or by another supplier.
_LIMITED = "isv.BUSINESS_LIMIT_CONTROL"
LIMITED_MS = 60_000


class _Reply(msgspec.Struct, rename="pascal", kw_only=True):
    code: str
    biz_id: str | None = None


class _Report(msgspec.Struct):
    """One state of SmsReport."""

    success: bool
    biz_id: str
    err_code: str = ""


def canonical_query(params: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='~')}={quote(params[name], safe='~')}" for name in sorted(params))


def authorization(
    key_id: str, key_secret: str, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
) -> str:
    """The Authorization header. headers: names in lower case, every one of them is signed."""
    names = sorted(headers)
    signed = ";".join(names)
    lines = "".join(f"{name}:{headers[name].strip()}\n" for name in names)
    digest = hashlib.sha256(body).hexdigest()
    request = f"{method}\n{path}\n{query}\n{lines}\n{signed}\n{digest}"
    message = f"{ALGORITHM}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.new(key_secret.encode(), message.encode(), hashlib.sha256).hexdigest()
    return f"{ALGORITHM} Credential={key_id},SignedHeaders={signed},Signature={signature}"


class AliyunSms:
    """SMS through Aliyun."""

    name = "aliyun-sms"
    report_answer = b'{"code":0,"msg":"OK"}'

    def __init__(
        self,
        *,
        key_id: str,
        key_secret: str,
        signature: str,
        templates: Templates,
        deadline_s: float,
        connections_max: int,
        url: str = API_URL,
        report_token: str = "",
    ) -> None:
        """signature: the approved 签名 that heads every text. report_token: see reports.py."""
        self.report_token = report_token
        self._key_id, self._key_secret = key_id, key_secret
        self._signature, self._templates = signature, templates
        self._host = urlsplit(url).netloc
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, text: Text) -> Answer[Sent]:
        found = self._templates.of(text)
        if isinstance(found, Refused):
            return found
        code, values = found
        query = canonical_query(
            {
                "PhoneNumbers": _number(text.phone),
                "SignName": self._signature,
                "TemplateCode": code,
                "TemplateParam": msgspec.json.encode(values).decode(),
                "OutId": text.id[:OUT_ID_MAX],
            }
        )
        headers = {
            "host": self._host,
            "x-acs-action": "SendSms",
            "x-acs-version": "2017-05-25",
            "x-acs-date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "x-acs-signature-nonce": secrets.token_hex(16),
            "x-acs-content-sha256": hashlib.sha256(b"").hexdigest(),
        }
        headers["authorization"] = authorization(
            self._key_id, self._key_secret, "POST", "/", query, headers, b""
        )
        try:
            reply = await self._client.post(f"/?{query}", headers=headers)
        except httpx.HTTPError as error:
            return wire.failed(error)
        return _meaning(reply)

    def read_reports(self, raw_body: bytes) -> Sequence[SmsStatus] | HookForged:
        """SmsReport's JSON array; what it says of the phone number is not read."""
        found = reports.rows(raw_body, _Report)
        if isinstance(found, HookForged):
            return found
        return [
            SmsStatus(
                event_id=f"{one.biz_id}:{one.err_code}", provider_ref=one.biz_id, status=one.err_code,
                arrived=one.success, code=None if one.success else f"aliyun_{one.err_code}"[: reports.CODE_MAX],
            )
            for one in found
        ]  # fmt: skip


def _meaning(reply: httpx.Response) -> Answer[Sent]:
    """Business answers come with status 200 and a Code; the gateway's own with 4xx and 5xx."""
    try:
        found = msgspec.json.decode(reply.content, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return MaybeDone("malformed_answer" if reply.status_code == 200 else f"http_{reply.status_code}")
    code = found.code
    if reply.status_code == 200 and code == "OK":
        return Done(Sent(found.biz_id))
    if code.startswith("Throttling") or reply.status_code == 429:
        return NotDone(code, wire.retry_after_ms(reply), Result.IGNORED)
    if code == _LIMITED:
        return NotDone(code, LIMITED_MS, Result.IGNORED)
    if code in _UNKNOWN or reply.status_code >= 500:
        return MaybeDone(code)
    if code in _CHANNEL or reply.status_code in (
        400,
        401,
        403,
        404,
    ):  # keys, signature, rights: no call gets through
        return NotDone(code)
    return Refused(code, other_may=code not in _FINAL)


def _number(phone: str) -> str:
    """E.164 → Aliyun: mainland numbers bare, others with their country code and without the plus."""
    return (
        phone.removeprefix("+86") if phone.startswith("+86") and len(phone) == 14 else phone.removeprefix("+")
    )
