"""Calls a person: one log line at level `error` with `alert=<kind>`, and a counter that alert rules watch."""

from __future__ import annotations

from typing import Any

import structlog
from prometheus_client import Counter

ALERTS = Counter("fairdrop_alerts", "things that a person must look at, by kind", ["kind"])
_log = structlog.get_logger("alarm")


def alert(kind: str, why: str, **facts: Any) -> None:
    """Tell the operators of one thing that should never be. `kind` is a stable word; `why` is one sentence."""
    ALERTS.labels(kind).inc()
    _log.error(why, alert=kind, **facts)
