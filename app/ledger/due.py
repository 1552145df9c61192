# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""What is due, of every kind of work, in one statement: what a worker at rest asks instead of one look for each kind.

It reads the beginning of each index over what waits (MOST rows at most, those of the next moment only), so it costs
the same whatever the history and the queue. It may say *due* too often (a row that another worker is just taking, a
beginning that is full), never too seldom: whoever is told takes rows with its own statement, which alone decides.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.engine import driver

MOST = 100  # rows of one index that are looked at; a fuller one counts as due

Kind = Literal[
    "starts",  # of a supplier: attempts that were never taken up
    "again",  # of a supplier: attempts that came to no link before, or whose fate is unknown
    "polls",  # of a supplier: links to be asked about
    "refunds",  # of a supplier
    "attempts",  # any attempt that has not ended
    "late",  # captures to be weighed
    "unpaid",  # orders whose deadline has passed
    "linkless",  # any order whose deadline has not begun
    "leaving",  # orders whose buyers want out
    "outbox",  # rows that Redis is to be told
    "events",  # events without a position
    "spread",  # events that some endpoint has no delivery of
    "deliveries",
    "texts",
    "text_waits",  # any text that is neither sent nor given up
    "unshown",  # any text that may have to go on its ticket
    "course",  # a sale's opening or closing
    "outage",  # a supplier that some worker has seen out just now
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Due(NamedTuple):
    """One kind of work that is due now (in_s <= 0) or soon. supplier: "" where the kind is no supplier's, or all's."""

    kind: Kind
    supplier: str
    in_s: float


def _of(kind: str, when: str, rows: str) -> str:
    """One kind: its first rows, and when the first of them may be taken. A full beginning hides who comes behind it."""
    return (
        f"SELECT '{kind}', '', CASE WHEN count(*) = {MOST} THEN now() ELSE min({when}) END"
        f" FROM (SELECT {rows} LIMIT {MOST}) AS t"
    )


def _any(kind: str, first: str) -> str:
    """One kind of which it is enough that there is something. `first` is in an index' order, and no EXISTS, which would
    forget the order: it may read a whole table for the first row that waits."""
    return f"SELECT '{kind}', '', CASE WHEN (SELECT TRUE {first} LIMIT 1) THEN now() END"


_SOON = "now() + make_interval(secs => $1)"
# The lists of states are those of the partial indexes (tables.py): only then does Postgres use them.
_OPEN = "state IN ('wanted', 'created', 'sent', 'unknown')"
_UNSHOWN = "shown IS NULL AND state IN ('due', 'unknown', 'failed')"
_LIVE = "w.deleted_at IS NULL AND w.disabled_at IS NULL"

LOOK = f"""
WITH attempt AS (SELECT provider, state, tries, greatest(next_at, leased_until) AS at FROM payment_attempt
  WHERE {_OPEN} AND next_at <= {_SOON} ORDER BY next_at LIMIT {MOST}),
back AS (SELECT capture_id, greatest(next_at, leased_until) AS at FROM refund
  WHERE state IN ('due', 'sent', 'unknown') AND next_at <= {_SOON} ORDER BY next_at LIMIT {MOST}),
look (kind, supplier, at) AS (
SELECT CASE WHEN state = 'sent' THEN 'polls' WHEN tries = 0 THEN 'starts' ELSE 'again' END, provider, min(at)
  FROM attempt GROUP BY 1, 2
UNION ALL SELECT kind, '', now() FROM unnest(ARRAY['starts', 'again', 'polls']) AS kind
  WHERE (SELECT count(*) FROM attempt) = {MOST}
UNION ALL SELECT 'refunds', c.provider, min(at) FROM back JOIN capture c ON c.id = back.capture_id GROUP BY 2
UNION ALL SELECT 'refunds', '', now() WHERE (SELECT count(*) FROM back) = {MOST}
UNION ALL {_any("attempts", f"FROM payment_attempt WHERE {_OPEN} ORDER BY next_at")}
UNION ALL {_any("late", "FROM capture WHERE state = 'due' ORDER BY id")}
UNION ALL {
    _of(
        "unpaid",
        "greatest(pay_by, leased_until)",
        f"pay_by, leased_until FROM purchase_order WHERE state = 'reserved' AND pay_by <= {_SOON} ORDER BY pay_by",
    )
}
UNION ALL SELECT 'linkless', '', CASE WHEN count(*) > count(pay_by) THEN now() END FROM (
  SELECT pay_by FROM purchase_order WHERE state = 'reserved' ORDER BY pay_by DESC NULLS FIRST LIMIT 1) AS t
UNION ALL {
    _of(
        "leaving",
        "coalesce(leased_until, now())",
        "leased_until FROM purchase_order WHERE state = 'reserved' AND leaving ORDER BY order_no",
    )
}
UNION ALL {
    _of(
        "outbox",
        "coalesce(leased_until, now())",
        "leased_until FROM outbox WHERE state = 'due' ORDER BY id",
    )
}
UNION ALL {_any("events", "FROM event WHERE position IS NULL ORDER BY written")}
UNION ALL {_any("events", "FROM event_batch ORDER BY written")}
UNION ALL SELECT 'spread', '', now() FROM webhook_endpoint w WHERE {_LIVE} AND (w.told_to IS NULL
  OR w.told_to < (SELECT coalesce(max(position), 0) FROM event))
UNION ALL SELECT 'deliveries', '', min(d.at) FROM webhook_endpoint w, LATERAL (
  SELECT CASE WHEN count(*) = {MOST} THEN now() ELSE min(greatest(t.next_at, t.leased_until)) END AS at FROM (
  SELECT next_at, leased_until FROM webhook_delivery WHERE endpoint = w.id AND state = 'due'
  AND next_at <= {_SOON} ORDER BY next_at LIMIT {MOST}) AS t) AS d WHERE {_LIVE}
UNION ALL SELECT 'texts', '', CASE WHEN count(*) = {MOST} THEN now()
  ELSE min(next_at) FILTER (WHERE state = 'due') END FROM (SELECT next_at, state FROM sms
  WHERE state IN ('due', 'sending') AND next_at <= {_SOON} ORDER BY next_at LIMIT {MOST}) AS t
UNION ALL {_any("text_waits", "FROM sms WHERE state IN ('due', 'sending') ORDER BY next_at")}
UNION ALL {_any("unshown", f"FROM sms WHERE {_UNSHOWN} ORDER BY created_at")}
UNION ALL SELECT 'course', '', min(least(closes_at,
  CASE WHEN state IN ('scheduled', 'open') AND opened_at IS NULL THEN opens_at END))
  FROM sale WHERE state IN ('scheduled', 'open', 'paused')
UNION ALL {_any("outage", "FROM payment_outage WHERE seen_at > now() - make_interval(secs => $2)")}
)
SELECT kind, supplier, CAST(extract(epoch FROM at - now()) AS double precision) AS in_s FROM look
WHERE at <= {_SOON}
"""


async def look(conn: AsyncConnection, ahead_s: float, outage_s: float) -> list[Due]:
    """Whatever is due now or within `ahead_s`. outage_s: for so long a supplier seen out counts as out."""
    return [Due(*row) for row in await (await driver(conn)).fetch(LOOK, ahead_s, outage_s)]
