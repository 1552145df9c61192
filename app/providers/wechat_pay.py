"""Payments through WeChat Pay, API v3: Native (qr), H5 (redirect), JSAPI for WeChat's pages and mini programs (sdk).

Sources, all at pay.weixin.qq.com: docs/merchant/development/interface-rules/signature-generation.html (requests),
…/certificate-callback-decryption.html (AEAD_AES_256_GCM), docs/merchant/apis/platform-certificate/
api-v3-get-certificates/get.html, doc/v3/merchant/4012153196 and 4012154180 (the newer WeChat Pay public key),
4013070356 (query), 4013070360 (close), 4012556654 (bill),
docs/merchant/apis/h5-payment/payment-notice.html (call-back).

| our word | at WeChat Pay |
|---|---|
| attempt_id | `out_trade_no` (6 to 32 of [0-9A-Za-z_-|*@]), unique for the merchant for ever |
| provider_ref of a capture | `transaction_id` |
| refund_id | `out_refund_no` (≤ 64), unique for the merchant for ever |

- Requests are signed with the merchant's key. Answers and call-backs are signed with a platform certificate, which
  expires and is replaced, or with the WeChat Pay public key (`PUB_KEY_ID_…`), which does not expire but may be replaced
  in the console; `Wechatpay-Serial` names the one. While a merchant moves from one to the other both kinds arrive:
  whatever is configured is accepted, and of public keys several may be.
- Certificates are downloaded, authenticated by the APIv3 key, when a serial is unknown and twice a day, at most once in
  `LEARN_EVERY_S`. A call-back under an unknown serial is refused and comes again in 15 s; see `LearnsKeys`.
- Amounts are integer fen of CNY; other currencies are refused.
"""

from __future__ import annotations

import csv
import io
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.breaker import Result
from app.errors import CannotStart
from app.providers import money, signing, wire
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import (
    AttemptRef,
    BillLine,
    Captured,
    Hook,
    HookAnswer,
    HookClosed,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    HookRefundFailed,
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)

T = TypeVar("T")

API_URL: Final = "https://api.mch.weixin.qq.com"
ALGORITHM: Final = "WECHATPAY2-SHA256-RSA2048"
BEIJING = timezone(timedelta(hours=8))
LINK_MAX = timedelta(hours=2)  # a code_url, h5_url (5 min for the first visit) and prepay_id live two hours
LEARN_EVERY_S = 60.0  # a forger may name any serial: it costs one download a minute at most
REFRESH_S = 12 * 3600.0  # WeChat Pay: look for new certificates twice a day
OUT_TRADE_NO = re.compile(r"[0-9A-Za-z_|*@-]{6,32}", re.ASCII)
OUT_REFUND_NO = re.compile(r"[0-9A-Za-z_|*@-]{1,64}", re.ASCII)
_SERIAL = re.compile(r"[0-9A-F]{8,64}", re.ASCII)
DESCRIPTION_MAX_BYTES = 127
REASON_MAX_BYTES = 80

_ABSENT = frozenset({"ORDER_NOT_EXIST", "ORDERNOTEXIST", "RESOURCE_NOT_EXISTS"})
_NOT_NOW = frozenset({"FREQUENCY_LIMITED", "FREQUENCY_LIMIT_EXCEED", "RATELIMIT_EXCEEDED"})
_OURS = frozenset(
    {"SIGN_ERROR", "NO_AUTH", "MCH_NOT_EXISTS", "APPID_MCHID_NOT_MATCH"}
)  # set up wrongly: all fail
_BILL_NOT_READY = frozenset({"STATEMENT_CREATING"})
_BILL_EMPTY = frozenset({"NO_STATEMENT_EXIST"})


class _Amount(msgspec.Struct, kw_only=True):
    total: int = 0
    refund: int = 0
    currency: str = "CNY"


class _Trade(msgspec.Struct, kw_only=True):
    mchid: str
    appid: str = ""
    out_trade_no: str
    trade_state: str
    transaction_id: str | None = None
    success_time: datetime | None = None
    amount: _Amount | None = None
    attach: str = ""


