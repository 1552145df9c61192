# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Payment attempts, captures and refunds: one function for each SQL intent; the caller owns the transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import asyncpg
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


# Call-backs and captures


async def inbox_add(
    conn: AsyncConnection, provider: str, event_id: str, kind: str, digest: bytes, outcome: str
) -> bool:
    """A verified call-back is on record. False: it was before; do nothing again."""
    found = await conn.execute(
        text(
            "INSERT INTO webhook_inbox (provider, event_id, kind, body, outcome)"
            " VALUES (:provider, :event_id, :kind, :body, :outcome) ON CONFLICT (provider, event_id) DO NOTHING"
        ),
        {"provider": provider, "event_id": event_id, "kind": kind, "body": digest, "outcome": outcome},
    )
    return bool(found.rowcount)


async def capture_add(
    conn: AsyncConnection,
    *,
    provider: str,
    provider_ref: str,
    order_no: str,
    attempt_id: str,
    amount_minor: int,
    currency: str,
    captured_at: datetime,
) -> int | None:
    """Money has verifiably arrived: on record as `due`, whatever is decided next. None: it was on record before."""
    found = await conn.execute(
        text(
            "INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state,"
            " captured_at) VALUES (:provider, :provider_ref, :order_no, :attempt_id, :amount_minor, :currency, 'due',"
            " :captured_at) ON CONFLICT (provider, provider_ref) DO NOTHING RETURNING id"
        ),
        {
            "provider": provider,
            "provider_ref": provider_ref,
            "order_no": order_no,
            "attempt_id": attempt_id,
            "amount_minor": amount_minor,
            "currency": currency,
            "captured_at": captured_at,
        },
    )
    made = found.scalar_one_or_none()
    return None if made is None else int(made)


# The plain case of a call-back: verified money for a reserved order, told for the first time. One statement, so one
# round trip and one commit, and the item's row (which every order wants) is locked for that long only. It does what
# inbox_add, capture_add, orders.pay, keep, succeed and look_at_others do one after the other (a test compares), or,
# where anything is not plain, nothing. A row that another transaction holds is waited for and looked at again.
_PAY_PLAINLY = """
WITH heard AS (SELECT FROM webhook_inbox WHERE provider = $1 AND event_id = $2),
plain AS (SELECT o.order_no FROM purchase_order o JOIN payment_attempt a ON a.id = $5 AND a.order_no = o.order_no
  AND a.provider = $1 AND a.amount_minor = $7 AND a.currency = $8
  WHERE o.order_no = $6 AND o.state = 'reserved' AND NOT EXISTS (SELECT FROM heard)
  AND NOT EXISTS (SELECT FROM capture WHERE provider = $1 AND provider_ref = $4) FOR UPDATE OF o),
inbox AS (INSERT INTO webhook_inbox (provider, event_id, kind, body, outcome)
  SELECT $1, $2, 'paid', $3, 'paid' FROM plain),
kept AS (INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at)
  SELECT $1, $4, $6, $5, $7, $8, 'kept', $9 FROM plain),
paid AS (UPDATE purchase_order AS o SET state = 'paid', paid_at = now(), version = version + 1, leaving = FALSE,
  reason = NULL, leased_until = NULL FROM plain WHERE o.order_no = plain.order_no AND o.state = 'reserved'
  RETURNING o.order_no, o.sale, o.sku, o.seq, o.epoch, o.buyer_id, o.units, o.amount_minor, o.currency, o.version,
  o.contact),
moved AS (UPDATE item SET reserved = reserved - paid.units, sold = sold + paid.units FROM paid
  WHERE item.sale = paid.sale AND item.sku = paid.sku),
told AS (INSERT INTO event (id, type, sale, order_no, version, data)
  SELECT 'evt-' || order_no || '-' || version || '-paid', 'order.paid', sale, order_no, version, jsonb_build_object(
  'order_no', order_no, 'sale', sale, 'sku', sku, 'buyer_id', buyer_id, 'units', units, 'amount_minor', amount_minor,
  'currency', currency, 'state', 'paid', 'reason', NULL) FROM paid ON CONFLICT (id) DO NOTHING),
texted AS (INSERT INTO sms (id, order_no, sale, template, state, expires_at)
  SELECT order_no || '-paid', order_no, sale, 'paid', 'due', now() + make_interval(secs => $10) FROM paid
  WHERE contact IS NOT NULL ON CONFLICT (order_no, template) DO NOTHING),
marked AS (INSERT INTO outbox (kind, sale, epoch, order_no, payload)
  SELECT 'mark', sale, epoch, order_no, jsonb_build_object('sku', sku, 'seq', seq) FROM paid),
succeeded AS (UPDATE payment_attempt AS a SET state = 'succeeded', code = NULL, ended_at = now(), leased_until = NULL,
  payer = payer - 'address', generation = generation + 1 FROM paid
  WHERE a.id = $5 AND a.state <> 'succeeded' AND NOT EXISTS (SELECT FROM payment_attempt AS other
  WHERE other.order_no = $6 AND other.id <> $5 AND other.state IN ('created', 'sent', 'unknown', 'succeeded'))),
others AS (UPDATE payment_attempt AS a SET next_at = now() FROM paid WHERE a.order_no = $6 AND a.id <> $5
  AND a.state IN ('wanted', 'created', 'sent', 'unknown'))
SELECT CASE WHEN EXISTS (SELECT FROM heard) THEN 'duplicate' WHEN EXISTS (SELECT FROM paid) THEN 'paid' END
"""


