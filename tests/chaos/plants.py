"""Planted bugs: the mistakes that the design forbids, each put into a process after the fork, to see it caught.

Each is as small as the slip that would make it: a guard left out of a script, two lines in the other order. None is in
`app`; a process gets one only from tests/chaos/zygote.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from app import resources
from app.desk import hooks
from app.errors import DidNotHappen, Unknown
from app.ledger import confirming, orders
from app.ledger.engine import by_hand
from app.providers.answer import Done
from app.providers.guard import GuardedPayment
from app.providers.payment import HookAnswer, LinkWanted
from app.purchase import confirm, pay
from app.purchase.confirm import Claim, Confirmer, Told, refused_json
from app.purchase.release import Releaser
from app.purchase.told import status_json
from app.repair.reconcile import Reconciler
from app.scripts import Script, Scripts


def lua(names: Sequence[str], *swaps: tuple[str, str]) -> None:
    """Other text in these scripts, parts included. AssertionError: the text to be replaced is not there any more."""
    texts = resources.scripts()
    for name in names:
        text = texts[name]
        found = [swap for swap in swaps if swap[0] in text]
        assert found, f"{name}.lua has changed: {swaps[0][0]!r} is not in it"
        for old, new in found:
            text = text.replace(old, new)
        texts[name] = text


def client_retries() -> None:
    """A lost connection is answered by sending the call again, as redis-py does by default."""
    real = Scripts._raw

    async def stubborn(self: Scripts, script: Script[Any], keys: Any, args: Any) -> list[Any]:
        for _ in range(40):
            try:
                return await real(self, script, keys, args)
            except (Unknown, DidNotHappen):
                await asyncio.sleep(0.05)
        return await real(self, script, keys, args)

    Scripts._raw = stubborn  # type: ignore[method-assign]


def no_dedupe() -> None:
    """A repeated tap is a new buyer."""
    lua(
        ["line_join"],
        (
            "local held = redis.call('HMGET', KEYS[7], unpack(ARGV, BUYERS + 1, BUYERS + n))",
            "local held = {}",
        ),
        ("local mine = fresh[buyer]", "local mine = nil"),
    )


def ack_before_commit() -> None:
    """The entry is given up before its row is committed."""
    real = Confirmer._write

    async def hasty(self: Confirmer, sale: str, claims: Sequence[Claim], *args: Any, **kwargs: Any) -> Any:
        await self._acknowledge(sale, Counter(claim.entry_id for claim in claims))
        return await real(self, sale, claims, *args, **kwargs)

    Confirmer._write = hasty  # type: ignore[method-assign]


def release_before_commit() -> None:
    """Redis gets the unit back before Postgres has committed that it is free."""

    async def hasty(self: Releaser, order_no: str, generation: int) -> bool:
        if await self.clear(order_no) != "clear":
            return False
        async with self.engine.begin() as conn:
            row = await orders.lock(conn, order_no)
        assert row is not None
        await self.scripts.units_release(
            sale=row["sale"],
            epoch=row["epoch"],
            sku=row["sku"],
            seq=row["seq"],
            units=row["units"],
            version=row["version"] + 1,
            to_byte=b"e",
            status_json=status_json({**row, "state": "expired"}, [], None),
            work_max=100,
            backlog_max=1000,
        )
        async with self.engine.begin() as conn:
            return await orders.expire(conn, order_no, generation) is not None

    Releaser._expire_one = hasty  # type: ignore[method-assign]


def maxlen() -> None:
    """The order stream is kept short."""
    lua(
        ["line_join"],
        ("redis.call('XADD', KEYS[6], '*'", "redis.call('XADD', KEYS[6], 'MAXLEN', '=', '1', '*'"),
    )
    lua(
        ["line_advance", "units_release"],
        ("redis.call('XADD', ORDERS, '*'", "redis.call('XADD', ORDERS, 'MAXLEN', '=', '1', '*'"),
    )


def expiry_without_guard() -> None:
    """An order ends unpaid whatever its state is by now."""

    async def blind(conn: AsyncConnection, number: str, generation: int) -> Any:
        row = await orders._one(
            conn,
            "state = 'expired', reason = 'unpaid', ended_at = now(), version = version + 1, leased_until = NULL",
            "pay_by <= now()",
            order_no=number,
        )
        if row is not None:
            await orders._ended(conn, row, "order.expired", "expired", "e")
        return row

    orders.expire = blind


def failover_while_unknown() -> None:
    """No answer to a payment call: at once another link."""

    async def impatient(till: Any, row: Any, code: str, retry_in_ms: int = 0) -> None:
        await pay._end(till, row, "failed", code, again=True)

    pay._wait_unknown = impatient


def acknowledged_before_commit() -> None:
    """The supplier gets its 2xx, and the call-back is worked on afterwards."""
    real = hooks.take_hook
    under_way: set[asyncio.Task[Any]] = set()

    async def eager(engine: Any, providers: Any, name: str, headers: Any, raw_body: bytes) -> HookAnswer:
        task = asyncio.create_task(_later(real(engine, providers, name, headers, raw_body)))
        under_way.add(task)
        return providers.payment[name].hook_reply(ok=True)  # type: ignore[no-any-return]

    hooks.take_hook = eager


async def _later(work: Any) -> None:
    await asyncio.sleep(0.1)  # not a wait of a test: the bug itself
    await work


FENCE = "if S.epoch ~= ARGV[1] or S.home ~= ARGV[2] then"


def no_epoch_check() -> None:
    """The fence is gone: whatever a Redis holds that came back is believed."""
    lua(
        [name for name in Script.registry if "--@ part sale" in _source(name)],
        (FENCE, "if false then"),
    )
    lua(["sale_rearm"], ("if pulse < tonumber(ARGV[4]) then", "if false then"))
    nothing_is_missing()


def nothing_is_missing() -> None:
    """A Redis that starts again is not asked whether it knows what Postgres saw told."""

    async def missing(*_: Any) -> str:
        return ""

    Reconciler._lacks = missing  # type: ignore[method-assign]


def _source(name: str) -> str:
    return (resources.lua_dir() / f"{name}.lua").read_text(encoding="utf-8")


def old_release_applied() -> None:
    """A release that a rebuild has overtaken is applied all the same.

    A rebuild tells the ticket that it has ended, so two guards must be gone: the fence, and the ticket's byte."""
    guard = "if not (byte == 'c' or byte == 'r' or byte == 'p' and ARGV[8] ~= 'e') or told_version >= version then"
    lua(
        ["units_release"],
        (FENCE, "if S.home ~= ARGV[2] then"),
        (guard, guard.replace("if ", "if S.epoch == ARGV[1] and (").replace(" then", ") then")),
    )


