"""A front door whose poll costs some 300 µs more: what the regression check must find and name."""

from __future__ import annotations

import time
from typing import Any

from app.cli import main
from app.purchase.track import Tracker

EXTRA_S = 300e-6


def slow(before: Any) -> Any:
    def told(*arguments: Any) -> Any:
        until = time.process_time() + EXTRA_S
        while time.process_time() < until:
            pass
        return before(*arguments)

    return told


if __name__ == "__main__":
    Tracker.told_from_snapshot = slow(Tracker.told_from_snapshot)  # type: ignore[method-assign]
    main()
