"""SMS through Twilio (Programmable Messaging), Basic auth; its status call-backs, signed X-Twilio-Signature.

Sources: twilio.com/docs/messaging/api/message-resource, /docs/api/errors, /docs/usage/security#validating-requests,
/docs/messaging/guides/outbound-message-status-in-status-callbacks (no call-back is sent again).
There is no idempotency key, so an unknown result is never repeated. A text has at most 1,600 characters.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

import httpx
import msgspec

from app.breaker import Result
from app.errors import CannotStart
from app.providers import signing, wire
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import HookForged
from app.providers.sms import Sent, SmsStatus, Text

API_URL: Final = "https://api.twilio.com"
BODY_MAX = 1_600

# twilio.com/docs/api/errors: about this number or this text, wherever it is sent from.
_FINAL = frozenset({21211, 21214, 21217, 21610, 21614, 21617})
# Our sender, account or queue: nothing was sent, another supplier can, and this one is not well.
_CHANNEL = frozenset(
    {20003, 20005, 20006, 21212, 21603, 21606, 21607, 21611, 21612, 21659, 21703, 30001, 30002}
)


# MessageStatus: the phone has it (true), never will (false); others are on the way.
_ARRIVED = {"delivered": True, "read": True, "undelivered": False, "failed": False, "canceled": False}


class _Message(msgspec.Struct, kw_only=True):
    sid: str
    status: str = ""


class _Error(msgspec.Struct, kw_only=True):
    code: int = 0


class Twilio:
    """SMS through Twilio."""

    name = "twilio"

    def __init__(
        self,
        *,
        account_sid: str,
        auth_token: str,
        sender: str,
        deadline_s: float,
        connections_max: int,
        status_url: str = "",
        url: str = API_URL,
    ) -> None:
        """sender: a number (+…), a sender name, or a messaging service (MG…). status_url: where call-backs reach us,
        exactly as Twilio sees it; "" = none are asked for."""
        if not account_sid or not auth_token or not sender:
            raise CannotStart("FAIRDROP_TWILIO_ACCOUNT_SID, …_AUTH_TOKEN and …_SENDER are needed")
        self._token = auth_token.encode()
        self._path = f"/2010-04-01/Accounts/{quote(account_sid, safe='')}/Messages.json"
        self._sid, self._sender, self._status_url = account_sid, sender, status_url
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)
        self._client.auth = httpx.BasicAuth(account_sid, auth_token)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, text: Text) -> Answer[Sent]:
        if len(text.body) > BODY_MAX:
            return Refused("text_too_long")
        data = {"To": text.phone, "Body": text.body}
        data["MessagingServiceSid" if self._sender.startswith("MG") else "From"] = self._sender
        if self._status_url:
            data["StatusCallback"] = self._status_url
        try:
            reply = await self._client.post(self._path, data=data)
        except httpx.HTTPError as error:
            return wire.failed(error)
        return _meaning(reply)

    def read_status(self, headers: Mapping[str, str], raw_body: bytes) -> SmsStatus | HookForged:
        """Verify a status call-back. It has no time of its own, so a replay is an old event_id, not a forgery."""
        fields = signing.form(raw_body)
        if fields is None or not self._status_url:
            return HookForged("malformed" if self._status_url else "not_asked_for")
        given = headers.get("x-twilio-signature", "")
        if not given.isascii() or not hmac.compare_digest(
            status_signature(self._token, self._status_url, fields), given
        ):
            return HookForged("signature_wrong" if given else "signature_missing")
        sid, status = fields.get("MessageSid"), fields.get("MessageStatus")
        if not sid or not status or fields.get("AccountSid") != self._sid:
            return HookForged("malformed" if not sid or not status else "merchant_wrong")
        code = fields.get("ErrorCode")
        return SmsStatus(
            event_id=f"{sid}:{status}",
            provider_ref=sid,
            status=status,
            arrived=_ARRIVED.get(status),
            code=f"twilio_{code}" if code else None,
        )


def status_signature(token: bytes, url: str, fields: Mapping[str, str]) -> str:
    """HMAC-SHA1 over the URL and the sorted fields, each name right before its value, Base64."""
    message = url + "".join(name + fields[name] for name in sorted(fields))
    return base64.b64encode(hmac.new(token, message.encode(), hashlib.sha1).digest()).decode()


def _meaning(reply: httpx.Response) -> Answer[Sent]:
    status = reply.status_code
    if status in (200, 201):
        try:
            found = msgspec.json.decode(reply.content, type=_Message)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return MaybeDone("malformed_answer")
        return Done(Sent(found.sid))
    number = 0
    try:
        number = msgspec.json.decode(reply.content, type=_Error).code
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass  # a proxy's page: the status alone has to do
    code = f"twilio_{number}" if number else f"http_{status}"
    if status == 429:
        return NotDone(code, wire.retry_after_ms(reply), Result.IGNORED)
    if 400 <= status < 500:
        if status in (401, 403, 404) or number in _CHANNEL:
            return NotDone(code)
        return Refused(code, other_may=number not in _FINAL)
    return MaybeDone(code)
