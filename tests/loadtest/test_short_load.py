"""A short form of `make load`: a real crowd under Locust against a real `fairdrop up`, with its verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0  # some 40 at rest


@pytest.mark.slow
@pytest.mark.serial
def test_a_short_peak_keeps_every_promise() -> None:
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "rehearse",
        "--users",
        "150",
        "--spawn-rate",
        "100",
        "--units",
        "15",
    ]
    command += ["--opens-in-s", "5", "--open-for-s", "6", "--pay-within-s", "3", "--run-time-s", "60"]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    assert "verdict: every promise was kept" in done.stdout
    assert "barrier: " in done.stdout
