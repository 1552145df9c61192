"""Payments through Alipay's open platform: computer pages and mobile pages (redirect), codes to scan (qr), apps (sdk).

Sources: opendocs.alipay.com — alipay.trade.page.pay, .wap.pay, .precreate, .app.pay, .query, .close, .refund,
.fastpay.refund.query, alipay.data.dataservice.bill.downloadurl.query; "异步通知说明" (call-backs);
developer.aliyun.com/article/710933 (when a trade comes into being), /article/707638 (bills).

| our word | at Alipay |
|---|---|
| attempt_id | `out_trade_no`, `-` written as `_` (letters, digits and underscores only) |
| provider_ref of a capture | `trade_no` |
| refund_id | `out_request_no`, unique for each trade |

- A link is a signed URL made here, without a call; the trade comes into being when the buyer opens it and signs in, or
  scans the code. Until then `query` and `close` are answered ACQ.TRADE_NOT_EXIST, and the link can still be paid:
  `close` is MaybeDone("link_may_live") until the link has ended by its own `time_expire`.
- Answers are signed over the exact bytes of their inner object; call-backs over their decoded fields. Two ways to know
  Alipay's key: the public key, or certificates (then our requests name the serial numbers of ours).
- Call-backs carry no signed time of sending that changes with each try: a replay is as old as `notify_time` says, and
  redelivery goes on for 25 hours, so the window is that long; a duplicate has the same notify_id.
- Amounts are decimal text of CNY; other currencies are refused. Times are Beijing's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

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
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)

API_URL: Final = "https://openapi.alipay.com/gateway.do"
BEIJING = timezone(timedelta(hours=8))
TIME = "%Y-%m-%d %H:%M:%S"
LINK_MIN = timedelta(minutes=1)  # the least `time_expire` allows
LINK_GRACE = timedelta(minutes=1)  # after a link's end, for clocks and a payment that was being typed in
HOOK_OLD_MAX = timedelta(hours=26)  # the last redelivery comes after 24 h 22 min
HOOK_EARLY_MAX = timedelta(seconds=signing.WINDOW_S)
BILL_MAX_BYTES = 256 * 1024 * 1024  # of an unpacked day: a million lines
SUBJECT_MAX = 256
_ATTEMPT = re.compile(r"[0-9A-Za-z]{1,48}-[0-9]{1,6}", re.ASCII)
_OUT_TRADE_NO = re.compile(r"[0-9A-Za-z]{1,48}_[0-9]{1,6}", re.ASCII)
_NOT_IN_SUBJECT = re.compile(r"[/=&]")
_BILL_HOSTS = (".alipay.com", ".alipaydev.com")

# What each way to pay is called: our channel → (method, product_code, kind).
_WAYS: Final = {
    "page": ("alipay.trade.page.pay", "FAST_INSTANT_TRADE_PAY"),
    "wap": ("alipay.trade.wap.pay", "QUICK_WAP_WAY"),
    "app": ("alipay.trade.app.pay", "QUICK_MSECURITY_PAY"),
    "qr": ("alipay.trade.precreate", "FACE_TO_FACE_PAYMENT"),
}
_UNKNOWN = frozenset({"ACQ.SYSTEM_ERROR", "aop.ACQ.SYSTEM_ERROR", "isp.unknow-error", "aop.unknow-error"})
_NOT_NOW = frozenset(
    {"isv.app-call-limited", "isp.call-limited", "aop.ACCESS-LIMITED", "ACQ.FREQUENCY_LIMITED"}
)
_BALANCE = frozenset({"ACQ.SELLER_BALANCE_NOT_ENOUGH", "ACQ.REFUND_ACCOUNT_NOT_EXIST"})


class _Reply(msgspec.Struct, kw_only=True):
    """The inner object of every answer; what a method does not have stays None."""

    code: str
    sub_code: str | None = None
    trade_no: str | None = None
    out_trade_no: str | None = None
    trade_status: str | None = None
    total_amount: str | None = None
    send_pay_date: str | None = None
    qr_code: str | None = None
    fund_change: str | None = None
    out_request_no: str | None = None
    refund_status: str | None = None
    bill_download_url: str | None = None


def certificate_sn(certificate: x509.Certificate) -> str:
    """How Alipay names a certificate: MD5 of issuer and serial number."""
    text = certificate.issuer.rfc4514_string() + str(certificate.serial_number)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def root_sn(chain: Sequence[x509.Certificate]) -> str:
    """The names of the RSA certificates of Alipay's root file, joined; the SM2 ones are left out."""
    rsa_oid = "1.2.840.113549.1.1"
    return "_".join(
        certificate_sn(one) for one in chain if one.signature_algorithm_oid.dotted_string.startswith(rsa_oid)
    )


