"""A stand-in for WeChat Pay's API v3: checks every request's signature, signs every answer, seals every call-back.

Documentation (pay.weixin.qq.com): docs/merchant/development/interface-rules/signature-generation.html, …/certificate-
callback-decryption.html, docs/merchant/apis/platform-certificate/api-v3-get-certificates/get.html,
doc/v3/merchant/4012153196 and 4012154180 (public key: `Wechatpay-Serial: PUB_KEY_ID_…` in the request asks for it),
4013070360 (close: 204), 4012556654 (bill), wiki/doc/apiv3/apis/chapter3_2_5.shtml (call-back; its schedule).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from tests.providers.standins import loopback

BEIJING = timezone(timedelta(hours=8))
# 15s/15s/30s/3m/10m/20m/30m/30m/30m/60m/3h/3h/3h/6h/6h, 24 h 4 min in all
SCHEDULE_S = (15, 15, 30, 180, 600, 1200, 1800, 1800, 1800, 3600, 10800, 10800, 10800, 21600, 21600)
_AUTHORIZATION = re.compile(r'WECHATPAY2-SHA256-RSA2048 (?=.)((?:[a-z_]+="[^"]*",?)+)')
_PAIR = re.compile(r'([a-z_]+)="([^"]*)"')

HEADING = (
    "交易时间,公众账号ID,商户号,特约商户号,设备号,微信订单号,商户订单号,用户标识,交易类型,交易状态,付款银行,货币种类,"
    "应结订单金额,代金券金额,微信退款单号,商户退款单号,退款金额,充值券退款金额,退款类型,退款状态,商品名称,商户数据包,"
    "手续费,费率,订单金额,申请退款金额,费率备注"
)


def certificate(
    name: str, *, starts: timedelta = timedelta(days=-1), lives: timedelta = timedelta(days=1825)
) -> tuple[str, rsa.RSAPrivateKey, x509.Certificate]:
    """Serial as WeChat Pay writes it, key and certificate."""
    key = loopback.rsa_key(name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Tenpay.com {name}")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(b"\x51" + hashlib.sha1(name.encode()).digest()[1:]))
        .not_valid_before(now + starts)
        .not_valid_after(now + starts + lives)
        .sign(key, hashes.SHA256())
    )
    return f"{made.serial_number:X}", key, made


class WechatPayApi:
    def __init__(self, mchid: str = "1900000109", appid: str = "wxd678efh567hg6787") -> None:
        self.wanted: list[dict[str, Any]] = []  # every order that was asked for, as it came
        self.mchid, self.appid = mchid, appid
        self.apiv3_key = "0123456789abcdefghijABCDEFGHIJ__"
        self.merchant_serial, self.merchant_key, _ = certificate("merchant")
        self.certificates: dict[str, tuple[rsa.RSAPrivateKey, x509.Certificate]] = {}
        self.signs_with = ""
        self.public_key_id = ""
        self.public_key = loopback.rsa_key("wechat public key")
        self.orders: dict[str, dict[str, Any]] = {}
        self.refunds: dict[str, dict[str, Any]] = {}
        self.bills: dict[str, str] = {}
        self.nonces: set[str] = set()
        self.calls: list[str] = []
        self.faults = loopback.Faults()
        self.refund_status = "SUCCESS"
        self.forge_answers = False
        self.url = ""
        self.rotate("platform 1")

    def rotate(self, name: str) -> None:
        """A new platform certificate: listed beside the old ones, and used from now on."""
        serial, key, made = certificate(name)
        self.certificates[serial] = (key, made)
        self.signs_with = serial

    def use_public_key(self, key_id: str = "PUB_KEY_ID_0119000001092024092000000000000001") -> None:
        self.public_key_id = key_id

    def app(self) -> Starlette:
        paths: dict[tuple[str, str], loopback.Work] = {
            ("GET", "/v3/certificates"): self._list_certificates,
            ("POST", "/v3/pay/transactions/{product}"): self._create,
            ("GET", "/v3/pay/transactions/out-trade-no/{number}"): self._query,
            ("POST", "/v3/pay/transactions/out-trade-no/{number}/close"): self._close,
            ("POST", "/v3/refund/domestic/refunds"): self._refund,
            ("GET", "/v3/refund/domestic/refunds/{number}"): self._refund_query,
            ("GET", "/v3/bill/tradebill"): self._bill,
            ("GET", "/v3/billdownload/file"): self._download,
        }
        return loopback.routes(
            {route: self._checked(work) for route, work in paths.items()}, self.faults, self.calls
        )

    # -- the gate

    def _checked(self, work: loopback.Work) -> loopback.Work:
        def run(request: Request, body: bytes) -> Response:
            why = self._refusal(request, body)
            if why is not None:
                return self._answer(request, 401, {"code": "SIGN_ERROR", "message": why})
            return work(request, body)

        return run

    def _refusal(self, request: Request, body: bytes) -> str | None:
        found = _AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
        if found is None:
            return "Authorization is malformed"
        if not request.headers.get("user-agent") or request.headers.get("accept") != "application/json":
            return "User-Agent and Accept are needed"
        value = dict(_PAIR.findall(found[1]))
        if value.get("mchid") != self.mchid or value.get("serial_no") != self.merchant_serial:
            return "merchant or certificate unknown"
        if abs(time.time() - int(value["timestamp"])) > 300 or value["nonce_str"] in self.nonces:
            return "timestamp outside five minutes, or nonce used"
        self.nonces.add(value["nonce_str"])
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        message = (
            f"{request.method}\n{target}\n{value['timestamp']}\n{value['nonce_str']}\n".encode()
            + body
            + b"\n"
        )
        try:
            self.merchant_key.public_key().verify(
                base64.b64decode(value["signature"]), message, padding.PKCS1v15(), hashes.SHA256()
            )
        except InvalidSignature:
            return "signature wrong"
        return None

    def _sign(self, body: bytes, serial: str, at_s: int | None = None) -> dict[str, str]:
        stamp, nonce = str(int(time.time()) if at_s is None else at_s), secrets.token_hex(16)
        key = self.public_key if serial == self.public_key_id and serial else self.certificates[serial][0]
        message = f"{stamp}\n{nonce}\n".encode() + body + b"\n"
        if self.forge_answers:
            key = loopback.rsa_key("somebody else")
        return {
            "wechatpay-timestamp": stamp,
            "wechatpay-nonce": nonce,
            "wechatpay-serial": serial,
            "wechatpay-signature": base64.b64encode(
                key.sign(message, padding.PKCS1v15(), hashes.SHA256())
            ).decode(),
            "wechatpay-signature-type": "WECHATPAY2-SHA256-RSA2048",
        }

    def _answer(self, request: Request, status: int, content: object) -> Response:
        body = b"" if content is None else json.dumps(content, ensure_ascii=False).encode()
        asked = request.headers.get("wechatpay-serial", "")
        serial = asked if asked and asked == self.public_key_id else self.signs_with
        return Response(body, status, self._sign(body, serial), "application/json")

    # -- certificates

    def _seal(self, text: bytes, associated: str) -> dict[str, str]:
        nonce = secrets.token_hex(6)
        sealed = AESGCM(self.apiv3_key.encode()).encrypt(nonce.encode(), text, associated.encode())
        return {
            "algorithm": "AEAD_AES_256_GCM",
            "nonce": nonce,
            "associated_data": associated,
            "ciphertext": base64.b64encode(sealed).decode(),
        }

    def _list_certificates(self, request: Request, body: bytes) -> Response:
        return self._answer(
            request,
            200,
            {
                "data": [
                    {
                        "serial_no": serial,
                        "effective_time": made.not_valid_before_utc.astimezone(BEIJING).isoformat(),
                        "expire_time": made.not_valid_after_utc.astimezone(BEIJING).isoformat(),
                        "encrypt_certificate": self._seal(made.public_bytes(Encoding.PEM), "certificate"),
                    }
                    for serial, (_, made) in self.certificates.items()
                ]
            },
        )

    # -- orders

    def _create(self, request: Request, body: bytes) -> Response:
        product = request.path_params["product"]
        wanted = json.loads(body)
        number = wanted["out_trade_no"]
        self.wanted.append(wanted)
        if wanted["appid"] != self.appid or wanted["mchid"] != self.mchid:
            return self._answer(request, 400, {"code": "APPID_MCHID_NOT_MATCH", "message": "appid and mchid"})
        if not re.fullmatch(r"[0-9A-Za-z_|*@-]{6,32}", number) or wanted["amount"]["currency"] != "CNY":
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "out_trade_no"})
        if datetime.fromisoformat(wanted["time_expire"]) <= datetime.now(UTC):
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "time_expire"})
        if product == "jsapi" and not wanted.get("payer", {}).get("openid"):
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "payer.openid"})
        if product == "h5" and not wanted.get("scene_info", {}).get("payer_client_ip"):
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "scene_info"})
        order = self.orders.get(number)
        if order is not None and order["trade_state"] != "NOTPAY":
            code = "ORDERPAID" if order["trade_state"] == "SUCCESS" else "ORDER_CLOSED"
            return self._answer(request, 403 if code == "ORDERPAID" else 400, {"code": code, "message": code})
        self.orders.setdefault(
            number,
            {
                "appid": self.appid,
                "mchid": self.mchid,
                "out_trade_no": number,
                "trade_state": "NOTPAY",
                "attach": wanted.get("attach", ""),
                "amount": {"total": wanted["amount"]["total"], "currency": "CNY"},
            },
        )
        match product:
            case "native":
                return self._answer(
                    request, 200, {"code_url": f"weixin://wxpay/bizpayurl?pr={secrets.token_hex(4)}"}
                )
            case "h5":
                url = f"https://wx.tenpay.com/cgi-bin/mmpayweb-bin/checkmweb?prepay_id={number}&package=1"
                return self._answer(request, 200, {"h5_url": url})
            case "jsapi":
                return self._answer(request, 200, {"prepay_id": f"wx{secrets.token_hex(16)}"})
        return self._answer(request, 404, {"code": "RESOURCE_NOT_EXISTS", "message": product})

    def _query(self, request: Request, body: bytes) -> Response:
        order = self.orders.get(request.path_params["number"])
        if request.query_params.get("mchid") != self.mchid:
            return self._answer(request, 400, {"code": "MCH_NOT_EXISTS", "message": "mchid"})
        if order is None:
            return self._answer(request, 404, {"code": "ORDER_NOT_EXIST", "message": "订单不存在"})
        return self._answer(request, 200, order)

    def _close(self, request: Request, body: bytes) -> Response:
        order = self.orders.get(request.path_params["number"])
        if json.loads(body) != {"mchid": self.mchid}:
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "mchid"})
        if order is None:
            return self._answer(request, 404, {"code": "ORDER_NOT_EXIST", "message": "订单不存在"})
        if order["trade_state"] == "SUCCESS":
            return self._answer(request, 400, {"code": "ORDERPAID", "message": "订单已支付"})
        if order["trade_state"] == "USERPAYING":
            return self._answer(request, 400, {"code": "USERPAYING", "message": "用户支付中"})
        order["trade_state"] = "CLOSED"
        return self._answer(request, 204, None)

    def pay(self, number: str) -> dict[str, Any]:
        """The buyer pays; returns what the call-back says."""
        order = self.orders[number]
        assert order["trade_state"] == "NOTPAY"
        order.update(
            trade_state="SUCCESS",
            trade_type="NATIVE",
            transaction_id="4200" + str(int.from_bytes(secrets.token_bytes(8))).rjust(20, "0"),
            success_time=datetime.now(BEIJING).isoformat(timespec="seconds"),
            payer={"openid": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"},
        )
        order["amount"].update(payer_total=order["amount"]["total"], payer_currency="CNY")
        return order

    # -- refunds

    def _refund(self, request: Request, body: bytes) -> Response:
        wanted = json.loads(body)
        number = wanted["out_refund_no"]
        order = next(
            (one for one in self.orders.values() if one.get("transaction_id") == wanted["transaction_id"]),
            None,
        )
        if order is None:
            return self._answer(request, 404, {"code": "RESOURCE_NOT_EXISTS", "message": "订单不存在"})
        if number in self.refunds:
            same = self.refunds[number]["transaction_id"] == wanted["transaction_id"]
            same = same and self.refunds[number]["amount"]["refund"] == wanted["amount"]["refund"]
            if not same:
                return self._answer(request, 400, {"code": "INVALID_REQUEST", "message": "单号重复"})
            return self._answer(request, 200, self.refunds[number])
        back = sum(
            one["amount"]["refund"]
            for one in self.refunds.values()
            if one["transaction_id"] == wanted["transaction_id"]
        )
        if wanted["amount"]["total"] != order["amount"]["total"]:
            return self._answer(request, 400, {"code": "PARAM_ERROR", "message": "total"})
        if back + wanted["amount"]["refund"] > order["amount"]["total"]:
            return self._answer(request, 400, {"code": "INVALID_REQUEST", "message": "退款金额超限"})
        self.refunds[number] = {
            "refund_id": "5030" + secrets.token_hex(8),
            "out_refund_no": number,
            "transaction_id": wanted["transaction_id"],
            "out_trade_no": order["out_trade_no"],
            "status": self.refund_status,
            "amount": dict(wanted["amount"]),
        }
        return self._answer(request, 200, self.refunds[number])

    def _refund_query(self, request: Request, body: bytes) -> Response:
        found = self.refunds.get(request.path_params["number"])
        if found is None:
            return self._answer(request, 404, {"code": "RESOURCE_NOT_EXISTS", "message": "退款单不存在"})
        return self._answer(request, 200, found)

    # -- bill

    def bill_row(self, at: datetime, order: dict[str, Any], refund: dict[str, Any] | None = None) -> str:
        total = order["amount"]["total"]
        back = refund["amount"]["refund"] if refund else 0
        cells = [
            at.astimezone(BEIJING).strftime("%Y-%m-%d %H:%M:%S"), self.appid, self.mchid, "0", "",
            order["transaction_id"], order["out_trade_no"], "oUpF8u", "NATIVE", "REFUND" if refund else "SUCCESS",
            "OTHERS", "CNY", "0.00" if refund else _yuan(total), "0.00",
            refund["refund_id"] if refund else "0", refund["out_refund_no"] if refund else "0", _yuan(back), "0.00",
            "ORIGINAL" if refund else "", "SUCCESS" if refund else "", "Phone", order["attach"], "0.00000", "0.60%",
            "0.00" if refund else _yuan(total), _yuan(back), "",
        ]  # fmt: skip
        return ",".join("`" + cell for cell in cells)

    def _bill(self, request: Request, body: bytes) -> Response:
        day = request.query_params["bill_date"]
        rows = self.bills.get(day)
        if rows is None:
            return self._answer(request, 400, {"code": "NO_STATEMENT_EXIST", "message": "账单文件不存在"})
        if rows == "creating":
            return self._answer(request, 400, {"code": "STATEMENT_CREATING", "message": "账单生成中"})
        url = f"{self.url}/v3/billdownload/file?token={day}"
        digest = hashlib.sha1(self._file(day)).hexdigest()
        return self._answer(request, 200, {"hash_type": "SHA1", "hash_value": digest, "download_url": url})

    def _file(self, day: str) -> bytes:
        sums = "总交易单数,应结订单总金额,退款总金额,充值券退款总金额,手续费总金额,订单总金额,申请退款总金额"
        return f"\ufeff{HEADING}\r\n{self.bills[day]}\r\n{sums}\r\n`1,`1.00,`0.00,`0.00,`0.00,`1.00,`0.00\r\n".encode()

    def _download(self, request: Request, body: bytes) -> Response:
        # "该接口响应的信息请求头中不包含微信接口响应的签名值": files are not signed, their hash was
        return Response(self._file(request.query_params["token"]), 200, media_type="text/plain")

    # -- call-backs

    def note(
        self, event_type: str, resource: dict[str, Any], original: str = "transaction"
    ) -> dict[str, Any]:
        return {
            "id": secrets.token_hex(18),
            "create_time": datetime.now(BEIJING).isoformat(timespec="seconds"),
            "resource_type": "encrypt-resource",
            "event_type": event_type,
            "summary": "支付成功",
            "resource": {
                "original_type": original,
                **self._seal(json.dumps(resource, ensure_ascii=False).encode(), original),
            },
        }

    def signed(self, note: dict[str, Any], at_s: int | None = None) -> tuple[dict[str, str], bytes]:
        """Headers and body of one delivery; each try is signed anew, with the key of the day."""
        body = json.dumps(note, ensure_ascii=False).encode()
        serial = self.public_key_id or self.signs_with
        return {**self._sign(body, serial, at_s), "content-type": "application/json"}, body

    def refund_note(self, refund: dict[str, Any]) -> dict[str, Any]:
        return self.note(
            "REFUND.SUCCESS",
            {
                "mchid": self.mchid,
                "transaction_id": refund["transaction_id"],
                "out_trade_no": refund["out_trade_no"],
                "refund_id": refund["refund_id"],
                "out_refund_no": refund["out_refund_no"],
                "refund_status": "SUCCESS",
                "success_time": datetime.now(BEIJING).isoformat(timespec="seconds"),
                "amount": {**refund["amount"], "payer_total": 1, "payer_refund": 1},
            },
            "refund",
        )

    def deliver(self, url: str, note: dict[str, Any], speed: float = 1e7) -> tuple[int, bool]:
        return loopback.deliver(url, lambda: self.signed(note), SCHEDULE_S, accepted, speed)


def accepted(answer: httpx.Response) -> bool:
    """200 or 204 without a body that must be read; anything else is sent again."""
    return answer.status_code in (200, 204)


def _yuan(fen: int) -> str:
    return f"{fen // 100}.{fen % 100:02d}"
