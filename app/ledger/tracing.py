"""Everything that Postgres knows of one order, in the order in which it happened."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

# Each part: when, the step of the purchase path, what happened, and what goes with it. Neither contacts nor payers.
_STEPS = """
WITH its AS (SELECT * FROM purchase_order WHERE order_no = :order_no),
steps AS (
    SELECT claimed_at AS at, 'claim' AS step, 'claimed' AS what,
           jsonb_build_object('sku', sku, 'units', units, 'seq', seq, 'epoch', epoch) AS detail FROM its
    UNION ALL SELECT reserved_at, 'confirm', 'reserved',
           jsonb_build_object('amount_minor', amount_minor, 'currency', currency) FROM its
    UNION ALL SELECT at, 'confirm', 'refused',
           jsonb_build_object('reason', reason, 'sku', sku, 'units', units, 'seq', seq, 'epoch', epoch,
                              'units_returned', returned)
      FROM refused_claim WHERE order_no = :order_no
    UNION ALL SELECT created_at, 'pay', 'link wanted',
           jsonb_build_object('attempt', attempt_no, 'provider', provider, 'channel', channel)
      FROM payment_attempt WHERE order_no = :order_no
    UNION ALL SELECT sent_at, 'pay', 'supplier asked',
           jsonb_build_object('attempt', attempt_no, 'provider', provider, 'ref', provider_ref, 'tries', tries)
      FROM payment_attempt WHERE order_no = :order_no
    UNION ALL SELECT ended_at, 'pay', 'link ' || state, jsonb_build_object('attempt', attempt_no, 'code', code)
      FROM payment_attempt WHERE order_no = :order_no
    UNION ALL SELECT captured_at, 'pay', 'money captured',
           jsonb_build_object('provider', provider, 'ref', provider_ref, 'amount_minor', amount_minor,
                              'currency', currency, 'recorded_at', recorded_at, 'now', state)
      FROM capture WHERE order_no = :order_no
    UNION ALL SELECT at, 'pay', 'deadline extended',
           jsonb_build_object('before', pay_by_before, 'extended_s', extended_s)
      FROM deadline_extension WHERE order_no = :order_no
    UNION ALL SELECT paid_at, 'pay', 'paid', '{}' FROM its
    UNION ALL SELECT ended_at, 'release', state, jsonb_build_object('reason', reason) FROM its
    UNION ALL SELECT created_at, CASE kind WHEN 'mark' THEN 'tell' ELSE 'release' END,
           'Redis to be told: ' || kind, payload FROM outbox WHERE order_no = :order_no
    UNION ALL SELECT done_at, CASE kind WHEN 'mark' THEN 'tell' ELSE 'release' END,
           'Redis told: ' || kind, jsonb_build_object('state', state, 'tries', tries)
      FROM outbox WHERE order_no = :order_no
    UNION ALL SELECT created_at, 'release', 'refund wanted',
           jsonb_build_object('amount_minor', amount_minor, 'currency', currency, 'reason', reason)
      FROM refund WHERE order_no = :order_no
    UNION ALL SELECT done_at, 'release', 'refund ' || state, jsonb_build_object('ref', provider_ref, 'tries', tries)
      FROM refund WHERE order_no = :order_no
    UNION ALL SELECT created_at, 'tell', 'SMS wanted: ' || template, jsonb_build_object('now', state, 'code', code)
      FROM sms WHERE order_no = :order_no
    UNION ALL SELECT sent_at, 'tell', 'SMS sent: ' || template,
           jsonb_build_object('provider', provider, 'ref', provider_ref, 'tries', tries)
      FROM sms WHERE order_no = :order_no
    UNION ALL SELECT delivered_at, 'tell', 'SMS delivered: ' || template, '{}' FROM sms WHERE order_no = :order_no
    UNION ALL SELECT at, 'tell', 'event ' || type, jsonb_build_object('id', id, 'version', version)
      FROM event WHERE order_no = :order_no
    UNION ALL SELECT b.at, 'tell', 'event order.reserved', '{}'
      FROM its JOIN event_batch b ON b.sale = its.sale AND its.order_no = ANY(b.order_nos)
    UNION ALL SELECT d.ended_at, 'tell', 'webhook ' || d.state,
           jsonb_build_object('event', e.type, 'endpoint', d.endpoint, 'status', d.status, 'tries', d.tries)
      FROM event e JOIN webhook_delivery d ON d.event = e.id WHERE e.order_no = :order_no
    UNION ALL SELECT at, 'operator', action, jsonb_build_object('actor', actor, 'reason', reason)
      FROM journal WHERE detail->>'order_no' = :order_no
)
SELECT at, step, what, jsonb_strip_nulls(detail) AS detail FROM steps WHERE at IS NOT NULL
ORDER BY at, array_position(ARRAY['claim', 'confirm', 'pay', 'release', 'tell', 'operator'], step), what
"""


async def trace(conn: AsyncConnection, order_no: str) -> Sequence[RowMapping]:
    """(at, step, what, detail) of one order or refused claim, oldest first; empty: nobody knows this number.

    Reads the feed and the journal whole, which have no index by order: for people, not for a loop.
    """
    return (await conn.execute(text(_STEPS), {"order_no": order_no})).mappings().all()