class Alipay:
    """Payment through Alipay."""

    name = "alipay"
    channels = ("alipay", "alipay-page", "alipay-wap", "alipay-app", "alipay-qr")

    def __init__(
        self,
        *,
        app_id: str,
        seller_id: str,
        private_key: str,
        public_key: str = "",
        app_cert: str = "",
        alipay_cert: str = "",
        root_cert: str = "",
        deadline_s: float,
        connections_max: int,
        url: str = API_URL,
        way: str = "page",
    ) -> None:
        """public_key: Alipay's, or else the three certificates (PEM). public_key and alipay_cert may hold the next too.

        way: what the channel `alipay` means. CannotStart: keys missing or bad.
        """
        self._app_id, self._seller_id, self._url = app_id, seller_id, url
        self._key = signing.private_key(private_key, "FAIRDROP_ALIPAY_PRIVATE_KEY")
        if way not in _WAYS:
            raise CannotStart("FAIRDROP_ALIPAY_WAY must be one of page, wap, app, qr")
        self._way = way
        self._serials: dict[str, str] = {}
        self._keys: dict[
            str, rsa.RSAPublicKey
        ] = {}  # by alipay_cert_sn, or the public key's place in the setting
        if public_key:
            found = signing.public_keys(public_key, "FAIRDROP_ALIPAY_PUBLIC_KEY")
            self._keys = {str(at): key for at, key in enumerate(found)}
        elif app_cert and alipay_cert and root_cert:
            ours = signing.certificates(app_cert, "FAIRDROP_ALIPAY_APP_CERT")
            self._serials = {
                "app_cert_sn": certificate_sn(ours[0]),
                "alipay_root_cert_sn": root_sn(signing.certificates(root_cert, "FAIRDROP_ALIPAY_ROOT_CERT")),
            }
            for one in signing.certificates(alipay_cert, "FAIRDROP_ALIPAY_CERT"):
                key = one.public_key()
                if isinstance(key, rsa.RSAPublicKey):
                    self._keys[certificate_sn(one)] = key
        if not self._keys:
            raise CannotStart(
                "Alipay's key is missing: set FAIRDROP_ALIPAY_PUBLIC_KEY, or all of …_APP_CERT, …_CERT and …_ROOT_CERT"
            )
        self._client = wire.client("", deadline_s=deadline_s, connections_max=connections_max)

    async def aclose(self) -> None:
        await self._client.aclose()

    # -- calls

    def _signed(
        self, method: str, content: Mapping[str, Any], extra: Mapping[str, str | None] | None = None
    ) -> dict[str, str]:
        fields = {
            "app_id": self._app_id,
            "method": method,
            "format": "JSON",
            "charset": "utf-8",
            "sign_type": "RSA2",
            "timestamp": datetime.now(BEIJING).strftime(TIME),
            "version": "1.0",
            "biz_content": msgspec.json.encode(content).decode(),
            **self._serials,
            **{name: value for name, value in (extra or {}).items() if value},
        }
        fields["sign"] = signing.sign(self._key, _content(fields))
        return fields

    async def _call(
        self, method: str, content: Mapping[str, Any], extra: Mapping[str, str | None] | None = None
    ) -> Answer[_Reply]:
        """One signed call with a verified answer. Refused("absent"): no such trade.

        Alipay answers 200 whatever happens; `code` tells. ACQ.SYSTEM_ERROR and 20000 mean: may have happened.
        """
        fields = self._signed(method, content, extra)
        body = {"biz_content": fields.pop("biz_content")}
        try:
            reply = await self._client.post(self._url, params=fields, data=body)
        except httpx.HTTPError as error:
            return wire.failed(error)
        if reply.status_code != 200:
            return MaybeDone(f"http_{reply.status_code}")
        try:
            outer = msgspec.json.decode(reply.content, type=dict[str, msgspec.Raw])
            raw = outer.get(method.replace(".", "_") + "_response")
            if (
                raw is None
            ):  # the gateway itself said no, before the method: not signed where it does not know us
                refused = msgspec.json.decode(outer.get("error_response", msgspec.Raw(b"null")), type=_Reply)
                return _no(refused) if refused.code != "10000" else MaybeDone("malformed_answer")
            answer = msgspec.json.decode(raw, type=_Reply)
            signature = msgspec.json.decode(outer.get("sign", msgspec.Raw(b'""')), type=str)
            serial = msgspec.json.decode(outer.get("alipay_cert_sn", msgspec.Raw(b'""')), type=str)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return MaybeDone("malformed_answer")
        # Only certificates have names; of two public keys Alipay does not say which it used.
        keys = [self._keys[serial]] if serial in self._keys else [] if self._serials else self._keys.values()
        if not keys:
            return MaybeDone("answer_certificate_unknown")
        if not any(signing.verify(key, bytes(raw), signature) for key in keys):
            return MaybeDone("answer_signature_wrong")
        return Done(answer) if answer.code == "10000" else _no(answer)

    # -- payments

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        if wanted.currency != "CNY":
            return Refused("currency_not_supported", other_may=True)
        if _ATTEMPT.fullmatch(wanted.attempt_id) is None:
            return Refused("attempt_id_not_usable", other_may=True)
        if wanted.expires_at - datetime.now(UTC) < LINK_MIN:
            return Refused("expires_too_soon", other_may=True)
        way = wanted.channel.removeprefix("alipay-")
        method, product = _WAYS[way if way in _WAYS else self._way]
        content = {
            "out_trade_no": _out_trade_no(wanted.attempt_id),
            "total_amount": money.decimal_of(wanted.amount_minor, "CNY"),
            "subject": _NOT_IN_SUBJECT.sub(" ", wanted.title)[:SUBJECT_MAX],
            "product_code": product,
            "time_expire": wanted.expires_at.astimezone(BEIJING).strftime(TIME),
        }
        extra = {"notify_url": wanted.notify_url}
        until = wanted.expires_at.replace(microsecond=0)
        if method == "alipay.trade.precreate":
            answer = await self._call(method, content, extra)
            if isinstance(answer, Refused) and answer.code in (
                "ACQ.TRADE_HAS_SUCCESS",
                "ACQ.TRADE_HAS_CLOSE",
            ):
                return Refused("paid" if answer.code.endswith("SUCCESS") else "closed")
            if not isinstance(answer, Done):
                return answer
            if not answer.value.qr_code:
                return MaybeDone("malformed_answer")
            return Done(
                Link(provider_ref=None, kind="qr", url=answer.value.qr_code, params=None, expires_at=until)
            )
        if method == "alipay.trade.app.pay":
            text = urlencode(self._signed(method, content, extra))
            params = {"order_string": text}
            return Done(Link(provider_ref=None, kind="sdk", url=None, params=params, expires_at=until))
        if method == "alipay.trade.wap.pay" and wanted.return_url:
            content["quit_url"] = wanted.return_url
        fields = self._signed(method, content, {**extra, "return_url": wanted.return_url})
        url = f"{self._url}?{urlencode(fields)}"
        return Done(Link(provider_ref=None, kind="redirect", url=url, params=None, expires_at=until))

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        answer = await self._call("alipay.trade.query", {"out_trade_no": _out_trade_no(ref.attempt_id)})
        if isinstance(answer, Refused) and answer.code == "absent":
            # Not opened yet, and its link may be in the buyer's hands: then the attempt still waits.
            return Done(Payment(state="waiting" if _may_live(ref) else "absent"))
        if not isinstance(answer, Done):
            return answer
        trade = answer.value
        if trade.out_trade_no != _out_trade_no(ref.attempt_id):
            return MaybeDone("foreign_trade")
        match trade.trade_status:
            case "WAIT_BUYER_PAY":
                return Done(Payment(state="waiting"))
            case "TRADE_SUCCESS" | "TRADE_FINISHED":
                captured = _captured(
                    trade.trade_no, ref.attempt_id, ref.order_no, trade.total_amount, trade.send_pay_date
                )
                return (
                    MaybeDone("malformed_answer")
                    if captured is None
                    else Done(Payment(state="paid", captured=captured))
                )
            case (
                "TRADE_CLOSED"
            ):  # ended unpaid, or refunded whole: a trade that was paid has its time of payment
                captured = _captured(
                    trade.trade_no, ref.attempt_id, ref.order_no, trade.total_amount, trade.send_pay_date
                )
                if captured is not None:
                    return Done(Payment(state="paid", captured=captured, code="refunded"))
                return Done(Payment(state="closed", code="trade_closed"))
        return MaybeDone("state_unknown")

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        answer = await self._call("alipay.trade.close", {"out_trade_no": _out_trade_no(ref.attempt_id)})
        if isinstance(answer, Done):
            return Done(Payment(state="closed"))
        if isinstance(answer, Refused) and answer.code == "absent":
            if _may_live(ref):
                return MaybeDone("link_may_live", counts=Result.SUCCESS)
            return Done(Payment(state="absent"))
        if not (isinstance(answer, Refused) and answer.counts is Result.SUCCESS):
            return answer
        state = await self.query(
            ref
        )  # only an unpaid trade can be closed: which other state it is in decides
        if isinstance(state, Done) and state.value.state == "waiting":
            return MaybeDone("not_closed", counts=Result.SUCCESS)
        return state

    # -- refunds

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        content = {
            "trade_no": wanted.capture_ref,
            "refund_amount": money.decimal_of(wanted.amount_minor, wanted.currency),
            "out_request_no": wanted.refund_id,
            "refund_reason": wanted.reason[:SUBJECT_MAX],
        }
        answer = await self._call("alipay.trade.refund", content)
        if isinstance(answer, Refused) and answer.code in _BALANCE:
            return NotDone(
                "balance_insufficient", counts=Result.IGNORED
            )  # the same number again, after a top-up
        if not isinstance(answer, Done):
            return answer
        if answer.value.fund_change == "Y":
            return Done(RefundState(state="done", provider_ref=answer.value.trade_no))
        # "N": this call moved nothing, because an earlier one with the same number did, or is about to.
        found = await self.refund_query(wanted.refund_id, wanted.capture_ref)
        if isinstance(found, Done) and found.value.state == "absent":
            return Done(RefundState(state="pending"))
        return found

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        if capture_ref is None:
            return MaybeDone("capture_unknown", counts=Result.IGNORED)
        content = {"trade_no": capture_ref, "out_request_no": refund_id}
        answer = await self._call("alipay.trade.fastpay.refund.query", content)
        if isinstance(answer, Refused) and answer.code == "absent":
            return Done(RefundState(state="absent"))
        if not isinstance(answer, Done):
            return answer
        found = answer.value
        if found.out_request_no is None:
            return Done(RefundState(state="absent"))  # "10000 Success" without data: never heard of
        if found.out_request_no != refund_id:
            return MaybeDone("foreign_refund")
        return Done(
            RefundState(
                state="done" if found.refund_status == "REFUND_SUCCESS" else "pending",
                provider_ref=found.trade_no,
            )
        )

    # -- bill

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        """Alipay's days are Beijing's: a UTC day lies in two of them. A day's bill is there by 10:00 of the next."""
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        lines: list[BillLine] = []
        for file_day in (day, day + timedelta(days=1)):
            answer = await self._bill_file(file_day)
            if not isinstance(answer, Done):
                return answer
            found = bill_lines(answer.value)
            if found is None:
                return MaybeDone("malformed_answer")
            lines += [line for line in found if start <= line.at < start + timedelta(days=1)]
        return Done(lines)

    async def _bill_file(self, day: date) -> Answer[bytes]:
        content = {"bill_type": "trade", "bill_date": day.isoformat()}
        answer = await self._call("alipay.data.dataservice.bill.downloadurl.query", content)
        if isinstance(answer, Refused) and answer.code == "isp.bill_not_exist":
            return NotDone("bill_not_ready", counts=Result.SUCCESS)
        if not isinstance(answer, Done):
            return answer
        at = urlsplit(answer.value.bill_download_url or "")
        host = at.hostname or ""
        if not host.endswith(_BILL_HOSTS) and at.netloc != urlsplit(self._url).netloc:
            return MaybeDone("foreign_download")
        try:
            reply = await self._client.get(at.geturl())
        except httpx.HTTPError as error:
            return wire.failed(error)
        return Done(reply.content) if reply.status_code == 200 else MaybeDone(f"http_{reply.status_code}")

    # -- call-backs

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        fields = signing.form(raw_body)
        if fields is None:
            return HookForged("malformed")
        signature = fields.pop("sign", "")
        if fields.pop("sign_type", "") != "RSA2" or not signature:
            return HookForged("signature_missing")
        message = _content(fields)
        if not any(signing.verify(key, message, signature) for key in self._keys.values()):
            return HookForged("signature_wrong")
        if fields.get("app_id") != self._app_id or fields.get("seller_id") != self._seller_id:
            return HookForged("merchant_wrong")
        sent_at, event_id = _time(fields.get("notify_time")), fields.get("notify_id")
        if sent_at is None or not event_id or fields.get("charset", "utf-8").lower() != "utf-8":
            return HookForged("malformed")
        if not now - HOOK_OLD_MAX <= sent_at <= now + HOOK_EARLY_MAX:
            return HookForged("timestamp_outside_window")
        status, number = fields.get("trade_status", ""), fields.get("out_trade_no", "")
        if fields.get("notify_type") != "trade_status_sync" or _OUT_TRADE_NO.fullmatch(number) is None:
            return HookOther(
                event_id=event_id, kind=fields.get("notify_type", "")
            )  # another product of the app
        attempt_id = number.replace("_", "-")
        order_no = attempt_id.partition("-")[0]
        refunded = money.minor_of(fields.get("refund_fee", "0"), "CNY")
        if fields.get("gmt_refund") or refunded != 0:
            if not fields.get("out_biz_no"):
                return HookOther(event_id=event_id, kind="refund")
            return HookRefunded(
                event_id=event_id, refund_id=fields["out_biz_no"], provider_ref=fields.get("trade_no")
            )
        if status in ("TRADE_SUCCESS", "TRADE_FINISHED"):
            captured = _captured(
                fields.get("trade_no"),
                attempt_id,
                order_no,
                fields.get("total_amount"),
                fields.get("gmt_payment"),
            )
            return (
                HookForged("malformed")
                if captured is None
                else HookPaid(event_id=event_id, captured=captured)
            )
        if status == "TRADE_CLOSED":
            return HookClosed(
                event_id=event_id, attempt_id=attempt_id, order_no=order_no, code="trade_closed"
            )
        return HookOther(event_id=event_id, kind=status)

    def hook_reply(self, ok: bool) -> HookAnswer:
        """Exactly the seven letters, nothing around them; whatever else comes makes Alipay send it again."""
        return HookAnswer(200, b"success" if ok else b"failure", "text/plain; charset=utf-8")


