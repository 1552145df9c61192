"""Logs hold no secrets, /metrics answers whom it may, and counters are summed over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.settings import Settings
from app.telemetry import HIDDEN, Metrics, redact, redact_text

ROOT = Path(__file__).parents[1]

LOGS = """
import logging, structlog
from app.settings import Settings
from app.telemetry import configure_logging
configure_logging(Settings(log_format="json", log_level="debug"), "front")
log = structlog.get_logger("x")
log.info("joined", ticket="t1.secretsecretsecret", buyer="b", headers={"authorization": "Bearer abcdefgh12345678"})
log.warning("call to +8613800138000 failed", phone="+8613800138000")
logging.getLogger("library").error("GET /v1/tickets/t1.abcdefghijklmnopqrst %s", "redis://:hush-hush@host/0")
try:
    raise RuntimeError("Authorization: Pass p1.aaaaaaaaaaaaaaaaaaaaaaaa")
except RuntimeError:
    log.exception("failed")
"""


def test_no_secret_reaches_a_log_not_even_inside_an_exception() -> None:
    done = subprocess.run([sys.executable, "-c", LOGS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for secret in ("secretsecret", "abcdefgh", "13800138000", "hush-hush", "aaaaaaaa"):
        assert secret not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "error"]
    assert all(line["process"] == "front" and line["at"].endswith("Z") for line in lines)
    assert lines[0]["buyer"] == "b"
    assert lines[0]["ticket"] == HIDDEN
    assert "RuntimeError" in lines[3]["exception"]


@given(st.from_regex(r"\A\+[1-9][0-9]{7,14}\Z"), st.sampled_from(["call {}", "({})", "to:{},", "{}"]))
def test_every_phone_number_is_hidden_wherever_it_stands(phone: str, text: str) -> None:
    assert phone not in redact_text(text.format(phone))


def test_what_is_no_secret_stays() -> None:
    event = {
        "event": "sale opened at 2026-11-11T10:00:00+08:00",
        "sku": "PH-128",
        "units": 3,
        "order_no": "0" * 22,
    }
    assert redact(None, "info", dict(event)) == event


@pytest.mark.parametrize(
    ("allow", "host", "allowed"),
    [
        ("127.0.0.0/8,::1/128", "127.0.0.1", True),
        ("127.0.0.0/8,::1/128", "::1", True),
        ("127.0.0.0/8,::1/128", "::ffff:127.0.0.1", True),
        ("127.0.0.0/8,::1/128", "10.0.0.1", False),
        ("127.0.0.0/8,::1/128", None, False),
        ("127.0.0.0/8,::1/128", "testclient", False),
        ("", "127.0.0.1", False),
        ("10.0.0.0/8", "10.1.2.3", True),
    ],
)
def test_only_the_networks_of_the_setting_read_metrics(allow: str, host: str | None, allowed: bool) -> None:
    settings = Settings.model_construct(metrics_allow=allow)
    assert Metrics(settings).allows(host) is allowed


COUNT = """
import sys
from prometheus_client import Counter
from app.settings import Settings
from app.telemetry import Metrics
Counter("joins", "joins").inc(int(sys.argv[1]))
sys.stdout.buffer.write(Metrics(Settings()).text())
"""


def test_counters_of_several_processes_are_summed(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    texts = [
        subprocess.run(
            [sys.executable, "-c", COUNT, number],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in ("2", "40")
    ]
    assert "joins_total 2.0" in texts[0]
    assert "joins_total 42.0" in texts[1]
