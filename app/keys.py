"""Every Redis key, spelled in one place. One sale = one hash tag = one shard.

The key map with types, writers and readers is lua/README.md; formats of values are documented there.
"""

from __future__ import annotations

import re

FORMAT = 1  # version of key layout, stream entries and status values; release N reads N and N-1

SALES = "fairdrop:sales"  # hash: sale id -> JSON {"state_version": int}; which sales a front door must watch
PROVIDERS = "fairdrop:providers"  # hash: provider -> JSON breaker state, written by workers once a second
PROVIDER_ROUTES = "fairdrop:provider_routes"  # hash: `sms` or `payment:<channel>` -> JSON {supplier: weight}
ADVISOR = "fairdrop:advisor"  # string, expires by itself: the worker that slows sales down and ends it
GROUP = "workers"  # consumer group of `orders` and `asks`


def breaker_key(provider: str) -> str:
    """Hash: the state of a supplier's breaker, shared by all processes; its mode is what operators want."""
    return f"{{breaker:{provider}}}"


def breaker_history_key(provider: str) -> str:
    """Stream: the breaker's transitions, in the same slot because the same script writes both."""
    return f"{{breaker:{provider}}}:history"


class SaleKeys:
    """The keys of one sale. Strings are built once; item keys on demand."""

    __slots__ = ("asks", "buyers", "contact", "orders", "prefix", "sale", "status", "stock")

    def __init__(self, sale_id: str) -> None:
        self.prefix = p = f"{{sale:{sale_id}}}:"
        self.sale = p + "sale"
        self.stock = p + "stock"
        self.buyers = p + "buyers"
        self.orders = p + "orders"
        self.asks = p + "asks"
        self.status = p + "status"
        self.contact = p + "contact"

    def item(self, sku: str) -> str:
        return f"{self.prefix}item:{sku}"

    def line(self, sku: str) -> str:
        return f"{self.prefix}line:{sku}"

    def outcome(self, sku: str) -> str:
        return f"{self.prefix}outcome:{sku}"

    def drawn(self, sku: str) -> str:
        """Ticket hashes of the early joiners, 10 bytes each, in seq order: what the draw is over."""
        return f"{self.prefix}drawn:{sku}"

    def left(self, sku: str) -> str:
        """List of seqs that left while waiting: front doors follow its tail, so a poll shows `left` without a read."""
        return f"{self.prefix}left:{sku}"

    def rate(self, what: str, who: str) -> str:
        """GCRA state (string, expires by itself)."""
        return f"{self.prefix}rate:{what}:{who}"


def sms_limits(number: str) -> tuple[str, str, str]:
    """GCRA state of one phone number's texts a minute, an hour, a day. number: its blind index in hex, never itself."""
    return f"{{sms:{number}}}:minute", f"{{sms:{number}}}:hour", f"{{sms:{number}}}:day"


# The leaked-key check of the tests: a key that matches none of these was made by mistake.
KNOWN = re.compile(
    r"fairdrop:(sales|providers|provider_routes|advisor)"
    r"|\{breaker:[a-z][a-z0-9_.:-]{0,63}\}(:history)?"
    r"|\{sms:[0-9a-f]{32}\}:(minute|hour|day)"
    r"|\{sale:[a-z0-9][a-z0-9-]{0,47}\}:"
    r"(sale|stock|buyers|orders|asks|status|contact|(item|line|outcome|drawn|left):[A-Za-z0-9._-]{1,64}|rate:[a-z_]+:.+)"
)
