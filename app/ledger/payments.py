# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Payment attempts: one function for each SQL intent; the caller owns the transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import orders

Row = dict[str, Any]

ATTEMPT_COLUMNS = (
    "id, order_no, attempt_no, provider, channel, state, kind, url, params, return_url, payer, provider_ref,"
    " amount_minor, currency, code, created_at, sent_at, expires_at, ended_at, tries, next_at, generation"
)


async def newest_attempts(conn: AsyncConnection, order_nos: Sequence[str]) -> dict[str, Row]:
    """order_no → its newest payment attempt, for those orders that have one: what the buyer is shown."""
    found = await conn.execute(
        text(
            f"SELECT DISTINCT ON (order_no) {ATTEMPT_COLUMNS} FROM payment_attempt"
            f" JOIN {orders.asked('order_nos')} USING (order_no) ORDER BY order_no, attempt_no DESC"
        ),
        {"order_nos": list(order_nos)},
    )
    return {row["order_no"]: dict(row) for row in found.mappings()}


# Attempts
#
# created ──► sent ──► succeeded        wanted: asked for while another is open; becomes created when that one is closed
#    │  └► unknown ─► closed            unknown: the supplier may have it; query, then close, before anything else
#    └► failed    └► succeeded          failed: declined or refused; closed: the link has ended, or was never made
#
# `sent_at` is written when an attempt is leased to be sent (before the call): a row in state created with `sent_at` set
# and its lease run out belonged to a worker that died in the middle of the call.

ATTEMPTS_MAX = 20  # of one order; a buyer who has asked for twenty links needs a person, not another link

_LEASE = (
    "WITH due AS (SELECT id, sent_at FROM payment_attempt WHERE {which}"
    " AND (leased_until IS NULL OR leased_until < now()) ORDER BY next_at LIMIT :limit FOR UPDATE SKIP LOCKED),"
    " leased AS (UPDATE payment_attempt AS a SET leased_until = now() + make_interval(secs => :lease_s),"
    " generation = a.generation + 1, tries = a.tries + 1,"
    " sent_at = CASE WHEN a.state = 'created' THEN coalesce(a.sent_at, now()) ELSE a.sent_at END"
    " FROM due WHERE a.id = due.id RETURNING a.*, due.sent_at AS was_sent_at)"
    " SELECT leased.id, leased.order_no, leased.attempt_no, leased.provider, leased.channel, leased.state, leased.kind,"
    " leased.return_url, leased.payer, leased.provider_ref, leased.amount_minor, leased.currency, leased.created_at,"
    " leased.expires_at, leased.tries, leased.generation, leased.was_sent_at, leased.code, now() AS now,"
    " o.state AS order_state, o.leaving, o.sale, o.buyer_id, o.pay_by, i.title,"
    " coalesce(o.pay_by, now() + make_interval(secs => o.pay_within_s)) AS link_until"
    " FROM leased JOIN purchase_order o ON o.order_no = leased.order_no"
    " JOIN item i ON i.sale = o.sale AND i.sku = o.sku"
)
# The lists are written out so that Postgres sees that the partial index `attempts_due` holds every such row.
_DUE = "state IN ('wanted', 'created', 'unknown') AND provider = :provider AND next_at <= now()"
_TO_START, _TO_START_AGAIN = (
    _LEASE.format(which=f"{_DUE} AND {tried}") for tried in ("tries = 0", "tries > 0")
)
_TO_POLL = _LEASE.format(which="state = 'sent' AND provider = :provider AND next_at <= now()")
# Where the buyer pays from is kept, sealed, for as long as a supplier may have to be told.
_FORGET = "payer = payer - 'address'"
_ONE = _LEASE.format(which="id = :id AND state IN ('wanted', 'created', 'sent', 'unknown')")


async def lease_starts(conn: AsyncConnection, provider: str, limit: int, lease_s: float) -> list[Row]:
    """Take due attempts that need a link and were never taken up, with what a link needs to know of the order."""
    found = await conn.execute(
        text(_TO_START), {"provider": provider, "limit": limit, "lease_s": float(lease_s)}
    )
    return [dict(row) for row in found.mappings()]


async def lease_again(conn: AsyncConnection, provider: str, limit: int, lease_s: float) -> list[Row]:
    """The same of those that came to no link when they were taken up before, or whose fate is unknown."""
    found = await conn.execute(
        text(_TO_START_AGAIN), {"provider": provider, "limit": limit, "lease_s": float(lease_s)}
    )
    return [dict(row) for row in found.mappings()]