async def pay_plainly(
    conn: AsyncConnection,
    *,
    provider: str,
    event_id: str,
    digest: bytes,
    provider_ref: str,
    order_no: str,
    attempt_id: str,
    amount_minor: int,
    currency: str,
    captured_at: datetime,
) -> Literal["paid", "duplicate"] | None:
    """The plain call-back, in one statement that commits by itself (`engine.alone`). None: not plain, or not certain.

    None changes nothing, or, where the connection was lost, may have: the long way looks before it acts, and says what
    is wrong.
    """
    raw = (await conn.get_raw_connection()).driver_connection
    assert raw is not None
    try:
        found: Literal["paid", "duplicate"] | None = await raw.fetchval(
            _PAY_PLAINLY, provider, event_id, digest, provider_ref, attempt_id, order_no, amount_minor, currency,
            captured_at, float(orders.SMS_TTL_S),
        )  # fmt: skip
    except (asyncpg.PostgresError, asyncpg.InterfaceError):
        return None  # such as a unique index: a copy of this call-back was faster
    return found


CAPTURE_COLUMNS = (
    "id, provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at,"
    " recorded_at"
)


async def capture(conn: AsyncConnection, capture_id: int) -> Row | None:
    """One capture; locked until the caller's transaction ends."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE id = :id FOR UPDATE"), {"id": capture_id}
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def kept_capture(conn: AsyncConnection, order_no: str) -> Row | None:
    """The capture that pays this order."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE order_no = :order_no AND state = 'kept'"),
        {"order_no": order_no},
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def captures(conn: AsyncConnection, order_no: str) -> list[Row]:
    """Every capture of an order, oldest first."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE order_no = :order_no ORDER BY id"),
        {"order_no": order_no},
    )
    return [dict(row) for row in found.mappings()]


async def due_captures(conn: AsyncConnection, limit: int) -> list[Row]:
    """Money that arrived for an ended order and is not weighed yet, oldest first."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE state = 'due' ORDER BY id LIMIT :limit"),
        {"limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def keep(conn: AsyncConnection, capture_id: int) -> bool:
    """This capture pays its order. False: it was weighed before."""
    found = await conn.execute(
        text("UPDATE capture SET state = 'kept' WHERE id = :id AND state = 'due'"), {"id": capture_id}
    )
    return bool(found.rowcount)


async def give_back(conn: AsyncConnection, capture_id: int, reason: str) -> bool:
    """This capture is refunded whole: its refund is due from now on. False: it was weighed before."""
    found = await conn.execute(
        text("UPDATE capture SET state = 'refund_due' WHERE id = :id AND state = 'due' RETURNING id"),
        {"id": capture_id},
    )
    if found.scalar_one_or_none() is None:
        return False
    await conn.execute(
        text(
            "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, state)"
            " SELECT order_no || '-R' || id || '-1', id, order_no, amount_minor, currency, :reason, 'due'"
            " FROM capture WHERE id = :id"
        ),
        {"id": capture_id, "reason": reason},
    )
    return True


# Refunds


class RefundAsked(NamedTuple):
    """The refund is on its way; `order` is the row as it is now."""

    refund_id: str
    order: Row


class RefundRefused(NamedTuple):
    """Nothing changed. code: no_such_order | not_paid | nothing_captured | amount_wrong | restock_needs_whole"""

    code: str


async def ask_refund(
    conn: AsyncConnection, order_no: str, amount_minor: int | None, restock: bool, reason: str
) -> RefundAsked | RefundRefused:
    """Money of a paid order goes back: all that is left of it (None), or a part.

    The whole: the order is `refunding`, and `refunded` once the supplier has done it; restock: its units then go back
    into the sale. A part: the order stays paid, and an adjustment line lowers its amount once it is done.
    """
    order = await orders.lock(conn, order_no)
    if order is None:
        return RefundRefused("no_such_order")
    if order["state"] != "paid":
        return RefundRefused("not_paid")
    kept = await kept_capture(conn, order_no)
    if kept is None:
        return RefundRefused("nothing_captured")
    found = (
        await conn.execute(
            text(
                "SELECT coalesce(sum(amount_minor) FILTER (WHERE state <> 'failed'), 0) AS asked, count(*) AS made"
                " FROM refund WHERE capture_id = :id"
            ),
            {"id": kept["id"]},
        )
    ).one()
    left = kept["amount_minor"] - int(found.asked)
    amount = left if amount_minor is None else amount_minor
    if not 0 < amount <= left:
        return RefundRefused("amount_wrong")
    whole = amount == left
    if restock and not whole:
        return RefundRefused("restock_needs_whole")
    refund_id = f"{order_no}-R{kept['id']}-{int(found.made) + 1}"
    await conn.execute(
        text(
            "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, restock, state)"
            " VALUES (:id, :capture_id, :order_no, :amount, :currency, :reason, :restock, 'due')"
        ),
        {
            "id": refund_id,
            "capture_id": kept["id"],
            "order_no": order_no,
            "amount": amount,
            "currency": kept["currency"],
            "reason": reason,
            "restock": restock,
        },
    )
    now = await orders.begin_refund(conn, order_no) if whole else order
    return RefundAsked(refund_id, now or order)


async def lease_refunds(conn: AsyncConnection, provider: str, limit: int, lease_s: float) -> list[Row]:
    """Take due refunds of this supplier's captures."""
    found = await conn.execute(
        text(
            "WITH due AS (SELECT r.id FROM refund r JOIN capture c ON c.id = r.capture_id"
            " WHERE r.state IN ('due', 'sent', 'unknown') AND r.next_at <= now() AND c.provider = :provider"
            " AND (r.leased_until IS NULL OR r.leased_until < now())"
            " ORDER BY r.next_at LIMIT :limit FOR UPDATE OF r SKIP LOCKED),"
            " leased AS (UPDATE refund AS r SET leased_until = now() + make_interval(secs => :lease_s),"
            " generation = r.generation + 1, tries = r.tries + 1 FROM due WHERE r.id = due.id RETURNING r.*)"
            " SELECT leased.id, leased.order_no, leased.amount_minor, leased.currency, leased.reason, leased.state,"
            " leased.tries, leased.generation, leased.created_at, now() AS now, c.provider_ref AS capture_ref,"
            " c.attempt_id, c.amount_minor AS captured_minor FROM leased JOIN capture c ON c.id = leased.capture_id"
        ),
        {"provider": provider, "limit": limit, "lease_s": float(lease_s)},
    )
    return [dict(row) for row in found.mappings()]


async def refund_wait(conn: AsyncConnection, held: tuple[str, int], state: str, wait_s: float) -> bool:
    """The refund is looked at again after `wait_s`. False: the lease is no longer ours."""
    found = await conn.execute(
        text(
            "UPDATE refund SET state = :state, leased_until = NULL, next_at = now() + make_interval(secs => :wait_s)"
            " WHERE id = :id AND generation = :generation AND state IN ('due', 'sent', 'unknown')"
        ),
        {"id": held[0], "generation": held[1], "state": state, "wait_s": wait_s},
    )
    return bool(found.rowcount)


async def refund_doubted(conn: AsyncConnection, refund_id: str) -> str | None:
    """The supplier says that a refund did not get through: one under way is asked about now. Returns its state."""
    found = await conn.execute(
        text(
            "UPDATE refund SET next_at = CASE WHEN state IN ('due', 'sent', 'unknown') THEN now() ELSE next_at END"
            " WHERE id = :id RETURNING state"
        ),
        {"id": refund_id},
    )
    return found.scalar_one_or_none()


async def refund_failed(conn: AsyncConnection, refund: Row) -> bool:
    """The supplier refuses a leased refund for good; a person has to look. False: the lease is no longer ours.

    Nothing has gone back, so the capture keeps its state, and an order that was to be refunded whole is paid as before:
    the operator can try again.
    """
    order = await orders.lock(conn, refund["order_no"])
    found = await conn.execute(
        text(
            "UPDATE refund SET state = 'failed', leased_until = NULL"
            " WHERE id = :id AND generation = :generation AND state IN ('due', 'sent', 'unknown')"
        ),
        {"id": refund["id"], "generation": refund["generation"]},
    )
    if not found.rowcount:
        return False
    if order is not None and order["state"] == "refunding":
        await conn.execute(
            text(
                "UPDATE purchase_order AS o SET state = 'paid' WHERE order_no = :order_no AND NOT EXISTS (SELECT FROM"
                " purchase_order AS other WHERE other.sale = o.sale AND other.buyer_id = o.buyer_id"
                " AND other.state IN ('reserved', 'paid'))"
            ),
            {"order_no": refund["order_no"]},
        )
        await orders.bump(conn, refund["order_no"])
    return True


async def refund_done(conn: AsyncConnection, refund_id: str, provider_ref: str | None) -> bool:
    """The money has gone back: capture and order follow. False: it was done before, or is unknown to us."""
    number = (
        await conn.execute(text("SELECT order_no FROM refund WHERE id = :id"), {"id": refund_id})
    ).scalar_one_or_none()
    if number is None:
        return False
    order = await orders.lock(conn, number)
    found = await conn.execute(
        text(
            "UPDATE refund SET state = 'done', done_at = now(), provider_ref = :provider_ref, leased_until = NULL,"
            " generation = generation + 1 WHERE id = :id AND state IN ('due', 'sent', 'unknown')"
            " RETURNING capture_id, amount_minor, restock"
        ),
        {"id": refund_id, "provider_ref": provider_ref},
    )
    refund = found.first()
    if refund is None:
        return False
    of = await capture(conn, refund.capture_id)
    back = (
        await conn.execute(
            text(
                "SELECT coalesce(sum(amount_minor), 0) FROM refund WHERE capture_id = :id AND state = 'done'"
            ),
            {"id": refund.capture_id},
        )
    ).scalar_one()
    if of is None or order is None:
        raise LookupError(f"refund {refund_id} has no capture or no order")
    if int(back) < of["amount_minor"]:
        await _lower(conn, number, refund.amount_minor)
        return True
    await conn.execute(text("UPDATE capture SET state = 'refunded' WHERE id = :id"), {"id": of["id"]})
    if of["state"] == "kept" or (
        # Late money that was refused: the ended order is `refunded`, unless another capture pays it.
        order["state"] in ("expired", "cancelled") and await kept_capture(conn, number) is None
    ):
        await orders.finish_refund(conn, number, restock=bool(refund.restock))
    return True


async def _lower(conn: AsyncConnection, order_no: str, amount_minor: int) -> None:
    """A part of the money went back: the amount of the order stays the sum of its lines, and of the money we have."""
    await conn.execute(
        text(
            "INSERT INTO order_line (order_no, line_no, kind, sku, title, units, unit_minor, amount_minor)"
            " SELECT :order_no, coalesce(max(line_no), 1) + 1, 'adjustment', NULL, 'refund', 1,"
            " CAST(:amount AS bigint), CAST(:amount AS bigint) FROM order_line WHERE order_no = :order_no"
        ),
        {"order_no": order_no, "amount": -amount_minor},
    )
    await conn.execute(
        text(
            "UPDATE purchase_order SET amount_minor = amount_minor - CAST(:amount AS bigint) WHERE order_no = :order_no"
        ),
        {"order_no": order_no, "amount": amount_minor},
    )
    await orders.bump(conn, order_no)
