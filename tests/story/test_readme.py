"""The README's example is run as it stands; only the addresses are replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.demo.servers import Urls

CHECKOUT = Path(__file__).resolve().parents[2]
USES = ("bash", "curl", "date")


def example() -> str:
    """The shell block of the chapter that puts Fairdrop in front of a shop."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    chapter = text.partition("## Put it in front of a shop")[2].partition("\n## ")[0]
    found = re.search(r"```sh\n(.*?)```", chapter, re.S)
    assert found is not None
    return found[1]


@pytest.mark.skipif(any(shutil.which(program) is None for program in USES), reason=f"needs {', '.join(USES)}")
def test_the_example_of_the_readme_works(running: Urls) -> None:
    script = example()
    script = script.replace("http://127.0.0.1:8080", running.front).replace(
        "http://127.0.0.1:8081", running.office
    )
    script, count = re.subn(r"^KEY=.*$", f"KEY={running.operator_key}", script, count=1, flags=re.M)
    assert count == 1
    script = script.replace(".venv/bin/python", "python3")
    # A new sale is known to every front door within 200 ms; a person who types is slower than that.
    script = script.replace("PASS=", "sleep 0.25\nPASS=", 1)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    decoder, answers, at = json.JSONDecoder(), [], 0
    text = done.stdout.strip()
    while at < len(text):
        answer, at = decoder.raw_decode(text, at)
        answers.append(answer)
        while at < len(text) and text[at].isspace():
            at += 1
    draft, published, ticket, events, live = answers
    assert draft["id"] == "phone-1"
    assert published["state"] in ("scheduled", "line_open")
    assert (ticket["state"], ticket["sku"]) == ("waiting", "PH-128")
    assert "sale.published" in {event["type"] for event in events["data"]}
    assert live["sale"] == "phone-1"