async def lease_polls(conn: AsyncConnection, provider: str, limit: int, lease_s: float) -> list[Row]:
    """Take attempts with a link that are due for a look: its call-back may be lost, or its time over."""
    found = await conn.execute(
        text(_TO_POLL), {"provider": provider, "limit": limit, "lease_s": float(lease_s)}
    )
    return [dict(row) for row in found.mappings()]


async def lease_one(conn: AsyncConnection, attempt_id: str, lease_s: float) -> Row | None:
    """Take this attempt. None: another worker holds it, or it has ended."""
    found = await conn.execute(text(_ONE), {"id": attempt_id, "limit": 1, "lease_s": float(lease_s)})
    row = found.mappings().first()
    return None if row is None else dict(row)


async def attempt(conn: AsyncConnection, attempt_id: str) -> Row | None:
    """One attempt as it is."""
    found = await conn.execute(
        text(f"SELECT {ATTEMPT_COLUMNS} FROM payment_attempt WHERE id = :id"), {"id": attempt_id}
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def unended(conn: AsyncConnection, order_no: str) -> list[Row]:
    """The attempts of an order that may still lead to money, and one that waits for them."""
    found = await conn.execute(
        text(
            f"SELECT {ATTEMPT_COLUMNS} FROM payment_attempt WHERE order_no = :order_no"
            " AND state IN ('wanted', 'created', 'sent', 'unknown') ORDER BY attempt_no"
        ),
        {"order_no": order_no},
    )
    return [dict(row) for row in found.mappings()]


async def has_open(conn: AsyncConnection, order_no: str) -> bool:
    """Whether money may still arrive for this order. Ask inside the transaction that ends it, with the order locked."""
    found = await conn.execute(
        text(
            "SELECT EXISTS (SELECT FROM payment_attempt WHERE order_no = :order_no"
            " AND state IN ('created', 'sent', 'unknown'))"
        ),
        {"order_no": order_no},
    )
    return bool(found.scalar_one())


async def link_wait_s(conn: AsyncConnection, nth: int) -> float:
    """For how long the `nth` oldest reserved order without a link has been waiting for it, in s; 0: fewer wait.

    Only attempts that were not sent or certainly not done: one whose fate is unknown waits for its supplier, and may
    long, while others serve. What is written out lets Postgres use the partial index `attempts_due`.
    """
    found = await conn.execute(
        text(
            "SELECT CAST(extract(epoch FROM now() - a.created_at) AS double precision) FROM payment_attempt AS a"
            " JOIN purchase_order AS o ON o.order_no = a.order_no WHERE a.state = 'created'"
            " AND o.state = 'reserved' AND NOT o.leaving ORDER BY a.created_at OFFSET :skip LIMIT 1"
        ),
        {"skip": nth - 1},
    )
    return max(0.0, float(found.scalar() or 0.0))


async def add_attempt(
    conn: AsyncConnection,
    order: Row,
    *,
    provider: str,
    channel: str,
    return_url: str | None,
    payer: Mapping[str, Any] | None,
    state: str,
) -> str | None:
    """One more attempt of a locked order, due now: `created`, or `wanted` while another is open. None: too many."""
    found = await conn.execute(
        text(
            "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, return_url, payer,"
            " amount_minor, currency) SELECT CAST(:order_no AS text) || '-' || n, :order_no, n, :provider, :channel,"
            " :state, :return_url, CAST(:payer AS jsonb), :amount_minor, :currency"
            " FROM (SELECT coalesce(max(attempt_no), 0) + 1 AS n FROM payment_attempt"
            " WHERE order_no = :order_no) AS last WHERE n <= :most RETURNING id"
        ),
        {
            "order_no": order["order_no"],
            "provider": provider,
            "channel": channel,
            "state": state,
            "return_url": return_url,
            "payer": None if payer is None else msgspec.json.encode(payer).decode(),
            "amount_minor": order["amount_minor"],
            "currency": order["currency"],
            "most": ATTEMPTS_MAX,
        },
    )
    made = found.scalar_one_or_none()
    return None if made is None else str(made)


async def clock(conn: AsyncConnection) -> datetime:
    """Postgres' time of this moment: it decides what has passed."""
    found = await conn.execute(text("SELECT clock_timestamp()"))
    now: datetime = found.scalar_one()
    return now


# A supplier that has just had an attempt of the order that came to no link is not the one to ask next.
_TRIED = (
    "ARRAY(SELECT DISTINCT tried.provider FROM payment_attempt AS tried WHERE tried.order_no = {order_no}"
    " AND tried.state IN ('failed', 'closed') AND tried.expires_at IS NULL"
    " AND tried.ended_at > now() - make_interval(secs => :tried_s))"
)


async def tried(conn: AsyncConnection, order_no: str, tried_s: float) -> set[str]:
    """The suppliers where an attempt of this order has come to no link in the last `tried_s`."""
    found = await conn.execute(
        text("SELECT " + _TRIED.format(order_no=":order_no")), {"order_no": order_no, "tried_s": tried_s}
    )
    return set(found.scalar_one())


# What no supplier has been asked for: `sent_at` is written before the first call, and taken back only when it has
# certainly not happened.
_UNSENT = "sent_at IS NULL AND (leased_until IS NULL OR leased_until < now())"


async def unsent(
    conn: AsyncConnection,
    provider: str,
    channels: Sequence[str],
    due_since_s: float,
    tried_s: float,
    limit: int,
) -> list[Row]:
    """Attempts at a supplier, of these channels, that were due `due_since_s` ago and were not sent: what a new one
    needs to know, `tried` (suppliers, as above) and `fresh` (no worker has ever taken it up).
    """
    found = await conn.execute(
        text(
            "SELECT a.id, a.order_no, a.attempt_no, a.provider, a.channel, a.return_url, a.payer,"
            " a.state = 'wanted' OR a.tries = 0 AS fresh,"
            f" {_TRIED.format(order_no='a.order_no')} AS tried FROM payment_attempt AS a"
            " WHERE a.state IN ('wanted', 'created') AND a.provider = :provider"
            " AND a.channel = ANY(CAST(:channels AS text[]))"
            f" AND a.next_at <= now() - make_interval(secs => :due_since_s) AND {_UNSENT}"
            " ORDER BY a.next_at LIMIT :limit"
        ),
        {
            "provider": provider,
            "channels": list(channels),
            "due_since_s": due_since_s,
            "tried_s": tried_s,
            "limit": limit,
        },
    )
    return [dict(row) for row in found.mappings()]


async def foreign(conn: AsyncConnection, known: Sequence[str]) -> list[str]:
    """Suppliers beside the known ones that due attempts were never sent to."""
    found = await conn.execute(
        text(
            "SELECT DISTINCT provider FROM payment_attempt WHERE state IN ('wanted', 'created') AND next_at <= now()"
            f" AND provider <> ALL(CAST(:known AS text[])) AND {_UNSENT}"
        ),
        {"known": list(known)},
    )
    return [str(name) for name in found.scalars()]


async def redirect_fresh(conn: AsyncConnection, provider: str, others: Mapping[str, str]) -> int:
    """Attempts that no worker has taken up go to other suppliers: attempt id -> its new one. Returns how many."""
    found = await conn.execute(
        text(
            "UPDATE payment_attempt AS a SET provider = other.provider, generation = a.generation + 1, next_at = now()"
            " FROM unnest(CAST(:ids AS text[]), CAST(:others AS text[])) AS other (id, provider)"
            " WHERE a.id = other.id AND a.provider = :provider"
            f" AND (a.state = 'wanted' OR (a.state = 'created' AND a.tries = 0)) AND {_UNSENT}"
        ),
        {"provider": provider, "ids": list(others), "others": list(others.values())},
    )
    return int(found.rowcount)


async def end_unsent(conn: AsyncConnection, attempt_id: str, code: str) -> bool:
    """An attempt that has certainly not happened anywhere is over. False: it has been taken up, or has ended."""
    found = await conn.execute(
        text(
            "UPDATE payment_attempt SET state = 'failed', code = :code, ended_at = now(), leased_until = NULL,"
            f" {_FORGET}, generation = generation + 1 WHERE id = :id AND state = 'created' AND {_UNSENT}"
        ),
        {"id": attempt_id, "code": code},
    )
    return bool(found.rowcount)


async def redirect_wanted(
    conn: AsyncConnection,
    attempt_id: str,
    *,
    provider: str,
    channel: str,
    return_url: str | None,
    payer: Mapping[str, Any] | None,
) -> None:
    """An attempt that still waits goes through another channel: the buyer has changed their mind again."""
    await conn.execute(
        text(
            "UPDATE payment_attempt SET provider = :provider, channel = :channel, return_url = :return_url,"
            " payer = CAST(:payer AS jsonb), generation = generation + 1, leased_until = NULL, next_at = now()"
            " WHERE id = :id AND state = 'wanted'"
        ),
        {
            "id": attempt_id,
            "provider": provider,
            "channel": channel,
            "return_url": return_url,
            "payer": None if payer is None else msgspec.json.encode(payer).decode(),
        },
    )


async def store_link(
    conn: AsyncConnection,
    held: tuple[str, int],
    *,
    kind: str,
    url: str | None,
    params: Mapping[str, Any] | None,
    provider_ref: str | None,
    expires_at: datetime,
    look_in_s: float,
) -> bool:
    """The attempt has its link; it is looked at again after `look_in_s`. False: the lease `held` is no longer ours."""
    return await _change(
        conn,
        "state = 'sent', kind = :kind, url = :url, params = CAST(:params AS jsonb), provider_ref = :provider_ref,"
        f" {_FORGET}, expires_at = :expires_at, code = NULL, tries = 0, leased_until = NULL,"
        " next_at = now() + make_interval(secs => :look_in_s)",
        held,
        kind=kind,
        url=url,
        params=None if params is None else msgspec.json.encode(params).decode(),
        provider_ref=provider_ref,
        expires_at=expires_at,
        look_in_s=look_in_s,
    )


async def wait(
    conn: AsyncConnection, held: tuple[str, int], state: str, wait_s: float, code: str | None = None
) -> bool:
    """The attempt is looked at again after `wait_s`, in this state. False: the lease is no longer ours."""
    return await _change(
        conn,
        "state = :state, code = coalesce(:code, code), leased_until = NULL,"
        " next_at = now() + make_interval(secs => :wait_s)",
        held,
        state=state,
        code=code,
        wait_s=wait_s,
    )


async def start(conn: AsyncConnection, held: tuple[str, int], wait_s: float = 0.0) -> bool:
    """The attempt is to be sent (again) after `wait_s`, and certainly was not sent so far."""
    return await _change(
        conn,
        "state = 'created', sent_at = NULL, leased_until = NULL, next_at = now() + make_interval(secs => :wait_s)",
        held,
        wait_s=wait_s,
    )


async def end(conn: AsyncConnection, held: tuple[str, int], state: str, code: str | None) -> bool:
    """The attempt has ended (closed, failed, succeeded). False: the lease is no longer ours."""
    return await _change(
        conn,
        f"state = :state, code = :code, ended_at = now(), leased_until = NULL, {_FORGET}",
        held,
        state=state,
        code=code,
    )


async def end_by_hook(conn: AsyncConnection, attempt_id: str, state: str, code: str) -> bool:
    """The supplier says that this attempt is over; whoever is calling it finds its lease gone."""
    found = await conn.execute(
        text(
            "UPDATE payment_attempt SET state = :state, code = :code, ended_at = now(), leased_until = NULL,"
            f" {_FORGET}, generation = generation + 1 WHERE id = :id AND state IN ('created', 'sent', 'unknown')"
        ),
        {"id": attempt_id, "state": state, "code": code},
    )
    return bool(found.rowcount)


async def succeed(conn: AsyncConnection, attempt_id: str) -> bool:
    """The attempt has paid its order. False: another one is still open; it keeps its state until that is closed."""
    found = await conn.execute(
        text(
            "UPDATE payment_attempt AS a SET state = 'succeeded', code = NULL, ended_at = now(), leased_until = NULL,"
            f" {_FORGET},"
            " generation = generation + 1 WHERE id = :id AND state <> 'succeeded' AND NOT EXISTS (SELECT FROM"
            " payment_attempt AS other WHERE other.order_no = a.order_no AND other.id <> a.id"
            " AND other.state IN ('created', 'sent', 'unknown', 'succeeded'))"
        ),
        {"id": attempt_id},
    )
    return bool(found.rowcount)


async def hasten_all(conn: AsyncConnection, provider: str) -> int:
    """The supplier works again: whatever waited for it longer and longer is due now. Returns how many."""
    found = await conn.execute(
        text(
            "UPDATE payment_attempt SET next_at = now() WHERE provider = :provider"
            " AND state IN ('wanted', 'created', 'unknown') AND next_at > now()"
        ),
        {"provider": provider},
    )
    return int(found.rowcount)


async def hasten_wanted(conn: AsyncConnection, order_no: str) -> None:
    """The attempt that waited for another is due now."""
    await conn.execute(
        text("UPDATE payment_attempt SET next_at = now() WHERE order_no = :order_no AND state = 'wanted'"),
        {"order_no": order_no},
    )


async def look_at_others(conn: AsyncConnection, order_no: str, paid_attempt_id: str) -> None:
    """The other attempts of a paid order are due now: their links must be closed at the supplier."""
    await conn.execute(
        text(
            "UPDATE payment_attempt SET next_at = now() WHERE order_no = :order_no AND id <> :id"
            " AND state IN ('wanted', 'created', 'sent', 'unknown')"
        ),
        {"order_no": order_no, "id": paid_attempt_id},
    )


async def _change(conn: AsyncConnection, sets: str, held: tuple[str, int], **values: Any) -> bool:
    found = await conn.execute(
        text(
            f"UPDATE payment_attempt SET {sets} WHERE id = :id AND generation = :generation"
            " AND state IN ('wanted', 'created', 'sent', 'unknown')"
        ),
        {**values, "id": held[0], "generation": held[1]},
    )
    return bool(found.rowcount)
