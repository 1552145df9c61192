"""How long a sale is shut when its Redis is gone: rebuilt from Postgres with so many live orders, and timed.

    python -m loadtest.bench.rebuild --units 1000000 --live 100000

Stores of its own, nothing else running. A third of the live orders is paid, each has a line and a payment attempt; as
many again have ended. Exit status 1: a ticket is missing afterwards, or the books do not agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import asyncpg

from app.embedded import Postgres, Valkey, make_folder
from app.keys import SaleKeys
from app.ledger import migrate
from app.ledger.engine import create_engine
from app.redis.link import Link
from app.repair.rebuild import rebuild
from app.repair.reconcile import compare
from app.scripts import Scripts
from app.settings import Settings

SALE = "lost"

MAKE = """
INSERT INTO sale (id, title, state, line_opens_at, opens_at, closes_at, draw_freeze_s, beacon_wait_s, pay_within_s,
  limit_per_buyer, standby, line_max, pass_mode, challenge, channels, return_urls, seed, home, published_at, opened_at)
VALUES ('lost', 'Lost', 'open', now() - interval '1 h', now() - interval '1 h', now() + interval '9 h', 5, 5, 600,
  1, false, 10000000, 'optional', 'none', '["sandbox"]', '[]', '\\x{seed}', 'gone', now(), now());
INSERT INTO item (sale, sku, position, title, price_minor, currency, total, reserved, sold)
VALUES ('lost', 'A', 0, 'A', 59900, 'EUR', {units}, {live} - {live} / 3, {live} / 3);
INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state, claimed_at,
  pay_within_s, pay_by, paid_at, ended_at)
SELECT lpad(n::text, 24, '0'), 'lost', 'A', (1000000 + n)::text, 1, n, 1, 59900, 'EUR',
  CASE WHEN n > {live} THEN 'expired' WHEN n <= {live} / 3 THEN 'paid' ELSE 'reserved' END, now(), 600,
  now() + interval '600 s', CASE WHEN n <= {live} / 3 THEN now() END, CASE WHEN n > {live} THEN now() END
FROM generate_series(1, {live} * 2) AS n;
INSERT INTO order_line (order_no, line_no, kind, sku, title, units, unit_minor, amount_minor)
SELECT order_no, 1, 'item', 'A', 'A', 1, 59900, 59900 FROM purchase_order;
INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency, kind, url)
SELECT order_no || '-1', order_no, 1, 'sandbox', 'sandbox',
  CASE state WHEN 'paid' THEN 'succeeded' WHEN 'reserved' THEN 'sent' ELSE 'closed' END, 59900, 'EUR', 'redirect',
  'https://pay.example/' || order_no FROM purchase_order;
ANALYZE;
"""


async def run(valkey: Valkey, postgres: Postgres, units: int, live: int) -> int:
    settings = Settings(env="development", redis_url=valkey.url, database_url=postgres.url)
    database = await asyncpg.connect(postgres.url)
    await database.execute(MAKE.format(units=units, live=live, seed="00" * 32))
    await database.close()
    link = Link(valkey.url, name="rebuild")
    await link.start()
    engine = create_engine(settings)
    try:
        report = await rebuild(settings, link, Scripts(link), SALE, actor="loadtest", reason="measured")
        assert report is not None
        keys = SaleKeys(SALE)
        tickets, statuses = await link.pipeline([("GET", keys.outcome("A")), ("HLEN", keys.status)])
        books = await compare(engine, link, SALE)
    finally:
        await link.close()
        await engine.dispose()
    right = tickets.count(b"r") + tickets.count(b"p") == live and statuses == 2 * live and books.agree
    print(json.dumps(asdict(report) | {"right": right}))
    return 0 if right else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--live", type=int, default=100_000, help="live orders")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairdrop-rebuild-") as name:
        folder = Path(name)
        make_folder(folder)
        valkey, postgres = Valkey(folder / "valkey", "bench"), Postgres(folder / "postgres", "bench")
        try:
            valkey.start()
            postgres.start()
            migrate.upgrade(postgres.url)
            return asyncio.run(run(valkey, postgres, options.units, options.live))
        finally:
            valkey.stop()
            postgres.stop()


if __name__ == "__main__":
    sys.exit(main())