def violation_is_poison() -> None:
    """A row that exists already is taken for an entry that cannot be written."""
    real = Confirmer._write

    async def rash(
        self: Confirmer, sale: str, claims: Sequence[Claim], contacts: Any, *, careful: bool
    ) -> Any:
        try:
            async with by_hand(self.engine) as conn:
                return await self._copy(conn, sale, claims, contacts)
        except asyncpg.UniqueViolationError:
            told: dict[str, Told] = {}
            for claim in claims:
                async with self.engine.begin() as conn:
                    await confirming.bury(conn, sale, "orders", claim.name, {}, "UniqueViolationError")
                    await confirming.refuse(
                        conn, claim.order_no, sale, claim.sku, claim.buyer_id, claim.epoch, claim.seq, claim.units,
                        reason="poison", returned=True, told=refused_json("poison"),
                    )  # fmt: skip
                told[claim.order_no] = Told("poison")
            return told
        except confirm._LookAgain:
            return await real(self, sale, claims, contacts, careful=careful)

    Confirmer._write = rash  # type: ignore[method-assign]


def stale_status() -> None:
    """Whoever comes last has the last word about a ticket."""
    lua(
        ["claims_mark"],
        ("local claimed = string.byte(bytes, k) == 99", "local claimed = string.byte(bytes, k) ~= 119"),
        ("if claimed and not told[i] then", "if claimed then"),
        ("string.gsub(bytes, 'c', 'r')", "string.gsub(bytes, '[^w]', 'r')"),
    )


def missing_stock_is_zero() -> None:
    """No stock key is no stock."""
    lua(
        [name for name in Script.registry if "--@ part item" in _source(name)],
        ("tonumber(redis.call('HGET', STOCK, sku) or nil)", "tonumber(redis.call('HGET', STOCK, sku) or 0)"),
    )


def new_key_each_retry() -> None:
    """A payment call that failed is repeated under another idempotency key."""
    real = GuardedPayment.create

    async def renamed(self: GuardedPayment, wanted: LinkWanted) -> Any:
        answer = await real(self, wanted)
        if isinstance(answer, Done):
            return answer
        return await real(self, dataclasses.replace(wanted, attempt_id=f"{wanted.attempt_id}X"))

    GuardedPayment.create = renamed  # type: ignore[method-assign]


def everysec() -> None:
    """The bug is in Redis' configuration (see the scenario), and nobody sees that its log has lost its end."""
    nothing_is_missing()


PLANTS: dict[str, Callable[[], None]] = {
    "client_retries": client_retries,
    "no_dedupe": no_dedupe,
    "ack_before_commit": ack_before_commit,
    "release_before_commit": release_before_commit,
    "maxlen": maxlen,
    "expiry_without_guard": expiry_without_guard,
    "failover_while_unknown": failover_while_unknown,
    "acknowledged_before_commit": acknowledged_before_commit,
    "no_epoch_check": no_epoch_check,
    "old_release_applied": old_release_applied,
    "violation_is_poison": violation_is_poison,
    "stale_status": stale_status,
    "missing_stock_is_zero": missing_stock_is_zero,
    "new_key_each_retry": new_key_each_retry,
    "everysec": everysec,
}
