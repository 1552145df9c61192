"""What a process says about itself: logs without secrets and metrics summed over its processes.

Logs are structlog events: one JSON object a line in production, readable lines on a terminal. Whatever is logged
passes through `redact`: tickets, passes, phone numbers and Authorization never reach a log, not even inside the text of
an exception.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from structlog.typing import EventDict, WrappedLogger

from app.settings import Settings

HIDDEN = "[hidden]"
SECRET_NAMES = re.compile(
    r"(^|_)(ticket|token|pass|password|phone|contact|authorization|cookie|secret|jwt|openid|signature|operator_key)$|"
    r"(^|_)(signing|pii)_keys?$",
    re.IGNORECASE,
)
# (what, by what): values that are secret wherever they stand, also in the text of somebody else's exception.
SECRET_TEXTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(Bearer|Pass|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), r"\1 " + HIDDEN),
    (re.compile(r"(/v1/tickets/)[A-Za-z0-9._~-]{16,}"), r"\1" + HIDDEN),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), HIDDEN),  # a JWT
    (re.compile(r"(?<![\w.])\+\d{7,15}\b"), HIDDEN),  # E.164
    (re.compile(r"(\b\w+://[^\s:/@]*:)[^\s@/]+@"), r"\1" + HIDDEN + "@"),  # the password of a URL
)


def redact_text(text: str) -> str:
    """The text without tickets in paths, passes, JWTs, phone numbers, passwords of URLs and Authorization values."""
    for pattern, instead in SECRET_TEXTS:
        text = pattern.sub(instead, text)
    return text


def _redacted(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return HIDDEN if value and SECRET_NAMES.search(name) else redact_text(value)
    if isinstance(value, bytes):
        return HIDDEN if SECRET_NAMES.search(name) else value
    if isinstance(value, dict):
        return {key: _redacted(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, inner) for inner in value]
    return value


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: hides secret fields by name and secret values by form."""
    for name in list(event):
        if not name.startswith("_"):
            event[name] = _redacted(name, event[name])
    return event


def configure_logging(settings: Settings, process: str) -> None:
    """Send structlog and standard logging to standard error, in one form, redacted."""
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and settings.development and sys.stderr.isatty()
    )
    level = getattr(logging, settings.log_level.upper())

    def name_process(_logger: WrappedLogger, _method: str, event: EventDict) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        name_process,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,  # to text first, so that redaction reads it too
        redact,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *before],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in (
        "uvicorn",
        "uvicorn.error",
    ):  # "Started server process" and the like: the supervisor says it better
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in ("httpx", "httpcore", "sqlalchemy.engine", "asyncio"):  # a line for every request is no news
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


# --- metrics ----------------------------------------------------------------------------------------------------------

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported first


class Metrics:
    """The text of /metrics, and who may read it (FAIRDROP_METRICS_ALLOW)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, settings: Settings) -> None:
        """ValueError: metrics_allow holds something that is not a network."""
        names = [name.strip() for name in settings.metrics_allow.split(",") if name.strip()]
        self._networks = [ipaddress.ip_network(name, strict=False) for name in names]

    def allows(self, host: str | None) -> bool:
        """Whether this peer may read. No address (a Unix socket, a test client): no."""
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)

    def text(self) -> bytes:
        """Every metric; in a front of several processes the sum over all, whichever is asked."""
        if not os.environ.get(MULTIPROCESS_DIR):
            return generate_latest(REGISTRY)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def prepare_metrics(folder: Path) -> None:
    """An empty folder for the counters of several processes; what earlier runs left would be counted again."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.db"):
        file.unlink()


def forget_process(pid: int, folder: Path) -> None:
    """A process has ended: its live gauges no longer count, its counters do."""
    mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
