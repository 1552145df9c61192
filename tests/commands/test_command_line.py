"""What `fairdrop` offers, and that asking it what that is costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import typer

from app.cli import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("asyncio", "asyncpg", "fastapi", "httpx", "pydantic", "sqlalchemy", "uvloop")


def test_every_command_stands_under_its_family() -> None:
    """Prevents a command that --help shows and that starts slowly, or that nobody can call."""
    named = {family: names for families in FAMILIES.values() for family, names in families.items()}
    files = {path.stem for path in (ROOT / "app" / "commands").glob("*.py")}
    assert files - set(named) == {"__init__", "asking", "installation"}
    for family, names in named.items():
        commands: typer.Typer = import_module(f"app.commands.{family}").commands
        single = [one.name or one.callback.__name__ for one in commands.registered_commands if one.callback]
        assert {*single, *(one.name for one in commands.registered_groups)} == set(names), family


def test_help_loads_nothing_that_only_a_running_command_needs() -> None:
    program = (
        "import sys; from app.cli import command_line; command_line();"
        f" print(*({set(HEAVY)!r} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert ran.stdout.split() == []
