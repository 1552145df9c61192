"""A stand-in for Alipay's gateway: checks RSA2 over all parameters, signs answers over the exact inner bytes.

Documentation: opendocs.alipay.com (alipay.trade.page.pay and its siblings; 异步通知说明: call-backs are form posts,
`success` stops them); developer.aliyun.com/article/710933: a trade comes into being when the buyer opens the link;
article/707638: bills are zip files of GBK CSV, addresses good for 30 s. Schedule of call-backs: 4 m, 10 m, 10 m, 1 h,
2 h, 6 h, 15 h.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import time
import zipfile
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qsl, quote_plus, urlsplit

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from tests.providers.standins import loopback

BEIJING = timezone(timedelta(hours=8))
TIME = "%Y-%m-%d %H:%M:%S"
SCHEDULE_S = (240, 600, 600, 3600, 7200, 21600, 54000)
HEADING = (
    "支付宝交易号,商户订单号,业务类型,商品名称,创建时间,完成时间,门店编号,门店名称,操作员,终端号,对方账户,订单金额（元）,"
    "商家实收（元）,支付宝红包（元）,集分宝（元）,支付宝优惠（元）,商家优惠（元）,券核销金额（元）,券名称,商家红包消费金额（元）,"
    "卡消费金额（元）,退款批次号/请求号,服务费（元）,分润（元）,备注"
)


class AlipayGateway:
    def __init__(self, app_id: str = "2021000000000001", seller_id: str = "2088000000000001") -> None:
        self.app_id, self.seller_id = app_id, seller_id
        self.merchant_key = loopback.rsa_key("alipay merchant")
        self.key = loopback.rsa_key("alipay")
        self.cert_sn = ""  # set in certificate mode
        self.app_cert_sn = ""
        self.root_cert_sn = ""
        self.trades: dict[str, dict[str, Any]] = {}
        self.refunds: dict[tuple[str, str], int] = {}
        self.bills: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.methods: list[str] = []
        self.faults = loopback.Faults()
        self.next_sub_code: tuple[str, str] | None = None
        self.forge_answers = False
        self.url = ""

    def app(self) -> Starlette:
        return loopback.routes(
            {
                ("POST", "/gateway.do"): self._gateway,
                ("GET", "/downloadBillFile.resource"): self._download,
            },
            self.faults,
            self.calls,
        )

    # -- the gate

    def _verified(self, fields: dict[str, str]) -> bool:
        """sign covers every other parameter that is not empty, sorted (opendocs.alipay.com, 自行实现签名)."""
        given = fields.get("sign", "")
        rest = {name: value for name, value in fields.items() if name != "sign" and value}
        message = "&".join(f"{name}={rest[name]}" for name in sorted(rest)).encode()
        try:
            self.merchant_key.public_key().verify(
                base64.b64decode(given), message, padding.PKCS1v15(), hashes.SHA256()
            )
        except (InvalidSignature, ValueError):
            return False
        return fields.get("app_id") == self.app_id and fields.get("sign_type") == "RSA2"

    def _gateway(self, request: Request, body: bytes) -> Response:
        fields = dict(parse_qsl(request.url.query, keep_blank_values=True))
        fields |= dict(parse_qsl(body.decode(), keep_blank_values=True))
        method = fields.get("method", "")
        self.methods.append(method)
        if not self._verified(fields):
            inner = {"code": "40002", "msg": "Invalid Arguments", "sub_code": "isv.invalid-signature"}
            return Response(json.dumps({"error_response": inner}), media_type="text/html;charset=utf-8")
        sent = datetime.strptime(fields["timestamp"], TIME).replace(tzinfo=BEIJING)
        if abs((sent - datetime.now(UTC)).total_seconds()) > 900:
            return self._answer(method, {"code": "40002", "sub_code": "isv.invalid-timestamp"})
        if self.cert_sn and fields.get("app_cert_sn") != self.app_cert_sn:
            return self._answer(method, {"code": "40002", "sub_code": "isv.missing-app-cert-sn"})
        if self.cert_sn and fields.get("alipay_root_cert_sn") != self.root_cert_sn:
            return self._answer(method, {"code": "40002", "sub_code": "isv.missing-root-cert-sn"})
        content = json.loads(fields["biz_content"])
        work = {
            "alipay.trade.precreate": self._precreate,
            "alipay.trade.query": self._query,
            "alipay.trade.close": self._close,
            "alipay.trade.refund": self._refund,
            "alipay.trade.fastpay.refund.query": self._refund_query,
            "alipay.data.dataservice.bill.downloadurl.query": self._bill,
        }.get(method)
        if self.next_sub_code is not None:
            (code, sub_code), self.next_sub_code = self.next_sub_code, None
            return self._answer(method, {"code": code, "msg": "No", "sub_code": sub_code})
        return self._answer(method, _no("isv.invalid-method") if work is None else work(content))

    def _answer(self, method: str, inner: dict[str, Any]) -> Response:
        # Written by hand: what is signed is these very bytes, with the escapes and blanks as they are.
        raw = json.dumps({"msg": "Success", **inner}, ensure_ascii=False, separators=(", ", ":"))
        key = loopback.rsa_key("somebody else") if self.forge_answers else self.key
        sign = base64.b64encode(key.sign(raw.encode(), padding.PKCS1v15(), hashes.SHA256())).decode()
        name = method.replace(".", "_") + "_response"
        serial = f',"alipay_cert_sn":"{self.cert_sn}"' if self.cert_sn else ""
        return Response(f'{{"{name}":{raw}{serial},"sign":"{sign}"}}', media_type="text/html;charset=utf-8")

    # -- what buyers do

    def open_link(self, url: str) -> str:
        """The buyer opens a page link and signs in: the trade comes into being. Returns its out_trade_no."""
        fields = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
        assert self._verified(fields), "Alipay would show 验签出错"
        return self._make(json.loads(fields["biz_content"]), fields.get("notify_url"))

    def _make(self, content: dict[str, Any], notify_url: str | None) -> str:
        number = str(content["out_trade_no"])
        ends = datetime.strptime(content["time_expire"], TIME).replace(tzinfo=BEIJING)
        assert datetime.now(UTC) < ends, "the link has ended"
        self.trades.setdefault(
            number,
            {
                "out_trade_no": number,
                "trade_no": datetime.now(BEIJING).strftime("%Y%m%d") + secrets.token_hex(8),
                "trade_status": "WAIT_BUYER_PAY",
                "total_amount": content["total_amount"],
                "subject": content["subject"],
                "notify_url": notify_url,
                "created": datetime.now(BEIJING).strftime(TIME),
            },
        )
        return number

    def pay(self, number: str) -> dict[str, Any]:
        trade = self.trades[number]
        assert trade["trade_status"] == "WAIT_BUYER_PAY"
        trade.update(trade_status="TRADE_SUCCESS", send_pay_date=datetime.now(BEIJING).strftime(TIME))
        return trade

    # -- methods

    def _precreate(self, content: dict[str, Any]) -> dict[str, Any]:
        trade = self.trades.get(content["out_trade_no"])
        if trade is not None and trade["trade_status"] != "WAIT_BUYER_PAY":
            paid = trade["trade_status"] in ("TRADE_SUCCESS", "TRADE_FINISHED")
            return _no("ACQ.TRADE_HAS_SUCCESS" if paid else "ACQ.TRADE_HAS_CLOSE")
        return {
            "code": "10000",
            "out_trade_no": content["out_trade_no"],
            "qr_code": f"https://qr.alipay.com/bax0{secrets.token_hex(8)}",
        }

    def _query(self, content: dict[str, Any]) -> dict[str, Any]:
        trade = self.trades.get(content.get("out_trade_no", ""))
        if trade is None:
            return _no("ACQ.TRADE_NOT_EXIST")
        names = ("out_trade_no", "trade_no", "trade_status", "total_amount", "send_pay_date", "subject")
        return {"code": "10000", **{name: trade[name] for name in names if name in trade}}

    def _close(self, content: dict[str, Any]) -> dict[str, Any]:
        trade = self.trades.get(content.get("out_trade_no", ""))
        if trade is None:
            return _no("ACQ.TRADE_NOT_EXIST")
        if trade["trade_status"] != "WAIT_BUYER_PAY":
            return _no("ACQ.TRADE_STATUS_ERROR")
        trade["trade_status"] = "TRADE_CLOSED"
        return {"code": "10000", "out_trade_no": trade["out_trade_no"], "trade_no": trade["trade_no"]}

    def _refund(self, content: dict[str, Any]) -> dict[str, Any]:
        trade = next((one for one in self.trades.values() if one["trade_no"] == content["trade_no"]), None)
        if trade is None:
            return _no("ACQ.TRADE_NOT_EXIST")
        key = (content["trade_no"], content["out_request_no"])
        fen = _fen(content["refund_amount"])
        if key in self.refunds:
            if self.refunds[key] != fen:
                return _no("ACQ.REASON_TRADE_REFUND_FEE_ERR")
            return {"code": "10000", "trade_no": trade["trade_no"], "fund_change": "N"}
        back = sum(one for (number, _), one in self.refunds.items() if number == content["trade_no"])
        if back + fen > _fen(trade["total_amount"]):
            return _no("ACQ.REFUND_AMT_NOT_EQUAL_TOTAL")
        self.refunds[key] = fen
        if back + fen == _fen(trade["total_amount"]):
            trade["trade_status"] = "TRADE_CLOSED"
        return {"code": "10000", "trade_no": trade["trade_no"], "fund_change": "Y"}

    def _refund_query(self, content: dict[str, Any]) -> dict[str, Any]:
        key = (content["trade_no"], content["out_request_no"])
        if key not in self.refunds:
            return {"code": "10000"}
        return {
            "code": "10000",
            "trade_no": content["trade_no"],
            "out_request_no": content["out_request_no"],
            "refund_status": "REFUND_SUCCESS",
            "refund_amount": _yuan(self.refunds[key]),
        }

    # -- bill

    def make_bill(self, rows: list[list[str]]) -> bytes:
        lines = ["#支付宝业务明细查询", f"#账号：[{self.seller_id}0156]", "#-----业务明细列表-----", HEADING]
        lines += [",".join(cell + "\t" for cell in row) for row in rows]
        lines += ["#-----业务明细列表结束-----", f"#导出时间：[{datetime.now(BEIJING).strftime(TIME)}]"]
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as folder:
            for name in ("业务明细", "业务明细(汇总)"):
                info = zipfile.ZipInfo(
                    f"{self.seller_id}0156_20261111_{name}.csv".encode("gbk").decode("cp437")
                )
                folder.writestr(info, "\r\n".join(lines).encode("gbk"))
        return packed.getvalue()

    def bill_row(
        self, trade: dict[str, Any], at: datetime, refund: tuple[str, int] | None = None
    ) -> list[str]:
        amount = trade["total_amount"] if refund is None else "-" + _yuan(refund[1])
        row = [""] * len(HEADING.split(","))
        row[:6] = [
            trade["trade_no"], trade["out_trade_no"], "退款" if refund else "交易", "Phone",
            trade["created"], at.astimezone(BEIJING).strftime(TIME),
        ]  # fmt: skip
        row[11] = row[12] = amount
        row[21] = refund[0] if refund else ""
        return row

    def _bill(self, content: dict[str, Any]) -> dict[str, Any]:
        if content["bill_date"] not in self.bills:
            return _no("isp.bill_not_exist")
        url = f"{self.url}/downloadBillFile.resource?bizType=trade&token={content['bill_date']}"
        return {"code": "10000", "bill_download_url": url}

    def _download(self, request: Request, body: bytes) -> Response:
        return Response(self.bills[request.query_params["token"]], media_type="application/zip")

    # -- call-backs

    def note(self, trade: dict[str, Any], **changes: str) -> dict[str, str]:
        """The fields of a call-back, as the documentation's example has them; notify_id is the same for every try."""
        return {
            "gmt_create": trade["created"],
            "charset": "utf-8",
            "gmt_payment": trade.get("send_pay_date", ""),
            "notify_time": datetime.now(BEIJING).strftime(TIME),
            "subject": trade["subject"],
            "buyer_id": "2088102116773037",
            "version": "1.0",
            "notify_id": secrets.token_hex(17),
            "notify_type": "trade_status_sync",
            "out_trade_no": trade["out_trade_no"],
            "total_amount": trade["total_amount"],
            "trade_status": trade["trade_status"],
            "refund_fee": "0.00",
            "trade_no": trade["trade_no"],
            "auth_app_id": self.app_id,
            "receipt_amount": trade["total_amount"],
            "app_id": self.app_id,
            "seller_id": self.seller_id,
            **changes,
        }

    def signed(self, note: dict[str, str]) -> tuple[dict[str, str], bytes]:
        message = "&".join(f"{name}={note[name]}" for name in sorted(note)).encode()
        sign = base64.b64encode(self.key.sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()
        fields = {**note, "sign": sign, "sign_type": "RSA2"}
        body = "&".join(f"{name}={quote_plus(value, safe='*')}" for name, value in fields.items()).encode()
        return {"content-type": "application/x-www-form-urlencoded; text/html; charset=utf-8"}, body

    def deliver(self, url: str, note: dict[str, str], speed: float = 1e7) -> tuple[int, bool]:
        def make() -> tuple[dict[str, str], bytes]:
            return self.signed(
                {**note, "notify_time": datetime.fromtimestamp(time.time(), BEIJING).strftime(TIME)}
            )

        return loopback.deliver(url, make, SCHEDULE_S, accepted, speed)


def accepted(answer: httpx.Response) -> bool:
    """Exactly `success`, seven letters."""
    return answer.status_code == 200 and answer.content == b"success"


def _no(sub_code: str) -> dict[str, Any]:
    return {"code": "40004", "msg": "Business Failed", "sub_code": sub_code, "sub_msg": "不可以"}


def _fen(text: str) -> int:
    whole, _, rest = text.partition(".")
    assert len(rest) == 2
    return int(whole) * 100 + int(rest)


def _yuan(fen: int) -> str:
    return f"{fen // 100}.{fen % 100:02d}"