def _content(fields: Mapping[str, str]) -> bytes:
    return "&".join(f"{name}={value}" for name, value in sorted(fields.items())).encode()


def _no(reply: _Reply) -> NotDone | Refused | MaybeDone:
    """What a `code` other than 10000 means (公共错误码)."""
    code = reply.sub_code or f"code_{reply.code}"
    if code == "ACQ.TRADE_NOT_EXIST":
        return Refused("absent")
    if reply.code == "40005" or code in _NOT_NOW:
        return NotDone(code, counts=Result.IGNORED)
    if reply.code == "40004" and code not in _UNKNOWN:
        return Refused(code)
    if reply.code in (
        "20001",
        "40001",
        "40002",
        "40003",
        "40006",
    ):  # keys, rights, or how we write: all calls fail
        return Refused(code, other_may=True, counts=Result.FAILURE)
    return MaybeDone(code)


def _captured(
    trade_no: str | None, attempt_id: str, order_no: str, amount: str | None, paid_at: str | None
) -> Captured | None:
    amount_minor, at = money.minor_of(amount or "", "CNY"), _time(paid_at)
    if not trade_no or not amount_minor or at is None:
        return None
    return Captured(
        provider_ref=trade_no,
        attempt_id=attempt_id,
        order_no=order_no,
        amount_minor=amount_minor,
        currency="CNY",
        captured_at=at,
    )


