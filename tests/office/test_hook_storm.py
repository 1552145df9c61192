"""Suppliers' call-backs, duplicated ×10, shuffled, forged and late: one effect each, every forged one refused.

FAIRDROP_TEST_HOOKS=10000 runs the full size; `make test` a tenth of it.
"""

from __future__ import annotations

import logging
import os
import random
import sys

import pytest
import structlog

from tests.office import hook_storm
from tests.office.conftest import Office
from tests.office.hook_storm import fate_of, number_of

COUNT = int(os.environ.get("FAIRDROP_TEST_HOOKS", "1000"))
COPIES = 10


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.timeout(1_800)
async def test_each_call_back_has_one_effect_whatever_comes_with_it(office: Office) -> None:
    # 60,000 refusals in the log are not what is tried here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    await hook_storm.lay_out(office, COUNT)
    dice = random.Random(7)
    secret = office.desk.settings.sandbox_secret.get_secret_value()
    hooks = [hook for n in range(COUNT) for hook in hook_storm.hooks_of(n, COPIES, dice, secret)]
    dice.shuffle(hooks)
    seen = await hook_storm.send(office, hooks)
    sys.stdout.write(
        f"{seen.hooks} call-backs about {COUNT} orders in {seen.seconds:.1f} s:"
        f" {seen.ms_each:.2f} ms and {seen.cpu_ms_each:.2f} ms of CPU each, {seen.again} sent again after a 503\n"
    )
    due = {hook.word: hook.expected for hook in hooks}
    assert dict(seen.statuses.keys()) == due, seen.statuses
    assert len(seen.statuses) == len(due), seen.statuses

    fates = {number_of(n): fate_of(n) for n in range(COUNT)}
    orders = {
        row.order_no: row for row in await office.sql("SELECT order_no, state, version FROM purchase_order")
    }
    states = {"paid": "paid", "late_money": "expired", "declined": "reserved", "refunded": "refunded"}
    assert {number: row.state for number, row in orders.items()} == {
        n: states[fate] for n, fate in fates.items()
    }
    # A second effect would have been a second version. Late money waits for the worker, so it changes no order.
    versions = {"paid": 2, "late_money": 1, "declined": 2, "refunded": 2}
    assert {number: row.version for number, row in orders.items()} == {
        n: versions[f] for n, f in fates.items()
    }
    captures = await office.sql("SELECT order_no, state, amount_minor FROM capture")
    kept = {"paid": "kept", "late_money": "due", "refunded": "refunded"}
    assert sorted(map(tuple, captures)) == sorted(
        (number, kept[fate], hook_storm.PRICE) for number, fate in fates.items() if fate in kept
    )
    attempts = {"paid": "succeeded", "late_money": "closed", "declined": "failed", "refunded": "succeeded"}
    found = await office.sql("SELECT order_no, state FROM payment_attempt")
    assert dict(map(tuple, found)) == {number: attempts[fate] for number, fate in fates.items()}
    told = await office.sql(
        "SELECT order_no, type, count(*) FROM event WHERE order_no IS NOT NULL GROUP BY 1, 2"
    )
    types = {"paid": "order.paid", "refunded": "order.refunded"}
    assert sorted(map(tuple, told)) == sorted((n, types[f], 1) for n, f in fates.items() if f in types)
    texts = await office.sql("SELECT order_no, template, count(*) FROM sms GROUP BY 1, 2")
    assert sorted(map(tuple, texts)) == sorted((n, f, 1) for n, f in fates.items() if f in types)
    marks = await office.sql("SELECT order_no, count(*) FROM outbox WHERE order_no IS NOT NULL GROUP BY 1")
    assert dict(map(tuple, marks)) == {n: 1 for n, f in fates.items() if f != "late_money"}
    reserved = sum(fate == "declined" for fate in fates.values())
    out = sum(fate in ("paid", "refunded") for fate in fates.values())
    assert list(map(tuple, await office.sql("SELECT reserved, sold FROM item"))) == [(reserved, out)]
    doubled = sum(fate == "paid" and n % 4 == 0 for n, fate in enumerate(fates.values()))
    assert (await office.sql("SELECT count(*) FROM webhook_inbox"))[0][0] == COUNT + doubled
