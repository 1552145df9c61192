"""What the office does by itself goes on, whatever one look runs into."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app import office
from app.desk import live
from app.office import Tender


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    monkeypatch.setattr(office, "TEND_EVERY_S", 0.0)
    return asyncio.Semaphore(0)


async def _twice(work: Any, looks: asyncio.Semaphore) -> None:
    """Run `work` until it has looked twice."""

    async def looked() -> None:
        await looks.acquire()
        await looks.acquire()

    tasks = asyncio.create_task(looked()), asyncio.create_task(work)
    done, _ = await asyncio.wait(tasks, timeout=60, return_when="FIRST_COMPLETED")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tasks[0] in done


async def test_a_look_that_breaks_is_not_the_last(
    looks: asyncio.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tend(self: Tender) -> None:
        looks.release()
        raise KeyError("nobody thought of it")

    monkeypatch.setattr(Tender, "tend", tend)
    await _twice(Tender(None, "").run(), looks)  # type: ignore[arg-type]


async def test_a_sale_that_breaks_the_live_look_keeps_no_other_from_being_watched(
    looks: asyncio.Semaphore,
) -> None:
    watch = live.Watch(None)  # type: ignore[arg-type]

    async def look(sale_id: str, _: Any) -> dict[str, Any]:
        if sale_id == "broken":
            raise KeyError("nobody thought of it")
        looks.release()
        return {}

    watch._look = look  # type: ignore[method-assign, assignment]
    for sale_id in ("broken", "sound", "sound too"):
        watch._sales[sale_id] = live._Watched(asyncio.get_running_loop().time() + 3_600)
    await _twice(watch.run(), looks)