class _Refund(msgspec.Struct, kw_only=True):
    refund_id: str
    out_refund_no: str
    status: str = ""  # in answers
    refund_status: str = ""  # in call-backs
    mchid: str | None = None  # in call-backs


class _Prepay(msgspec.Struct, kw_only=True):
    code_url: str | None = None
    h5_url: str | None = None
    prepay_id: str | None = None


class _Error(msgspec.Struct):
    code: str


class _Sealed(msgspec.Struct, kw_only=True):
    algorithm: str
    ciphertext: str
    nonce: str
    associated_data: str = ""


class _Certificate(msgspec.Struct, kw_only=True):
    serial_no: str
    encrypt_certificate: _Sealed


class _Certificates(msgspec.Struct):
    data: list[_Certificate]


class _HookBody(msgspec.Struct, kw_only=True):
    id: str
    event_type: str
    resource_type: str
    resource: _Sealed


class _BillAt(msgspec.Struct, kw_only=True):
    download_url: str
    hash_type: str = "SHA1"
    hash_value: str = ""


class _Nothing(msgspec.Struct):
    """A 204, or a body that nobody reads."""


class Keys:
    """WeChat Pay's public keys by `Wechatpay-Serial`: the configured one, and the certificates downloaded so far."""

    def __init__(self, fixed: Mapping[str, rsa.RSAPublicKey]) -> None:
        self._fixed = dict(fixed)
        self._learned: dict[str, x509.Certificate] = {}
        self.tried_at = -REFRESH_S  # by time.monotonic
        self.learned_at = -REFRESH_S

    def find(self, serial: str, now: datetime) -> rsa.RSAPublicKey | None:
        """The key of a serial, exactly as written; None: unknown, or its certificate is not valid now."""
        fixed = self._fixed.get(serial)
        if fixed is not None:
            return fixed
        certificate = self._learned.get(serial)
        if certificate is None or not _valid(certificate, now):
            return None
        key = certificate.public_key()
        return key if isinstance(key, rsa.RSAPublicKey) else None

    def learn(self, found: Mapping[str, x509.Certificate], now: datetime) -> dict[str, x509.Certificate]:
        """Add certificates; those that have expired are forgotten. Returns what was known before, for `restore`."""
        before = self._learned
        self._learned = {
            serial: certificate
            for serial, certificate in {**self._learned, **found}.items()
            if certificate.not_valid_after_utc > now
        }
        return before

    def restore(self, before: dict[str, x509.Certificate]) -> None:
        self._learned = before

    @property
    def serials(self) -> list[str]:
        return [*self._fixed, *self._learned]

    @property
    def fixed_id(self) -> str | None:
        return next(iter(self._fixed), None)


def _valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


