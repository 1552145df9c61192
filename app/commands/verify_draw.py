"""`fairdrop verify-draw SALE`: recompute a draw from what the front door publishes, trusting nothing else.

Needs `GET /v1/sales/{sale}/draw` and `/draw/entries` only, no key and no store: a buyer, a newspaper or an auditor can
run it against anybody's sale. What it cannot know is whether a seed hash or beacon source was changed after publish:
compare with what you noted down then (`--seed-hash`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from app import draw
from app.commands.installation import DataDir, settings_of
from app.errors import CannotStart

if TYPE_CHECKING:
    import httpx

commands = typer.Typer()

ANSWER_WITHIN_S = 30.0  # each read; a list of a million entries is 80 MB and streams
ENTRIES_MAX = 50_000_000  # more than any sale; a front door that never stops must not fill our memory
HINT = "the draw is not published yet: try again after the opening"


@dataclass
class Check:
    """One thing that must agree: what was published, and what follows from the rest."""

    name: str
    ok: bool
    left: str
    right: str


@dataclass
class Report:
    """What was recomputed. ok: everything agrees. ranks: sku -> rank of each seq (index 0 is seq 1)."""

    sale: str
    trust: str
    tickets: int = 0
    checks: list[Check] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    hashes: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def rank_of(self, ticket_id: str) -> tuple[str, int] | None:
        """The sku and the rank of a ticket_id (`<seq>-<hash>`), if it was in the draw."""
        seq, _, ticket_hash = ticket_id.partition("-")
        for sku, hashes in self.hashes.items():
            if seq.isdigit() and 1 <= int(seq) <= len(hashes) and hashes[int(seq) - 1].hex() == ticket_hash:
                return sku, self.ranks[sku][int(seq) - 1]
        return None

    def check(self, name: str, left: object, right: object) -> None:
        self.checks.append(Check(name, left == right, str(left), str(right)))


def recompute(front_url: str, sale: str) -> Report:
    """Recompute every rank from the public documents. CannotStart: nobody answers, or nothing to check yet."""
    import httpx

    path = f"/v1/sales/{quote(sale, safe='')}/draw"
    try:
        with httpx.Client(base_url=front_url, timeout=ANSWER_WITHIN_S, trust_env=False) as http:
            answer = http.get(path)
            if answer.status_code != 200:
                raise CannotStart(f"{front_url} has no draw of {sale} (HTTP {answer.status_code})")
            document = answer.json()
            if document.get("seed") is None:
                raise CannotStart(HINT)
            return _check(sale, document, _entries(http, path + "/entries"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CannotStart(
            f"the front door at {front_url} does not answer: {error or type(error).__name__}"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CannotStart(
            f"{front_url} answers something that is not a draw ({type(error).__name__})"
        ) from error


def _entries(http: httpx.Client, path: str) -> dict[str, list[bytes]]:
    """Ticket hashes by sku, in seq order. ValueError if a seq is missing, doubled or out of order."""
    hashes: dict[str, list[bytes]] = {}
    count = 0
    with http.stream("GET", path) as answer:
        if answer.status_code != 200:
            raise CannotStart(f"the entries of the draw are not published (HTTP {answer.status_code})")
        for line in answer.iter_lines():
            if not line.strip():
                continue
            count += 1
            if count > ENTRIES_MAX:
                raise CannotStart(f"more than {ENTRIES_MAX} entries")
            entry = json.loads(line)
            of_item = hashes.setdefault(entry["sku"], [])
            of_item.append(bytes.fromhex(entry["ticket_hash"]))
            if entry["seq"] != len(of_item) or len(of_item[-1]) != draw.HASH_BYTES:
                raise ValueError("entries are not in seq order")
    return hashes


def _check(sale: str, document: dict[str, Any], hashes: dict[str, list[bytes]]) -> Report:
    report = Report(sale, document["trust"])
    seed = bytes.fromhex(document["seed"])
    report.check("seed_is_the_one_committed_to", document["seed_hash"], draw.seed_hash(seed))
    beacon = document["beacon"]
    for item in document["items"]:
        sku, n = item["sku"], item["n"]
        entries = hashes.pop(sku, [])
        report.check(f"{sku}: entries", n, len(entries))
        start = draw.chain_start(sale, sku, document["epoch"], document["seed_hash"])
        chain = draw.chain_head(start, entries)
        report.check(f"{sku}: chain_head", item["chain"], chain)
        if not item["drawn"]:
            report.check(f"{sku}: nobody_to_draw", n, 0)
            continue
        used = item["beacon_used"]
        if beacon["source"] == "none" or n == 0:
            report.check(f"{sku}: beacon", used, "")
        elif used != "missing":
            report.check(f"{sku}: beacon", used, beacon["value"])
        key = draw.draw_key(seed, chain, used)
        report.check(f"{sku}: key", item["key"], key)
        if n != len(entries):
            continue
        keys = draw.round_keys(key, n)
        ranks = [draw.rank_of(seq, n, keys) for seq in range(1, n + 1)]
        report.check(f"{sku}: every_rank_once", len(set(ranks)), n)
        report.ranks[sku], report.hashes[sku] = ranks, entries
        report.tickets += n
    report.check("no_entries_of_other_items", sorted(hashes), [])
    return report


@commands.command("verify-draw")
def verify_draw(
    sale: Annotated[str, typer.Argument(metavar="SALE", help="The sale's id.")],
    front: Annotated[
        str, typer.Option("--front", help="The front door's URL. [default: of the running `up`]")
    ] = "",
    seed_hash: Annotated[
        str, typer.Option("--seed-hash", help="What was public before the opening, if you noted it.")
    ] = "",
    ticket: Annotated[str, typer.Option("--ticket", help="Show the rank of this ticket_id.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Recompute every rank of a draw from what the front door publishes; exit 1 if anything does not agree."""
    report = recompute(front or _front_of(data_dir), sale)
    if seed_hash:
        report.check("seed_hash_as_noted", seed_hash.lower(), _published_hash(report))
    found = report.rank_of(ticket) if ticket else None
    if ticket:
        report.check("ticket_was_in_the_draw", found is not None, True)
    if as_json:
        print(
            json.dumps(
                {
                    "sale": sale,
                    "ok": report.ok,
                    "trust": report.trust,
                    "tickets": report.tickets,
                    "ticket": {"sku": found[0], "rank": found[1]} if found else None,
                    "checks": [vars(check) for check in report.checks],
                }
            )
        )
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}  {check.left}" + _other(check))
        if found:
            print(f"ticket {ticket} ({found[0]}) has rank {found[1]}")
        print(f"{report.tickets} tickets drawn, {'all agrees' if report.ok else 'DOES NOT AGREE'}")
        if report.trust == "operator":
            print("No beacon was named: that the seed was not chosen must be believed of the operator.")
    raise typer.Exit(0 if report.ok else 1)


def _other(check: Check) -> str:
    return "" if check.ok else f"  (computed: {check.right})"


def _published_hash(report: Report) -> str:
    return next(check.left for check in report.checks if check.name == "seed_is_the_one_committed_to")


def _front_of(data_dir: Path | None) -> str:
    from app.data_dir import read_urls

    settings = settings_of(data_dir=data_dir)
    return settings.public_url or str(read_urls(settings.data_dir)["front"])
