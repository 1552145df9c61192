"""verify-draw: finds every lie in a published draw, with nothing but the two public documents."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from app import draw
from app.commands.verify_draw import recompute, verify_draw
from app.errors import CannotStart

SEED = bytes(range(32))
HASHES = [b"hash-%05d" % number for number in range(25)]


class Town:
    """A front door that publishes whatever a test makes it publish."""

    def __init__(self) -> None:
        hash_hex = draw.seed_hash(SEED)
        chain = draw.chain_head(draw.chain_start("x", "A", 3, hash_hex), HASHES)
        empty = draw.chain_start("x", "B", 3, hash_hex)
        facts = {
            "epoch": "3", "freeze_ms": "1", "opens_ms": "2", "seed": SEED.hex(), "seed_hash": hash_hex,
            "beacon_source": "drand", "beacon_value": "f00d",
        }  # fmt: skip
        items = {
            "A": {
                "early": "25", "chain": chain, "drawn": "1", "beacon_used": "f00d",
                "drawn_key": draw.draw_key(SEED, chain, "f00d"),
            },
            "B": {"early": "0", "chain": empty, "drawn": "0", "drawn_key": "", "beacon_used": ""},
        }  # fmt: skip
        self.document: dict[str, Any] = draw.document("x", facts, items, now_ms=3)
        self.entries = [json.loads(line) for line in draw.entry_lines("A", b"".join(HASHES))]
        self.url = ""

    def answer(self, path: str) -> tuple[int, bytes]:
        if path == "/v1/sales/x/draw":
            return 200, json.dumps(self.document).encode()
        if path == "/v1/sales/x/draw/entries":
            return 200, b"".join(json.dumps(entry).encode() + b"\n" for entry in self.entries)
        return 404, b"{}"


@pytest.fixture
def town() -> Iterator[Town]:
    town = Town()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = town.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    town.url = f"http://127.0.0.1:{server.server_port}"
    yield town
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_honest_draw_agrees_and_every_ticket_finds_its_rank(town: Town) -> None:
    report = recompute(town.url, "x")
    assert report.ok, report.checks
    assert (report.tickets, report.trust) == (25, "beacon")
    assert sorted(report.ranks["A"]) == list(range(1, 26))
    assert report.rank_of(f"7-{HASHES[6].hex()}") == ("A", report.ranks["A"][6])
    for foreign in ("7-00", f"8-{HASHES[6].hex()}", "0-", "x", f"99-{HASHES[6].hex()}"):
        assert report.rank_of(foreign) is None


def seed_of_another(town: Town) -> None:
    town.document["seed"] = bytes(32).hex()


def another_hash(town: Town) -> None:
    town.document["seed_hash"] = "00" * 32


def one_ticket_less(town: Town) -> None:
    town.entries.pop()


def one_ticket_exchanged(town: Town) -> None:
    town.entries[3]["ticket_hash"] = "00" * 10


def another_beacon(town: Town) -> None:
    town.document["beacon"]["value"] = "beef"


def another_beacon_used(town: Town) -> None:
    town.document["items"][0]["beacon_used"] = "beef"


def another_key(town: Town) -> None:
    town.document["items"][0]["key"] = "00" * 20


def another_head(town: Town) -> None:
    town.document["items"][0]["chain"] = "00" * 20


def another_epoch(town: Town) -> None:
    town.document["epoch"] = 4


def a_hidden_item(town: Town) -> None:
    town.entries.append({"sku": "C", "seq": 1, "ticket_hash": "00" * 10})


def somebody_in_an_empty_draw(town: Town) -> None:
    town.document["items"][1]["n"] = 1


LIES = [
    seed_of_another,
    another_hash,
    one_ticket_less,
    one_ticket_exchanged,
    another_beacon,
    another_beacon_used,
    another_key,
    another_head,
    another_epoch,
    a_hidden_item,
    somebody_in_an_empty_draw,
]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(town: Town, lie: Callable[[Town], None]) -> None:
    lie(town)
    assert not recompute(town.url, "x").ok


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda town: town.document.update(seed=None), "not published yet"),
        (lambda town: town.entries.reverse(), "not a draw"),
        (lambda town: town.document.pop("items"), "not a draw"),
        (lambda town: town.document.update(seed="zz"), "not a draw"),
        (lambda town: town.entries.__setitem__(0, {"sku": "A"}), "not a draw"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(
    town: Town, spoil: Callable[[Town], Any], sentence: str
) -> None:
    spoil(town)
    with pytest.raises(CannotStart, match=sentence):
        recompute(town.url, "x")


def test_nobody_there_is_one_sentence(town: Town) -> None:
    with pytest.raises(CannotStart, match="HTTP 404"):
        recompute(town.url, "y")
    with pytest.raises(CannotStart, match="does not answer"):
        recompute("http://127.0.0.1:1", "x")


def test_the_command_reports_and_sets_its_exit_status(town: Town) -> None:
    app = typer.Typer()
    app.command()(verify_draw)

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["x", "--front", town.url, *args])

    assert run().exit_code == 0
    noted = run("--json", "--seed-hash", draw.seed_hash(SEED), "--ticket", f"1-{HASHES[0].hex()}")
    assert noted.exit_code == 0
    shown = json.loads(noted.stdout)
    assert shown["ok"] is True
    assert shown["ticket"]["rank"] in range(1, 26)
    assert run("--seed-hash", "00").exit_code == 1
    assert run("--ticket", "1-00").exit_code == 1
    one_ticket_exchanged(town)
    spoilt = run()
    assert spoilt.exit_code == 1
    assert "FAIL" in spoilt.stdout
