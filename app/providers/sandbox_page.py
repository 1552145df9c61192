"""The page on which a buyer pays at the sandbox supplier, or declines."""

from __future__ import annotations

import html

from app.providers.sandbox_state import Pay

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
_STYLE = (
    "body{font:17px/1.5 system-ui,sans-serif;margin:0;display:grid;place-items:center;min-height:100vh;"
    "background:#f4f5f7;color:#16181d}main{background:#fff;border-radius:16px;padding:28px;width:min(88vw,360px);"
    "box-shadow:0 2px 16px #0001}h1{font-size:18px;margin:0 0 4px}.amount{font-size:34px;font-weight:650;margin:12px 0}"
    ".small{color:#667;font-size:14px}button,a.back{display:block;width:100%;box-sizing:border-box;padding:14px;"
    "border-radius:12px;border:0;font:inherit;font-weight:600;margin-top:12px;text-align:center;text-decoration:none;"
    "cursor:pointer}.pay{background:#1a7f4b;color:#fff}.decline,a.back{background:#e8eaee;color:#16181d}"
)
_SAYS = {
    "waiting": "Sandbox supplier: no money moves.",
    "paid": "Paid. Thank you. · 已付款",
    "declined": "Declined. Ask the shop for a new link. · 付款被拒绝",
    "closed": "This link has ended. · 链接已失效",
}


def _money(amount_minor: int, currency: str) -> str:
    # A display for a sandbox: two decimals unless the currency is known to have none (ISO 4217).
    if currency in ("JPY", "KRW", "VND", "CLP"):
        return f"{amount_minor} {currency}"
    return f"{amount_minor // 100}.{amount_minor % 100:02} {currency}"


def page_of(pay: Pay) -> str:
    esc = html.escape
    buttons = ""
    if pay.state == "waiting":
        buttons = (
            f'<form method="post" action="/pay/{esc(pay.ref)}/pay"><button class="pay">Pay · 付款</button></form>'
            f'<form method="post" action="/pay/{esc(pay.ref)}/decline">'
            '<button class="decline">Decline · 拒绝</button></form>'
        )
    elif pay.return_url and pay.return_url.startswith(("http://", "https://")):
        buttons = f'<a class="back" href="{esc(pay.return_url)}">Back to the shop · 返回商店</a>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Sandbox payment</title>'
        f"<style>{_STYLE}</style><main><h1>{esc(pay.title)}</h1>"
        f'<div class="small">Order {esc(pay.order_no)}</div>'
        f'<div class="amount">{esc(_money(pay.amount_minor, pay.currency))}</div>'
        f'<div class="small" role="status">{_SAYS[pay.state]}</div>{buttons}</main></html>'
    )
