"""A buyer is not punished for a supplier's bad day: who could not pay gets time, a bounded amount, decided once.

Once a second: a payment supplier whose breaker lets nothing through is *out* (written down in Postgres, whose clock
decides from then on). An order that would end within `pay_extension_s` while its supplier is out gets `pay_extension_s`
more, once for each outage, at most `pay_extension_max_s` in all. So whoever's supplier comes back in time has that long
to pay, and units of those who have time left anyway are not kept longer than planned.

The ticket says so (`order.extended_s`, `pay_by`). The shop gets no event, for none of its events names the deadline;
there is no SMS, for the change is to the buyer's good, and outages hit thousands at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog
from prometheus_client import Counter as Count
from sqlalchemy.ext.asyncio import AsyncEngine

from app.alarm import alert
from app.breaker import State
from app.ledger import outages, payments
from app.ledger.engine import alone
from app.providers.registry import Providers
from app.settings import Settings

EXTEND_MAX = 500  # orders of one look; more come with the next, at once
OUT = frozenset({State.OPEN, State.HALF_OPEN, State.FORCED_OPEN})  # half-open: nobody knows yet that it works

EXTENDED = Count("fairdrop_deadlines_extended", "orders that got more time because payment was down")
_log = structlog.get_logger("extend")


def out(providers: Providers) -> list[str]:
    """The payment suppliers through which nobody can pay now, by their breakers."""
    return [name for name, payment in providers.payment.items() if payment.guard.breaker.state in OUT]


@dataclass
class Extender:
    """The worker's loop; any number of workers may run it."""

    engine: AsyncEngine
    providers: Providers
    settings: Settings
    seen_out: asyncio.Event | None = None  # rings while some worker sees a supplier out; None: look each time
    _were_out: set[str] = field(default_factory=set)

    async def _hasten(self, gone: list[str]) -> None:
        """Links that waited longer and longer for a supplier that works again are not to wait any longer."""
        for name in self._were_out - set(gone):
            async with alone(self.engine) as conn:
                hastened = await payments.hasten_all(conn, name)
            _log.info("supplier works again", provider=name, hastened=hastened)
        self._were_out = set(gone)

    async def turn(self) -> bool:
        """Note who is out, extend what is due. True: there may be more to extend at once."""
        s = self.settings
        gone = out(self.providers)
        await self._hasten(gone)
        if gone:
            async with self.engine.begin() as conn:
                begun = await outages.note(conn, gone, s.pay_outage_gap_s)
            for name in begun:
                alert("payment_outage", "nobody can pay through a supplier", provider=name)
        if not s.pay_extension_s or not s.pay_extension_max_s:
            return False
        if self.seen_out is not None:
            if not gone and not self.seen_out.is_set():  # another worker may see what this one does not
                return False
            self.seen_out.clear()
        all_out = bool(gone) and len(gone) == len(self.providers.payment)
        async with self.engine.begin() as conn:
            rows = await outages.extend(
                conn,
                more_s=s.pay_extension_s,
                most_s=s.pay_extension_max_s,
                limit=EXTEND_MAX,
                unpaid_by=gone[0] if all_out else None,
            )
        if rows:
            EXTENDED.inc(len(rows))
            _log.warning("deadlines extended", orders=len(rows), out=gone)
        return len(rows) == EXTEND_MAX
