"""The pages' scripts, as far as they can be judged without a browser: they parse, know all words, and solve the riddle.

tests/story/test_the_page.py plays a whole purchase in a browser.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.buyer.challenge import zero_bits
from app.problems import CODES

PAGES = Path(__file__).parents[2] / "app" / "pages"
NODE = shutil.which("node")
WITHIN_S = 120.0  # a node that hangs; a run takes a tenth of a second

pytestmark = pytest.mark.skipif(NODE is None, reason="no node on PATH")


def node(*arguments: str) -> str:
    assert NODE is not None
    done = subprocess.run([NODE, *arguments], capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def part(begins: str, ends: str) -> str:
    """The lines of the buyer's script from one to another."""
    text = (PAGES / "buyer.js").read_text(encoding="utf-8")
    return text[text.index(begins) : text.index(ends)]


@pytest.mark.parametrize("name", sorted(path.name for path in PAGES.glob("*.js")))
def test_a_script_parses(name: str) -> None:
    node("--check", str(PAGES / name))


def test_both_languages_have_the_same_words_and_every_refusal_is_one_of_ours() -> None:
    shape = "(words) => Object.fromEntries(Object.entries(words).map(([key, one]) => [key, typeof one]))"
    words: Any = json.loads(
        node(
            "-e",
            part("const WORDS", "const zh =")
            + f"const shape = {shape};"
            + "console.log(JSON.stringify([WORDS.en, WORDS.zh].map(one => [shape(one), Object.keys(one.refused)])))",
        )
    )
    (english, refused), (chinese, refused_too) = words
    assert english == chinese and len(english) > 60
    assert refused == refused_too and set(refused) <= set(CODES)


def test_the_page_solves_what_the_front_door_asks() -> None:
    """At every length of the riddle around the ends of SHA-256's blocks, where the padding needs one more."""
    bits, riddles = 9, ["r" * length for length in (1, 50, 53, 54, 55, 60, 62, 63, 64, 110, 118, 119, 127)]
    solve = part("const ROUND", "function script(")
    asked = f"for (const token of {json.dumps(riddles)}) console.log((await solve({{ token, bits: {bits} }})).nonce);"
    nonces = node("-e", f'"use strict"; {solve} (async () => {{ {asked} }})();').split()
    assert len(nonces) == len(riddles)
    for riddle, nonce in zip(riddles, nonces, strict=True):
        assert zero_bits(hashlib.sha256(f"{riddle}:{nonce}".encode()).digest()) >= bits, len(riddle)
