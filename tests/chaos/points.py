"""Named crash points: one for every row of purchase-path.md's failure table where a process of ours may die or stall.

`FAIRDROP_TEST_FAILPOINT=NAME:ACTION[:TIMES[:SKIPPED]]` (several with commas) arms them in a process that
tests/chaos/zygote.py starts: NAME is a key of POINTS, ACTION is `kill` (SIGKILL to itself), `sleep=SECONDS` or `lost`
(an error after the fact), TIMES is how many passages do it (default 1) after SKIPPED that do nothing (default 0). Each
strike is a line in the file `FAIRDROP_TEST_FAILPOINT_STRUCK`. Nothing of this is in `app`: a point is put around a
function of the product after the fork, so a production build has none by construction (tests/chaos/test_points.py
holds that).
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from app.desk import hooks
from app.ledger import captures, confirming, orders, outbox
from app.providers.guard import GuardedPayment
from app.purchase import confirm, pay
from app.scripts import Scripts

VARIABLE = "FAIRDROP_TEST_FAILPOINT"
STRUCK = "FAIRDROP_TEST_FAILPOINT_STRUCK"  # the file that strikes are written to


class Point(NamedTuple):
    """Before or after a call of `owner.name`, in the process `role`."""

    owner: Any
    name: str
    when: str  # before | after
    role: str
    row: str  # of the failure table


POINTS: dict[str, Point] = {
    "front.before_script": Point(Scripts, "line_join", "before", "front", "front door before the script"),
    "front.after_script": Point(Scripts, "line_join", "after", "front", "front door after the script"),
    "confirm.after_read": Point(confirm.Confirmer, "confirm", "before", "worker", "worker after read"),
    "confirm.in_transaction": Point(confirming, "reserve", "after", "worker", "inside the transaction"),
    "confirm.after_commit": Point(confirm.Confirmer, "_write", "after", "worker", "after COMMIT, before status"),
    "confirm.after_mark": Point(Scripts, "claims_mark", "after", "worker", "told and XACKed, before the worker knows"),
    "confirm.bury": Point(confirming, "bury", "after", "worker", "poison entry"),
    "expire.cleared": Point(pay, "clear_attempts", "after", "worker", "paid against expired"),
    "expire.before_row": Point(orders, "expire", "before", "worker", "expirer before the row"),
    "expire.in_transaction": Point(orders, "expire", "after", "worker", "expirer after the row, before COMMIT"),
    "relay.before_script": Point(Scripts, "units_release", "before", "worker", "expirer after the row, before Redis"),
    "relay.after_script": Point(Scripts, "units_release", "after", "worker", "relay after the script"),
    "relay.close": Point(outbox, "close", "before", "worker", "relay before it closes the row"),
    "topup.before_script": Point(Scripts, "stock_add", "before", "office", "top-up between Postgres and Redis"),
    "topup.after_script": Point(Scripts, "stock_add", "after", "office", "top-up after the script"),
    "pay.before_send": Point(GuardedPayment, "create", "before", "worker", "payment: before send"),
    "pay.after_send": Point(GuardedPayment, "create", "after", "worker", "payment: no answer"),
    "pay.close": Point(GuardedPayment, "close", "after", "worker", "payment: closed, not on record"),
    "hook.before_commit": Point(captures, "pay_plainly", "before", "office", "webhook before commit"),
    "hook.after_commit": Point(hooks, "take_hook", "after", "office", "webhook after commit"),
    "late.after_retake": Point(Scripts, "units_retake", "after", "worker", "late money between Redis and Postgres"),
    "refund.after_send": Point(GuardedPayment, "refund", "after", "worker", "refund: no answer"),
    "capture.in_transaction": Point(captures, "add", "after", "office", "paid, before COMMIT"),
}  # fmt: skip


class Lost(OSError):
    """The connection was lost after the call had done its work."""


def arm(text: str) -> None:
    """Put the points around their functions in this process. KeyError: there is no such point."""
    for one in text.split(","):
        _arm(*one.split(":"))


def _arm(name: str, action: str, how_often: str = "1", skipped: str = "0") -> None:
    times, skip = int(how_often), int(skipped)
    point = POINTS[name]
    real: Callable[..., Awaitable[Any]] = getattr(point.owner, point.name)

    async def strike() -> None:
        nonlocal times, skip
        if skip > 0:
            skip -= 1
            return
        if times <= 0:
            return
        times -= 1
        if file := os.environ.get(STRUCK):
            line = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(line, f"{name}\n".encode())
            os.close(line)
        verb, _, amount = action.partition("=")
        match verb:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                await asyncio.sleep(float(amount))  # not a wait of a test: the fault itself
            case "lost":
                raise Lost("the answer is lost on purpose")
            case _:
                raise ValueError(f"unknown action {action!r}")

    @functools.wraps(real)
    async def struck(*args: Any, **kwargs: Any) -> Any:
        if point.when == "before":
            await strike()
        answer = await real(*args, **kwargs)
        if point.when == "after":
            await strike()
        return answer

    setattr(point.owner, point.name, struck)
