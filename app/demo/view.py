"""What the reader of the demo sees: its progress, and the figures and checks at the end."""

from __future__ import annotations

import json
import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.demo.crowd import Crowd


class View:
    """Progress on standard error: redrawn in place on a terminal, else one line for each step."""

    def __init__(self, units: int) -> None:
        self.console = Console(stderr=True)
        self._units = units
        self._began = time.monotonic()
        self._step = "starting"
        self._live: Live | None = None
        self.crowd: Crowd | None = None
        self.opens_s = 0.0
        self._last = (0.0, 0, 0)
        self._rates = (0.0, 0.0)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._draw(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, what: str) -> None:
        self._step = what
        if self._live is None:
            self.console.print(
                f"{time.monotonic() - self._began:5.1f} s  {what}", highlight=False, soft_wrap=True
            )
        else:
            self.redraw()

    def redraw(self) -> None:
        if self._live is not None:
            self._live.update(self._draw())

    def _draw(self) -> Panel:
        title = f"fairdrop demo  {time.monotonic() - self._began:4.1f} s"
        rows: list[Any] = [Text(self._step, style="bold")]
        crowd = self.crowd
        if crowd is not None:
            now = time.monotonic()
            if now - self._last[0] >= 0.5:
                spent = now - self._last[0]
                self._rates = ((crowd.joins - self._last[1]) / spent, (crowd.polls - self._last[2]) / spent)
                self._last = (now, crowd.joins, crowd.polls)
            counts = crowd.counts
            paid = counts["paid"]
            bar = Table.grid(padding=(0, 1))
            for name, number, total, colour in (
                ("paid", paid, self._units, "green"),
                ("unit in hand", paid + counts["reserved"] + counts["claimed"], self._units, "yellow"),
                ("in line", counts["waiting"], len(crowd.people), "blue"),
            ):
                bar.add_row(
                    name,
                    ProgressBar(total=max(1, total), completed=number, width=44, complete_style=colour),
                    f"{number:,} of {total:,}",
                )
            rows.append(bar)
            if self.opens_s and (left := self.opens_s - crowd.now_s()) > 0:
                rows.append(Text(f"opens in {left:.1f} s", style="magenta"))
            ended = "  ".join(
                f"{state} {counts[state]:,}"
                for state in ("expired", "cancelled", "left", "refunded", "closed")
                if counts[state]
            )
            rows.append(
                Text(f"joins/s {self._rates[0]:,.0f}   polls/s {self._rates[1]:,.0f}   {ended}", style="dim")
            )
            rows += [Text(f"  {line}", style="dim") for line in crowd.news]
        return Panel(Group(*rows), title=title, border_style="cyan")


def print_report(result: dict[str, Any]) -> None:
    """The figures and the audit, as tables on standard output."""
    console = Console()
    figures = Table(title="One flash sale", show_header=False)
    for name, value in result.items():
        if name != "audit":
            figures.add_row(name, f"{value:,}")
    console.print(figures)
    audit = Table(title="Audit: both sides of every promise")
    for heading in ("what must hold", "left", "right", ""):
        audit.add_column(heading)
    for check in result["audit"]:
        audit.add_row(
            check["name"],
            _short(check["left"]),
            _short(check["right"]),
            "[green]ok" if check["ok"] else "[red]BROKEN",
        )
    console.print(audit)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
