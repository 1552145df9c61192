"""Stand-ins for the SMS APIs of Aliyun, Tencent Cloud and Twilio: each checks its signature from the raw request.

Documentation: help.aliyun.com/zh/sdk/product-overview/v3-request-structure-and-signature (headers and query are signed,
the date is at most 15 minutes off, a nonce is used once); cloud.tencent.com/document/api/382/52072 and /55981 (the
timestamp is at most five minutes off); twilio.com/docs/messaging/api/message-resource and /usage/security.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.providers.standins import loopback


class AliyunApi:
    def __init__(self) -> None:
        self.key_id, self.key_secret = "LTAI5tStandIn", "aliyun-secret"
        self.sent: list[dict[str, str]] = []
        self.nonces: set[str] = set()
        self.calls: list[str] = []
        self.faults = loopback.Faults()
        self.next_code = "OK"
        self.url = "http://127.0.0.1:1"

    def app(self) -> Starlette:
        return loopback.routes({("POST", "/"): self._call}, self.faults, self.calls)

    def _call(self, request: Request, body: bytes) -> Response:
        why = self._refusal(request, body)
        if why is not None:
            return JSONResponse({"Code": why, "Message": why, "RequestId": "R"}, 400)
        code, self.next_code = self.next_code, "OK"
        if code != "OK":
            return JSONResponse({"Code": code, "Message": code, "RequestId": "R"})
        self.sent.append(dict(request.query_params) | dict(parse_qsl(body.decode())))
        return JSONResponse({"Code": "OK", "Message": "OK", "BizId": f"{len(self.sent)}^0", "RequestId": "R"})

    def _refusal(self, request: Request, body: bytes) -> str | None:
        found = re.fullmatch(
            r"ACS3-HMAC-SHA256 Credential=([^,]+),SignedHeaders=([^,]+),Signature=([0-9a-f]{64})",
            request.headers.get("authorization", ""),
        )
        if found is None:
            return "IncompleteSignature"
        names = found[2].split(";")
        must = {
            name for name in request.headers if name.startswith("x-acs-") or name in ("host", "content-type")
        }
        if found[1] != self.key_id:
            return "InvalidAccessKeyId.NotFound"
        if names != sorted(names) or not {"host", "x-acs-action"} <= set(names):
            return "IncompleteSignature"
        if must - {"content-type"} - set(names):
            return "IncompleteSignature"
        if request.headers["x-acs-content-sha256"] != hashlib.sha256(body).hexdigest():
            return "SignatureDoesNotMatch"
        sent = datetime.strptime(request.headers["x-acs-date"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        if abs((datetime.now(UTC) - sent).total_seconds()) > 900:
            return "InvalidTimeStamp.Expired"
        if request.headers["x-acs-signature-nonce"] in self.nonces:
            return "SignatureNonceUsed"
        self.nonces.add(request.headers["x-acs-signature-nonce"])
        pairs = sorted(parse_qsl(request.url.query, keep_blank_values=True))
        query = "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in pairs)
        lines = [request.method, request.url.path, query]
        lines += [f"{name}:{request.headers[name].strip()}" for name in names]
        lines += ["", ";".join(names), request.headers["x-acs-content-sha256"]]
        message = "ACS3-HMAC-SHA256\n" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
        expected = hmac.new(self.key_secret.encode(), message.encode(), hashlib.sha256).hexdigest()
        return None if expected == found[3] else "SignatureDoesNotMatch"


class TencentApi:
    def __init__(self) -> None:
        self.secret_id, self.secret_key = "AKIDStandIn", "tencent-secret"
        self.sent: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.faults = loopback.Faults()
        self.next_error = ""
        self.next_status = "Ok"
        self.url = "http://127.0.0.1:1"

    def app(self) -> Starlette:
        return loopback.routes({("POST", "/"): self._call}, self.faults, self.calls)

    def _call(self, request: Request, body: bytes) -> Response:
        error = self._refusal(request, body) or self.next_error
        self.next_error = ""
        if error:
            return JSONResponse({"Response": {"Error": {"Code": error, "Message": error}, "RequestId": "R"}})
        wanted = json.loads(body)
        status, self.next_status = self.next_status, "Ok"
        if status == "Ok":
            self.sent.append(wanted)
        one = {
            "SerialNo": f"5000:{len(self.sent)}" if status == "Ok" else "",
            "PhoneNumber": wanted["PhoneNumberSet"][0],
            "Fee": 1,
            "SessionContext": wanted.get("SessionContext", ""),
            "Code": status,
            "Message": status,
            "IsoCode": "CN",
        }
        return JSONResponse({"Response": {"SendStatusSet": [one], "RequestId": "R"}})

    def _refusal(self, request: Request, body: bytes) -> str | None:
        found = re.fullmatch(
            r"TC3-HMAC-SHA256 Credential=([^/]+)/([0-9-]{10})/sms/tc3_request, "
            r"SignedHeaders=content-type;host, Signature=([0-9a-f]{64})",
            request.headers.get("authorization", ""),
        )
        if found is None:
            return "AuthFailure.InvalidAuthorization"
        if found[1] != self.secret_id:
            return "AuthFailure.SecretIdNotFound"
        stamp = request.headers["x-tc-timestamp"]
        if abs(time.time() - int(stamp)) > 300:
            return "AuthFailure.SignatureExpire"
        if request.headers["x-tc-action"] != "SendSms" or request.headers["x-tc-version"] != "2021-01-11":
            return "InvalidAction"
        canonical = "\n".join(
            [
                "POST", "/", "",
                f"content-type:{request.headers['content-type']}", f"host:{request.headers['host']}", "",
                "content-type;host", hashlib.sha256(body).hexdigest(),
            ]
        )  # fmt: skip
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        message = f"TC3-HMAC-SHA256\n{stamp}\n{found[2]}/sms/tc3_request\n{digest}"
        key = ("TC3" + self.secret_key).encode()
        for part in (found[2], "sms", "tc3_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        expected = hmac.new(key, message.encode(), hashlib.sha256).hexdigest()
        return None if expected == found[3] else "AuthFailure.SignatureFailure"


class TwilioApi:
    def __init__(self) -> None:
        self.account_sid, self.auth_token = "AC" + "0" * 32, "twilio-token"
        self.sent: list[dict[str, str]] = []
        self.calls: list[str] = []
        self.faults = loopback.Faults()
        self.next_error: tuple[int, int] | None = None
        self.url = "http://127.0.0.1:1"

    def app(self) -> Starlette:
        path = f"/2010-04-01/Accounts/{self.account_sid}/Messages.json"
        return loopback.routes({("POST", path): self._call}, self.faults, self.calls)

    def _call(self, request: Request, body: bytes) -> Response:
        basic = base64.b64encode(f"{self.account_sid}:{self.auth_token}".encode()).decode()
        if request.headers.get("authorization") != f"Basic {basic}":
            return _twilio_error(401, 20003)
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            return _twilio_error(*error)
        form = dict(parse_qsl(body.decode(), strict_parsing=True))
        if not re.fullmatch(r"\+[1-9][0-9]{6,14}", form.get("To", "")):
            return _twilio_error(400, 21211)
        if len(form["Body"]) > 1_600:
            return _twilio_error(400, 21617)
        self.sent.append(form)
        return JSONResponse({"sid": "SM" + secrets.token_hex(16), "status": "queued"}, 201)

    def status_call(self, url: str, sid: str, status: str) -> tuple[dict[str, str], bytes]:
        """A status call-back as Twilio sends it."""
        fields = {
            "SmsSid": sid, "SmsStatus": status, "MessageStatus": status, "To": "+15558675310", "MessageSid": sid,
            "AccountSid": self.account_sid, "From": "+15017122661", "ApiVersion": "2010-04-01",
        }  # fmt: skip
        if status == "undelivered":
            fields["ErrorCode"] = "30003"
        message = url + "".join(name + fields[name] for name in sorted(fields))
        mac = hmac.new(self.auth_token.encode(), message.encode(), hashlib.sha1).digest()
        body = "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items()).encode()
        return {"x-twilio-signature": base64.b64encode(mac).decode()}, body


def _twilio_error(status: int, code: int) -> Response:
    more = f"https://www.twilio.com/docs/errors/{code}"
    return JSONResponse({"code": code, "message": "no", "more_info": more, "status": status}, status)
