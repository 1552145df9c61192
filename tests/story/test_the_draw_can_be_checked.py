"""Fourth story: everyone who came before the minute is drawn, and anyone can recompute the draw from public data."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx

from tests.story.conftest import Town
from tests.story.people import until

CHECKOUT = Path(__file__).resolve().parents[2]
EARLY = 12


async def test_anyone_can_recompute_every_rank(town: Town) -> None:
    sale = await town.operator.publishes_a_sale(units=3, opens_in_s=60.0, draw_freeze_s=1)
    people = [town.buyer(f"p{number}", sale) for number in range(EARLY)]
    for person in people:
        assert (await person.taps()).status_code == 202

    # Before the opening only the commitment is public: the hash of a seed that nobody has seen.
    async with httpx.AsyncClient(base_url=town.urls.front, timeout=60, trust_env=False) as anyone:

        async def draw() -> dict[str, object]:
            answer = await anyone.get(f"/v1/sales/{sale}/draw")
            assert answer.status_code == 200, answer.text
            shown: dict[str, object] = answer.json()
            return shown

        before = json.dumps(await draw())
        await town.operator.opens(sale, in_s=6.0)

        async def reserved() -> int:
            return [(await person.looks())["state"] for person in people].count("reserved")

        await until(reserved, lambda count: count == 3)
        after = json.dumps(await until(draw, lambda shown: seed_of(shown) is not None))
        seed = seed_of(json.loads(after))
        assert seed is not None
        assert seed not in before
        assert (
            hashlib.sha256(bytes.fromhex(seed)).hexdigest() in before
        )  # it was committed to before anyone joined

    # Ranks are a permutation of the early tickets, and the first three have won.
    documents = [await person.looks() for person in people]
    winners = {document["ticket_id"] for document in documents if document["state"] == "reserved"}
    ranks = {document["ticket_id"]: document["rank"] for document in documents}
    assert all(rank is None or 1 <= rank <= EARLY for rank in ranks.values())
    waiting = sorted(rank for ticket, rank in ranks.items() if ticket not in winners)
    assert waiting == list(range(4, EARLY + 1))

    # The command does it all from the two public addresses alone.
    check = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "app.cli", "verify-draw", sale, "--front", town.urls.front],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert check.returncode == 0, check.stdout + check.stderr


def seed_of(shown: object) -> str | None:
    """The revealed seed, wherever the document has it."""
    if isinstance(shown, dict):
        if isinstance(shown.get("seed"), str):
            return str(shown["seed"])
        found = [seed_of(value) for value in shown.values()]
    elif isinstance(shown, list):
        found = [seed_of(value) for value in shown]
    else:
        return None
    return next((seed for seed in found if seed), None)
