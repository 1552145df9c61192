"""Where the files are that are not Python: in a checkout beside `app/`, in an installed wheel inside it."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PART = re.compile(r"^--@ part (\w+)$", re.MULTILINE)


@cache
def _folder(in_wheel: str, in_checkout: str) -> Path:
    """The packed folder if this is an installed wheel, else the checkout's. Neither: the installation is broken."""
    for folder in (_PACKAGE / in_wheel, _PACKAGE.parent / in_checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{in_checkout}/ is missing beside {_PACKAGE}: this installation is incomplete")


def lua_dir() -> Path:
    """The folder of the Redis scripts, one operation a file."""
    return _folder("_lua", "lua")


@cache
def scripts() -> dict[str, str]:
    """Every Redis script as the server gets it, by name: `--@ part NAME` is replaced by lua/parts/NAME.lua."""
    folder = lua_dir()

    def part(found: re.Match[str]) -> str:
        return (folder / "parts" / f"{found[1]}.lua").read_text(encoding="utf-8").rstrip("\n")

    return {
        file.stem: _PART.sub(part, file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.lua"))
    }


def migrations_dir() -> Path:
    """The folder of the Alembic migrations (env.py and versions/)."""
    return _folder("_migrations", "migrations")


def release() -> str:
    """The version that is installed; "0.0.0" in a checkout that is not."""
    try:
        return version("fairdrop")
    except PackageNotFoundError:
        return "0.0.0"