class WechatPay:
    """Payment through WeChat Pay."""

    name = "wechat-pay"
    channels = ("wechat-pay", "wechat-native", "wechat-jsapi", "wechat-h5")
    address_channels = ("wechat-h5",)

    def __init__(
        self,
        *,
        mchid: str,
        appid: str,
        serial: str,
        private_key: str,
        apiv3_key: str,
        public_key_id: str = "",
        public_key: str = "",
        deadline_s: float,
        connections_max: int,
        url: str = API_URL,
    ) -> None:
        """serial, private_key: of the merchant's API certificate. apiv3_key: 32 characters. CannotStart: a bad one.

        public_key_id, public_key: one of each, or several while they change: the first is asked for, all are believed.
        """
        if len(apiv3_key.encode()) != 32:
            raise CannotStart("FAIRDROP_WECHAT_PAY_APIV3_KEY must have 32 characters")
        ids = [part.strip() for part in public_key_id.split(",") if part.strip()]
        fixed = signing.public_keys(public_key, "FAIRDROP_WECHAT_PAY_PUBLIC_KEY")
        if len(ids) != len(fixed):
            raise CannotStart(
                "FAIRDROP_WECHAT_PAY_PUBLIC_KEY and …_PUBLIC_KEY_ID belong together: set as many of both, or none"
            )
        self._mchid, self._appid, self._serial = mchid, appid, serial
        self._key = signing.private_key(private_key, "FAIRDROP_WECHAT_PAY_PRIVATE_KEY")
        self._aead = AESGCM(apiv3_key.encode())
        self.keys = Keys(dict(zip(ids, fixed, strict=True)))
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)
        self._origin = urlsplit(url)

    async def aclose(self) -> None:
        await self._client.aclose()

    # -- calls

    def _authorization(self, method: str, target: str, body: bytes) -> str:
        stamp, nonce = str(int(time.time())), secrets.token_hex(16)
        message = f"{method}\n{target}\n{stamp}\n{nonce}\n".encode() + body + b"\n"
        return (
            f'{ALGORITHM} mchid="{self._mchid}",nonce_str="{nonce}",timestamp="{stamp}",'
            f'serial_no="{self._serial}",signature="{signing.sign(self._key, message)}"'
        )

    async def _request(
        self, method: str, target: str, body: object = None
    ) -> httpx.Response | NotDone | MaybeDone:
        raw = b"" if body is None else msgspec.json.encode(body)
        headers = {
            "authorization": self._authorization(method, target, raw),
            "accept": "application/json",
            "content-type": "application/json",
            "user-agent": "fairdrop",  # WeChat Pay refuses requests without one
        }
        if (fixed := self.keys.fixed_id) is not None:
            headers["wechatpay-serial"] = fixed  # asks for an answer signed with this key
        try:
            return await self._client.request(method, target, content=raw, headers=headers)
        except httpx.HTTPError as error:
            return wire.failed(error)

    async def _call(self, method: str, target: str, kind: type[T], body: object = None) -> Answer[T]:
        """One signed call with a verified answer.

        2xx without a signature that holds: MaybeDone. Refused("absent"): no such order or refund. 429: not done.
        500 SYSTEM_ERROR: may have happened, ask again with the same number, as WeChat Pay says.
        """
        if (
            time.monotonic() - self.keys.learned_at > REFRESH_S
            and self._may_learn()
            and not self.keys.fixed_id
        ):
            await self.learn_keys()
        reply = await self._request(method, target, body)
        if not isinstance(reply, httpx.Response):
            return reply
        if reply.is_success:
            if self.key_missing(reply.headers):
                await self.learn_keys()
            why = self._refusal(reply.headers, reply.content, datetime.now(UTC))
            if why is not None:
                return MaybeDone(f"answer_{why}")
            try:
                return Done(msgspec.json.decode(reply.content or b"{}", type=kind))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return MaybeDone("malformed_answer")
        return _no(reply)

    def _refusal(self, headers: Mapping[str, str], body: bytes, now: datetime) -> str | None:
        """None if the signature over timestamp, nonce and body holds, else why not."""
        stamp = headers.get("wechatpay-timestamp", "")
        nonce = headers.get("wechatpay-nonce", "")
        signature = headers.get("wechatpay-signature", "")
        serial = headers.get("wechatpay-serial", "")
        if not (stamp and nonce and signature and serial):
            return "signature_missing"
        at = signing.timestamp(stamp)
        if at is None or not nonce.isascii():
            return "signature_malformed"
        if abs(now.timestamp() - at) > signing.WINDOW_S:
            return "timestamp_outside_window"
        key = self.keys.find(serial, now)
        if key is None:
            return "serial_unknown"
        message = f"{stamp}\n{nonce}\n".encode() + body + b"\n"
        return None if signing.verify(key, message, signature) else "signature_wrong"

    def _open(self, sealed: _Sealed) -> bytes | None:
        """AEAD_AES_256_GCM with the APIv3 key. None: forged, or another key."""
        ciphertext = signing.unbase64(sealed.ciphertext)
        nonce = sealed.nonce.encode()
        if sealed.algorithm != "AEAD_AES_256_GCM" or ciphertext is None or len(nonce) != 12:
            return None
        try:
            return self._aead.decrypt(nonce, ciphertext, sealed.associated_data.encode())
        except InvalidTag:
            return None

    # -- platform certificates

    def _may_learn(self) -> bool:
        return time.monotonic() - self.keys.tried_at > LEARN_EVERY_S

    def key_missing(self, headers: Mapping[str, str]) -> bool:
        serial = headers.get("wechatpay-serial", "")
        known = self.keys.find(serial, datetime.now(UTC)) is not None
        return not known and _SERIAL.fullmatch(serial) is not None and self._may_learn()

    async def learn_keys(self) -> Answer[None]:
        """Download the platform certificates.

        They are authenticated twice: sealed with the APIv3 key, and the answer is signed by one of those it brings.
        """
        self.keys.tried_at = time.monotonic()
        reply = await self._request("GET", "/v3/certificates")
        if not isinstance(reply, httpx.Response):
            return reply
        if not reply.is_success:
            return _no(reply)
        now = datetime.now(UTC)
        found: dict[str, x509.Certificate] = {}
        try:
            for entry in msgspec.json.decode(reply.content, type=_Certificates).data:
                pem = self._open(entry.encrypt_certificate)
                if pem is None:
                    return MaybeDone("certificate_not_opened")
                certificate = x509.load_pem_x509_certificate(pem)
                if f"{certificate.serial_number:X}" == entry.serial_no.lstrip("0"):
                    found[entry.serial_no] = certificate
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            return MaybeDone("malformed_answer")
        before = self.keys.learn(found, now)
        why = self._refusal(reply.headers, reply.content, now)
        if why is not None:
            self.keys.restore(before)
            return MaybeDone(f"answer_{why}")
        self.keys.learned_at = time.monotonic()
        return Done(None)

    # -- payments

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        if wanted.currency != "CNY":
            return Refused("currency_not_supported", other_may=True)
        if OUT_TRADE_NO.fullmatch(wanted.attempt_id) is None:
            return Refused("attempt_id_not_usable", other_may=True)
        if not wanted.notify_url:
            return Refused("notify_url_missing", other_may=True)
        now = datetime.now(UTC)
        payer = wanted.payer or {}
        body: dict[str, Any] = {
            "appid": self._appid,
            "mchid": self._mchid,
            "description": _cut(wanted.title, DESCRIPTION_MAX_BYTES),
            "out_trade_no": wanted.attempt_id,
            "time_expire": wanted.expires_at.astimezone(BEIJING).isoformat(timespec="seconds"),
            "attach": wanted.order_no,
            "notify_url": wanted.notify_url,
            "amount": {"total": wanted.amount_minor, "currency": "CNY"},
        }
        product = "native"
        if wanted.channel == "wechat-jsapi":
            product = "jsapi"
            openid = payer.get("openid")
            if not isinstance(openid, str) or not openid:
                return Refused("openid_missing", other_may=True)
            body["payer"] = {"openid": openid}
        elif wanted.channel == "wechat-h5":
            product = "h5"
            address = payer.get("client_ip")
            if not isinstance(address, str) or not address:
                return Refused("payer_ip_missing", other_may=True)
            body["scene_info"] = {"payer_client_ip": address, "h5_info": {"type": "Wap"}}
        answer = await self._call("POST", f"/v3/pay/transactions/{product}", _Prepay, body)
        if isinstance(answer, Refused) and answer.code == "ORDERPAID":
            return Refused("paid")
        if isinstance(answer, Refused) and answer.code in ("ORDER_CLOSED", "ORDERCLOSED"):
            return Refused("closed")
        if not isinstance(answer, Done):
            return answer
        until = min(wanted.expires_at, now + LINK_MAX)
        prepay = answer.value
        if product == "native" and prepay.code_url:
            return Done(
                Link(provider_ref=None, kind="qr", url=prepay.code_url, params=None, expires_at=until)
            )
        if product == "h5" and prepay.h5_url:
            url = prepay.h5_url
            if wanted.return_url:
                url += ("&" if "?" in url else "?") + urlencode({"redirect_url": wanted.return_url})
            return Done(Link(provider_ref=None, kind="redirect", url=url, params=None, expires_at=until))
        if product == "jsapi" and prepay.prepay_id:
            params = self.bridge_params(prepay.prepay_id)
            return Done(Link(provider_ref=None, kind="sdk", url=None, params=params, expires_at=until))
        return MaybeDone("malformed_answer")

    def bridge_params(self, prepay_id: str) -> dict[str, str]:
        """What the page hands to `WeixinJSBridge` or `wx.requestPayment`, signed."""
        stamp, nonce, package = str(int(time.time())), secrets.token_hex(16), f"prepay_id={prepay_id}"
        message = f"{self._appid}\n{stamp}\n{nonce}\n{package}\n".encode()
        return {
            "appId": self._appid,
            "timeStamp": stamp,
            "nonceStr": nonce,
            "package": package,
            "signType": "RSA",
            "paySign": signing.sign(self._key, message),
        }

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        target = f"/v3/pay/transactions/out-trade-no/{_segment(ref.attempt_id)}?mchid={self._mchid}"
        answer = await self._call("GET", target, _Trade)
        if isinstance(answer, Refused) and answer.code == "absent":
            return Done(Payment(state="absent"))
        if not isinstance(answer, Done):
            return answer
        trade = answer.value
        if trade.mchid != self._mchid or trade.out_trade_no != ref.attempt_id:
            return MaybeDone("foreign_order")
        match trade.trade_state:
            case "NOTPAY" | "USERPAYING" | "ACCEPT":
                return Done(Payment(state="waiting"))
            case "SUCCESS" | "REFUND":  # REFUND: paid, and then given back in part or whole
                captured = _captured(trade, ref.order_no)
                return (
                    MaybeDone("malformed_answer")
                    if captured is None
                    else Done(Payment(state="paid", captured=captured))
                )
            case "CLOSED" | "REVOKED":
                return Done(Payment(state="closed", code=trade.trade_state.lower()))
            case "PAYERROR":
                return Done(Payment(state="declined", code="payerror"))
        return MaybeDone("state_unknown")

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        """204 means: cannot be paid any more, whether it ever was there or not. Else its state decides."""
        target = f"/v3/pay/transactions/out-trade-no/{_segment(ref.attempt_id)}/close"
        answer = await self._call("POST", target, _Nothing, {"mchid": self._mchid})
        if isinstance(answer, Done):
            return Done(Payment(state="closed"))
        if isinstance(answer, Refused) and answer.code == "absent":
            return Done(Payment(state="absent"))
        if not (isinstance(answer, Refused) and answer.counts is Result.SUCCESS):
            return answer
        state = await self.query(ref)
        if isinstance(state, Done) and state.value.state == "waiting":
            return MaybeDone("not_closed", counts=Result.SUCCESS)  # the buyer is typing the password just now
        return state

    # -- refunds

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        if OUT_REFUND_NO.fullmatch(wanted.refund_id) is None:
            return Refused("refund_id_not_usable")
        body = {
            "transaction_id": wanted.capture_ref,
            "out_refund_no": wanted.refund_id,
            "reason": _cut(wanted.reason, REASON_MAX_BYTES),
            "amount": {
                "refund": wanted.amount_minor,
                "total": wanted.captured_minor,
                "currency": wanted.currency,
            },
        }
        answer = await self._call("POST", "/v3/refund/domestic/refunds", _Refund, body)
        if isinstance(answer, Refused) and answer.code == "NOT_ENOUGH":
            return NotDone(
                "balance_insufficient", counts=Result.IGNORED
            )  # repeat with the same number after a top-up
        return _refund_state(answer)

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        answer = await self._call("GET", f"/v3/refund/domestic/refunds/{_segment(refund_id)}", _Refund)
        return _refund_state(answer)

    # -- bill

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        """WeChat Pay's days are Beijing's: a UTC day lies in two of them. A day's bill is there by 10:00 next day."""
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        lines: list[BillLine] = []
        for file_day in (day, day + timedelta(days=1)):
            answer = await self._bill_text(file_day)
            if not isinstance(answer, Done):
                return answer
            found = bill_lines(answer.value, self._mchid)
            if found is None:
                return MaybeDone("malformed_answer")
            lines += [line for line in found if start <= line.at < start + timedelta(days=1)]
        return Done(lines)

    async def _bill_text(self, day: date) -> Answer[str]:
        target = f"/v3/bill/tradebill?bill_date={day.isoformat()}&bill_type=ALL"
        answer = await self._call("GET", target, _BillAt)
        if isinstance(answer, Refused) and answer.code in _BILL_EMPTY:
            return Done("")
        if isinstance(answer, Refused) and answer.code in _BILL_NOT_READY:
            return NotDone("bill_not_ready", counts=Result.SUCCESS)
        if not isinstance(answer, Done):
            return answer
        at = urlsplit(answer.value.download_url)
        if (at.scheme, at.netloc) != (self._origin.scheme, self._origin.netloc):
            return MaybeDone("foreign_download")  # our signature goes to nobody else
        reply = await self._request("GET", f"{at.path}?{at.query}")
        if not isinstance(reply, httpx.Response):
            return reply
        if not reply.is_success:
            return _no(reply)
        if not wire.digest_holds(answer.value.hash_type, answer.value.hash_value, reply.content):
            return MaybeDone("bill_hash_wrong")
        try:
            return Done(reply.content.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return MaybeDone("malformed_answer")

    # -- call-backs

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        if headers.get("wechatpay-signature-type", ALGORITHM) != ALGORITHM:
            return HookForged("signature_type")
        why = self._refusal(headers, raw_body, now)
        if why is not None:
            return HookForged(why)
        try:
            body = msgspec.json.decode(raw_body, type=_HookBody)
            if body.resource_type != "encrypt-resource":
                return HookForged("malformed")
            opened = self._open(body.resource)
            if opened is None:
                return HookForged("resource_not_opened")
            if body.event_type.startswith("TRANSACTION."):
                return self._trade_hook(body, msgspec.json.decode(opened, type=_Trade))
            if body.event_type.startswith("REFUND."):
                refund = msgspec.json.decode(opened, type=_Refund)
                if refund.mchid != self._mchid:
                    return HookForged("merchant_wrong")
                if refund.refund_status == "SUCCESS":
                    return HookRefunded(
                        event_id=body.id, refund_id=refund.out_refund_no, provider_ref=refund.refund_id
                    )
                if refund.refund_status in ("CLOSED", "ABNORMAL"):
                    return HookRefundFailed(
                        event_id=body.id,
                        refund_id=refund.out_refund_no,
                        code=f"refund_{refund.refund_status.lower()}",
                    )
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return HookForged("malformed")
        return HookOther(event_id=body.id, kind=body.event_type)

    def _trade_hook(self, body: _HookBody, trade: _Trade) -> Hook:
        if trade.mchid != self._mchid or trade.appid != self._appid:
            return HookForged("merchant_wrong")
        if trade.trade_state == "SUCCESS":
            captured = _captured(trade, trade.attach or trade.out_trade_no.partition("-")[0])
            return (
                HookForged("malformed") if captured is None else HookPaid(event_id=body.id, captured=captured)
            )
        if trade.trade_state in ("CLOSED", "REVOKED"):
            return HookClosed(
                event_id=body.id,
                attempt_id=trade.out_trade_no,
                order_no=trade.attach,
                code=trade.trade_state.lower(),
            )
        return HookOther(event_id=body.id, kind=body.event_type)

    def hook_reply(self, ok: bool) -> HookAnswer:
        if ok:
            return HookAnswer(204)
        return HookAnswer(503, '{"code":"FAIL","message":"失败"}'.encode())


def _no(reply: httpx.Response) -> NotDone | Refused | MaybeDone:
    """What a status that is not 2xx means."""
    status, code = reply.status_code, f"http_{reply.status_code}"
    try:
        code = msgspec.json.decode(reply.content, type=_Error).code
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass  # a proxy's page: the status alone has to do
    if code in _ABSENT:
        return Refused("absent")
    if code == "http_404":
        return MaybeDone(code)  # a proxy's page says nothing about a payment
    if status == 429 or code in _NOT_NOW:
        return NotDone(code, wire.retry_after_ms(reply), Result.IGNORED)
    if status == 401 or code in _OURS:
        return Refused(code, other_may=True, counts=Result.FAILURE)
    if 400 <= status < 500:
        return Refused(code)
    return MaybeDone(code)


def _captured(trade: _Trade, order_no: str) -> Captured | None:
    amount = trade.amount
    if (
        not trade.transaction_id
        or trade.success_time is None
        or amount is None
        or not amount.total
        or not order_no
    ):
        return None
    if trade.success_time.tzinfo is None:
        return None
    return Captured(
        provider_ref=trade.transaction_id,
        attempt_id=trade.out_trade_no,
        order_no=order_no,
        amount_minor=amount.total,
        currency=amount.currency,
        captured_at=trade.success_time.astimezone(UTC),
    )


def _refund_state(answer: Answer[_Refund]) -> Answer[RefundState]:
    if isinstance(answer, Refused) and answer.code == "absent":
        return Done(RefundState(state="absent"))
    if not isinstance(answer, Done):
        return answer
    match answer.value.status:
        case "SUCCESS":
            return Done(RefundState(state="done", provider_ref=answer.value.refund_id))
        case "PROCESSING":
            return Done(RefundState(state="pending", provider_ref=answer.value.refund_id))
        case "ABNORMAL":  # the buyer's card is gone: the merchant decides in the console, then it goes on
            return Done(
                RefundState(state="pending", provider_ref=answer.value.refund_id, code="refund_abnormal")
            )
        case "CLOSED":
            return Done(
                RefundState(state="failed", provider_ref=answer.value.refund_id, code="refund_closed")
            )
    return MaybeDone("malformed_answer")


# The columns of a trade bill (bill_type=ALL) that are read, by their headings.
_BILL_COLUMNS = (
    "交易时间", "商户号", "微信订单号", "商户订单号", "交易状态", "货币种类", "微信退款单号", "商户退款单号",
    "退款金额", "退款状态", "订单金额", "商户数据包",
)  # fmt: skip


def bill_lines(text: str, mchid: str) -> list[BillLine] | None:
    """The captures and refunds of a trade bill. None: not a bill. Each value starts with a backtick; the last two lines
    are sums. A refund's time is that of its own line."""
    if not text.strip():
        return []
    rows = csv.reader(io.StringIO(text))
    heading = next(rows)
    try:
        place = {name: heading.index(name) for name in _BILL_COLUMNS}
    except ValueError:
        return None
    lines: list[BillLine] = []
    for row in rows:
        if not row or not row[0].startswith("`") or len(row) < len(heading):
            break  # the sums
        value = {name: row[at].removeprefix("`") for name, at in place.items()}
        if value["商户号"] != mchid:
            return None
        refund = value["交易状态"] == "REFUND"
        amount_minor = money.minor_of(value["退款金额" if refund else "订单金额"], value["货币种类"])
        try:
            at = datetime.strptime(value["交易时间"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=BEIJING)
        except ValueError:
            return None
        if amount_minor is None:
            return None
        if refund and value["退款状态"] in ("FAIL", "CHANGE"):
            continue
        if not refund and value["交易状态"] != "SUCCESS":
            continue
        lines.append(
            BillLine(
                kind="refund" if refund else "capture",
                provider_ref=value["微信退款单号" if refund else "微信订单号"],
                our_id=value["商户退款单号" if refund else "商户订单号"],
                order_no=value["商户数据包"],
                amount_minor=amount_minor,
                currency=value["货币种类"],
                at=at.astimezone(UTC),
            )
        )
    return lines


def _segment(text: str) -> str:
    return quote(text, safe="")


def _cut(text: str, bytes_max: int) -> str:
    """The longest beginning of a text that fits into so many bytes of UTF-8."""
    return text.encode()[:bytes_max].decode(errors="ignore")
