"""What all suppliers' HTTP has in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from tests.providers.server import sandbox


class Searches:
    """Stands first among the importers and notes what is looked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        self.names.append(name)
        return None


async def test_a_call_searches_the_disk_for_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a third of a call's CPU: httpcore imports sniffio each time, and a failed import is never remembered."""
    async with sandbox() as shop:
        await shop.stats()
        searches = Searches()
        monkeypatch.setattr(sys, "meta_path", [searches, *sys.meta_path])
        await shop.stats()
    assert "sniffio" not in searches.names
