# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Texts that are due, and what became of them; rows are written by the step of the order they tell of (orders._told).

due ──► sending ──► sent | failed | unknown      a lease that runs out in `sending` is unknown: it is never sent twice
  └► dropped (too late, overtaken, no contact)

`shown`: what the buyer is shown on the ticket, because no channel took it in time ('' = nothing to show). `counted`: it
has been counted under its number's limits; sent again later, it is the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]

_FACTS = (
    "o.buyer_id, o.contact, o.state AS order_state, o.amount_minor, o.currency, o.units, o.pay_within_s,"
    " i.title AS item_title, s.title AS sale_title"
)
_OF = "JOIN item i ON i.sale = o.sale AND i.sku = o.sku JOIN sale s ON s.id = o.sale"


async def lease_due(conn: AsyncConnection, limit: int, lease_s: float, ttl_s: float) -> list[Row]:
    """Take due texts younger than `ttl_s`, with what they tell of. They are `sending` before anything is sent."""
    found = await conn.execute(
        text(
            "WITH picked AS (SELECT id FROM sms WHERE state = 'due' AND next_at <= now() AND expires_at > now()"
            " AND created_at > now() - make_interval(secs => :ttl)"
            " ORDER BY next_at LIMIT :limit FOR UPDATE SKIP LOCKED),"
            " leased AS (UPDATE sms AS s SET state = 'sending', leased_until = now() + make_interval(secs => :lease_s),"
            " generation = s.generation + 1, tries = s.tries + 1 FROM picked WHERE s.id = picked.id RETURNING s.*)"
            " SELECT leased.id, leased.order_no, leased.sale, leased.template, leased.tries, leased.generation,"
            f" leased.counted, {_FACTS} FROM leased JOIN purchase_order o ON o.order_no = leased.order_no {_OF}"
        ),
        {"limit": limit, "lease_s": float(lease_s), "ttl": float(ttl_s)},
    )
    return [dict(row) for row in found.mappings()]


async def again(
    conn: AsyncConnection, held: tuple[str, int], wait_s: float, code: str, *, counted: bool = False
) -> bool:
    """It certainly was not sent: due again after `wait_s`. False: the lease is no longer ours."""
    found = await conn.execute(
        text(
            "UPDATE sms SET state = 'due', code = :code, leased_until = NULL, counted = counted OR :counted,"
            " next_at = now() + make_interval(secs => :wait_s)"
            " WHERE id = :id AND generation = :generation AND state = 'sending'"
        ),
        {"id": held[0], "generation": held[1], "wait_s": wait_s, "code": code, "counted": counted},
    )
    return bool(found.rowcount)


async def end(
    conn: AsyncConnection,
    held: tuple[str, int],
    state: str,
    *,
    code: str | None = None,
    provider: str | None = None,
    provider_ref: str | None = None,
) -> bool:
    """What became of it: sent, failed, unknown or dropped. False: the lease is no longer ours."""
    found = await conn.execute(
        text(
            "UPDATE sms SET state = :state, code = :code, provider = :provider, provider_ref = :provider_ref,"
            " leased_until = NULL, sent_at = CASE WHEN :state = 'sent' THEN now() ELSE sent_at END"
            " WHERE id = :id AND generation = :generation AND state = 'sending'"
        ),
        {
            "id": held[0],
            "generation": held[1],
            "state": state,
            "code": code,
            "provider": provider,
            "provider_ref": provider_ref,
        },
    )
    return bool(found.rowcount)


async def sweep(conn: AsyncConnection, ttl_s: float) -> tuple[int, int]:
    """(dropped, unknown): texts that would come too late, and those whose worker vanished while sending."""
    dropped = await conn.execute(
        text(
            "UPDATE sms SET state = 'dropped', code = coalesce(code, 'too_late')"
            " WHERE state = 'due' AND least(expires_at, created_at + make_interval(secs => :ttl)) <= now()"
        ),
        {"ttl": float(ttl_s)},
    )
    unknown = await conn.execute(
        text(
            "UPDATE sms SET state = 'unknown', code = 'worker_gone', leased_until = NULL"
            " WHERE state = 'sending' AND leased_until < now()"
        )
    )
    return int(dropped.rowcount), int(unknown.rowcount)


async def report(
    conn: AsyncConnection, provider: str, provider_ref: str, arrived: bool, code: str | None
) -> bool:
    """A sent text has arrived, or never will: then it has failed, and is shown on the ticket; it is not sent again.

    False: nothing changed (a copy, one that came too late, or a text that is not ours).
    """
    found = await conn.execute(
        text(
            "UPDATE sms SET delivered_at = CASE WHEN :arrived THEN now() END,"
            " state = CASE WHEN :arrived THEN state ELSE 'failed' END,"
            " code = CASE WHEN :arrived THEN code ELSE coalesce(:code, 'not_delivered') END"
            " WHERE provider = :provider AND provider_ref = :ref AND state = 'sent' AND delivered_at IS NULL"
        ),
        {"provider": provider, "ref": provider_ref, "arrived": arrived, "code": code},
    )
    return bool(found.rowcount)


async def unshown(conn: AsyncConnection, after_s: float, limit: int) -> list[Row]:
    """Locked: texts that failed, may have, or wait longer than `after_s`, and are not on the ticket yet; with facts."""
    found = await conn.execute(
        text(
            f"SELECT t.id, t.order_no, t.sale, t.template, {_FACTS} FROM sms t"
            f" JOIN purchase_order o ON o.order_no = t.order_no {_OF}"
            " WHERE t.shown IS NULL AND t.state IN ('due', 'unknown', 'failed')"
            " AND (t.state <> 'due' OR t.created_at < now() - make_interval(secs => :after))"
            " ORDER BY t.created_at LIMIT :limit FOR UPDATE OF t SKIP LOCKED"
        ),
        {"after": float(after_s), "limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def show(conn: AsyncConnection, ids: Sequence[str], bodies: Sequence[str]) -> None:
    """What is shown on the ticket instead; '' = nothing. The caller bumps the orders."""
    await conn.execute(
        text(
            "UPDATE sms SET shown = new.body FROM unnest(CAST(:ids AS text[]), CAST(:bodies AS text[]))"
            " AS new (id, body) WHERE sms.id = new.id"
        ),
        {"ids": list(ids), "bodies": list(bodies)},
    )


async def shown(conn: AsyncConnection, numbers: Sequence[str]) -> dict[str, dict[str, str]]:
    """order_no → template → the text that its ticket shows, for those of these orders that have one."""
    found = await conn.execute(
        text(
            "SELECT order_no, template, shown FROM sms WHERE order_no = ANY(CAST(:numbers AS text[]))"
            " AND shown <> ''"
        ),
        {"numbers": list(numbers)},
    )
    texts: dict[str, dict[str, str]] = {}
    for row in found:
        texts.setdefault(row.order_no, {})[row.template] = row.shown
    return texts