def _time(text: str | None) -> datetime | None:
    """Beijing's time as Alipay writes it, in UTC."""
    try:
        return datetime.strptime(text or "", TIME).replace(tzinfo=BEIJING).astimezone(UTC)
    except ValueError:
        return None


def _out_trade_no(attempt_id: str) -> str:
    return attempt_id.replace("-", "_")


def _may_live(ref: AttemptRef) -> bool:
    """Whether a link that was handed out can still be opened. None was: nobody can open it."""
    return ref.expires_at is not None and datetime.now(UTC) < ref.expires_at + LINK_GRACE


_BILL_COLUMNS = ("支付宝交易号", "商户订单号", "业务类型", "完成时间", "订单金额（元）", "退款批次号/请求号")


def bill_lines(packed: bytes) -> list[BillLine] | None:
    """The captures and refunds of a day's zip: the details file (业务明细), GBK, comments with `#`, cells with tabs.

    None: not such a file. Lines of other products of the account (their numbers are not ours) are left out.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as folder:
            # Names are GBK without a flag that says so: zipfile reads them as CP437.
            names = {
                info.filename.encode("cp437", "replace").decode("gbk", "replace"): info
                for info in folder.infolist()
            }
            details = [info for name, info in names.items() if "业务明细" in name and "汇总" not in name] or [
                info
                for info in folder.infolist()
                if "业务明细" in info.filename and "汇总" not in info.filename
            ]
            if len(details) != 1 or details[0].file_size > BILL_MAX_BYTES:
                return None
            text = folder.read(details[0]).decode("gbk")
    except (zipfile.BadZipFile, UnicodeDecodeError, ValueError, NotImplementedError, RuntimeError):
        return None
    rows = csv.reader(line for line in io.StringIO(text) if not line.startswith("#"))
    heading = [cell.strip() for cell in next(rows, [])]
    try:
        place = {name: heading.index(name) for name in _BILL_COLUMNS}
    except ValueError:
        return None
    lines: list[BillLine] = []
    for row in rows:
        if len(row) < len(heading):
            continue
        value = {name: row[at].strip() for name, at in place.items()}
        number = value["商户订单号"]
        if _OUT_TRADE_NO.fullmatch(number) is None or value["业务类型"] not in ("交易", "退款"):
            continue
        refund = value["业务类型"] == "退款"
        amount_minor = money.minor_of(value["订单金额（元）"].removeprefix("-"), "CNY")
        at = _time(value["完成时间"])
        if amount_minor is None or at is None:
            return None
        attempt_id = number.replace("_", "-")
        lines.append(
            BillLine(
                kind="refund" if refund else "capture",
                provider_ref=value["支付宝交易号"],
                our_id=value["退款批次号/请求号"] if refund else attempt_id,
                order_no=attempt_id.partition("-")[0],
                amount_minor=amount_minor,
                currency="CNY",
                at=at,
            )
        )
    return lines
