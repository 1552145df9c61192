"""How much slower a sale should serve: a pure controller, by its own clock. It sees signs, and says a rate or nothing.

Additive increase, multiplicative decrease (as TCP does, RFC 5681): while something is bad, each step halves the rate;
once all has been good for a while, each step gives back a tenth of what was taken away from; the slowdown ends where it
began. Between bad and good (hysteresis) the rate stays. It never goes below `least_milli` and never above the start.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Reason = Literal["payment_down", "payment_slow", "confirm_lag"]


class Signs(NamedTuple):
    """What the worker sees now."""

    payment_out: bool = False  # no supplier takes payments, by their breakers
    link_wait_s: float = 0.0  # age of the oldest reserved order's payment link that is still to come
    confirm_lag_s: float = 0.0  # age of the oldest claim that is not in Postgres yet


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When something is bad, and how fast is reacted. Times in ms, rates in thousandths of tickets a second."""

    confirm_lag_s: float = 5.0
    link_wait_s: float = 20.0
    good_part: float = 0.5  # of a limit: good is below this, so that a rate on the brink does not swing
    bad_for_ms: int = 1_000  # before the first cut: a stall of one garbage collection is nothing
    good_for_ms: int = 2_000  # before the first increase
    step_ms: int = 1_000  # between two changes: an effect must be seen before the next
    cut: float = 0.5
    add_part: float = 0.1  # of the start, each step: back within some ten steps
    least_milli: int = 1_000

    def __post_init__(self) -> None:
        if not (0 < self.cut < 1 and 0 < self.add_part <= 1 and 0 < self.good_part <= 1):
            raise ValueError("cut is in (0, 1), add_part and good_part in (0, 1]")
        if min(self.confirm_lag_s, self.link_wait_s, self.step_ms, self.least_milli) <= 0:
            raise ValueError("limits, steps and the least rate are above 0")


class Slow(NamedTuple):
    """A slowdown: serve at most rate_milli, instead of base_milli, because of reason."""

    rate_milli: int
    base_milli: int
    reason: Reason


def worst(signs: Signs, limits: Limits) -> Reason | None:
    """What is bad, the worst first; None: nothing is."""
    if signs.payment_out:
        return "payment_down"
    if signs.link_wait_s > limits.link_wait_s:
        return "payment_slow"
    if signs.confirm_lag_s > limits.confirm_lag_s:
        return "confirm_lag"
    return None


def good(signs: Signs, limits: Limits) -> bool:
    """Whether all is clearly well."""
    return (
        not signs.payment_out
        and signs.link_wait_s <= limits.link_wait_s * limits.good_part
        and signs.confirm_lag_s <= limits.confirm_lag_s * limits.good_part
    )


class Throttle:
    """Of one sale. `look` about twice a second; clocks may be any that never run back."""

    def __init__(self, limits: Limits, slow: Slow | None = None) -> None:
        """slow: a slowdown that another worker has begun; this one goes on with it."""
        self.limits = limits
        self.slow = slow
        self._bad_since: int | None = None
        self._good_since: int | None = None
        self._stepped_ms: int | None = None

    def look(self, now_ms: int, signs: Signs, served_milli: int, wanted_milli: int) -> Slow | None:
        """The slowdown from now on, None: none.

        served_milli: at what rate tickets have been served of late. wanted_milli: the operator's rate, -1: no limit.
        """
        limits = self.limits
        reason = worst(signs, limits)
        if reason is None:
            self._bad_since = None
        elif self._bad_since is None:
            self._bad_since = now_ms
        if not good(signs, limits):
            self._good_since = None
        elif self._good_since is None:
            self._good_since = now_ms
        if self.slow is None:
            if reason is not None and self._lasted(self._bad_since, limits.bad_for_ms, now_ms):
                base = served_milli if wanted_milli < 0 else min(served_milli, wanted_milli)
                self._begin(now_ms, max(limits.least_milli, base), reason)
        elif reason is not None:
            self.slow = self.slow._replace(reason=reason)
            if self._may_step(now_ms):
                rate = max(limits.least_milli, int(self.slow.rate_milli * limits.cut))
                self.slow = self.slow._replace(rate_milli=min(rate, self.slow.rate_milli))
        elif self._lasted(self._good_since, limits.good_for_ms, now_ms) and self._may_step(now_ms):
            rate = self.slow.rate_milli + max(1, int(self.slow.base_milli * limits.add_part))
            self.slow = self.slow._replace(rate_milli=rate) if rate < self.slow.base_milli else None
        return self.slow

    def _begin(self, now_ms: int, base: int, reason: Reason) -> None:
        self._stepped_ms = now_ms
        rate = max(self.limits.least_milli, int(base * self.limits.cut))
        self.slow = Slow(min(rate, base), base, reason)

    def _may_step(self, now_ms: int) -> bool:
        if self._stepped_ms is not None and now_ms - self._stepped_ms < self.limits.step_ms:
            return False
        self._stepped_ms = now_ms
        return True

    @staticmethod
    def _lasted(since: int | None, for_ms: int, now_ms: int) -> bool:
        return since is not None and now_ms - since >= for_ms
