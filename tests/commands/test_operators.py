"""The operators' commands, run as a person runs them, against a running office."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import pytest

from app.commands.providers import transitions
from app.ledger import bills
from app.providers.payment import BillLine
from tests.office.conftest import FIRST_KEY, Office, iso, write_order

ROOT = Path(__file__).resolve().parents[2]


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def fairdrop(*words: str, office: Office | None = None, said: str = "", **environment: str) -> Ran:
    """One command of its own process."""
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "160", **environment}
    if office is not None:
        given = {"FAIRDROP_OFFICE_URL": office.url, "FAIRDROP_OPERATOR_KEY": FIRST_KEY, **given}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli", *words,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=given,
    )  # fmt: skip
    async with asyncio.timeout(180):
        out, err = await process.communicate(said.encode())
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


def yaml_of(sale: str = "drop", title: str = "Drop") -> str:
    return (
        f"id: {sale}\ntitle: {title}\nline_opens_at: {iso(3600)}\nopens_at: {iso(7200)}\ncloses_at: {iso(9000)}\n"
        "items:\n  - {sku: A, title: Thing, price_minor: 500, currency: EUR, units: 10}\n"
    )


async def test_a_sale_is_applied_published_paused_resumed_listed_and_closed(
    office: Office, tmp_path: Path
) -> None:
    file = tmp_path / "sale.yaml"
    file.write_text(yaml_of())
    tried = await fairdrop("sale", "apply", str(file), "--dry-run", "--json", office=office)
    assert (tried.status, tried.json["state"]) == (0, "draft")
    made = await fairdrop("sale", "apply", str(file), "--json", "--reason", "autumn", office=office)
    assert (made.status, made.json["id"], made.json["version"]) == (0, "drop", 1), made.err
    changed = await fairdrop(
        "sale", "apply", "-", "--publish", "--json", office=office, said=yaml_of(title="Other")
    )
    assert (changed.status, changed.json["title"], changed.json["state"]) == (0, "Other", "scheduled"), (
        changed.err
    )
    for action, state in (("pause", "paused"), ("resume", "scheduled")):
        turned = await fairdrop("sale", action, "drop", "--json", office=office)
        assert (turned.status, turned.json["state"]) == (0, state), turned.err
    again = await fairdrop("sale", "resume", "drop", office=office)
    assert (again.status, again.out) == (1, "") and again.err.startswith("fairdrop: wrong_state:")
    listed = await fairdrop("sale", "list", "--json", office=office)
    assert [one["id"] for one in listed.json["data"]] == ["drop"]
    drawn = await fairdrop("sale", "list", "--state", "scheduled", office=office)
    assert drawn.status == 0 and "drop" in drawn.out and "scheduled" in drawn.out
    closed = await fairdrop("sale", "close", "drop", "--idempotency-key", "k", office=office)
    assert closed.status == 0 and "closed" in closed.out
    repeated = await fairdrop("sale", "close", "drop", "--idempotency-key", "k", "--json", office=office)
    assert (repeated.status, repeated.json["state"]) == (0, "closed")
    assert [e["action"] for e in (await office.get("/v1/admin/journal")).json()["data"]].count(
        "sale.close"
    ) == 1


async def test_a_document_that_does_not_hold_is_told_path_and_code(office: Office, tmp_path: Path) -> None:
    file = tmp_path / "sale.yaml"
    file.write_text(yaml_of().replace("EUR", "XXQ"))
    refused = await fairdrop("sale", "apply", str(file), office=office)
    assert refused.status == 1 and "items.0.currency: unknown_currency" in refused.err
    for text in ("a: [", "just words", "title: x", "a: *b"):
        file.write_text(text)
        refused = await fairdrop("sale", "apply", str(file), office=office)
        assert (refused.status, refused.err.count("\n")) == (2, 1), refused.err
    missing = await fairdrop("sale", "apply", str(tmp_path / "none.yaml"), office=office)
    assert missing.status == 2 and "cannot be read" in missing.err


async def test_the_audit_ends_with_1_when_something_does_not_agree(office: Office) -> None:
    await office.open_sale()
    await write_order(office)
    fine = await fairdrop("audit", "drop", office=office)
    assert fine.status == 0 and "all agree" in fine.out and "units_add_up:A" in fine.out
    await office.redis("HINCRBY", "{sale:drop}:stock", "A", -1)
    bad = await fairdrop("audit", "drop", "--json", office=office)
    assert bad.status == 1 and not bad.json["ok"]
    assert [c["name"] for c in bad.json["checks"] if not c["ok"]] == ["units_add_up:A"]
    none = await fairdrop("audit", "nothing", office=office)
    assert none.status == 1 and none.err.startswith("fairdrop: no_such_sale:")


async def test_keys_and_breakers(office: Office) -> None:
    made = await fairdrop("key", "create", "Mei", "--role", "viewer", "--json", office=office)
    assert made.status == 0, made.err
    key, key_id = made.json["key"], made.json["id"]
    may_not = await fairdrop("sale", "pause", "drop", office=office, FAIRDROP_OPERATOR_KEY=key)
    assert (may_not.status, "forbidden" in may_not.err) == (2, True)
    listed = await fairdrop("key", "list", office=office)
    assert "Mei" in listed.out and key not in listed.out
    assert (await fairdrop("key", "revoke", key_id, office=office)).status == 0
    assert (await fairdrop("key", "revoke", key_id, office=office)).status == 1
    assert (await fairdrop("sale", "list", office=office, FAIRDROP_OPERATOR_KEY=key)).status == 2
    turned = await fairdrop("providers", "sandbox", "--breaker", "forced_open", "--json", office=office)
    assert (turned.status, turned.json["mode"]) == (0, "forced_open")
    shown = await fairdrop("providers", office=office)
    assert shown.status == 0 and "forced_open" in shown.out
    tried = await fairdrop(
        "providers", "--route", "card", "--to", "sandbox=3", "--dry-run", "--json", office=office
    )
    assert (tried.status, tried.json["suppliers"]) == (0, [{"name": "sandbox", "weight": 3}]), tried.err
    routes = await fairdrop("providers", "--routes", office=office)
    assert routes.status == 0 and "sandbox-sms=1" in routes.out and "card" not in routes.out
    back = await fairdrop("providers", "--route", "sms", "--to", "settings", "--json", office=office)
    assert (back.status, back.json["set_by"]) == (0, "settings")
    for words in (("--route", "card"), ("--route", "card", "--to", "sandbox"), ("--to", "settings")):
        assert (await fairdrop("providers", *words, office=office)).status == 2
    assert (await fairdrop("providers", "nobody", "--breaker", "auto", office=office)).status == 1
    told = await fairdrop("providers", "sandbox", "--history", "--json", office=office)
    (one,) = told.json["data"]
    assert (one["name"], one["before"], one["after"], one["why"]) == (
        "sandbox", "closed", "forced_open", "operator",
    )  # fmt: skip
    assert one["by"].startswith("first admin (")
    told = await fairdrop("providers", "--history", office=office)
    assert told.status == 0 and "forced_open" in told.out and one["at"] in told.out
    assert (await fairdrop("providers", "sandbox", office=office)).status == 2
    assert (await fairdrop("providers", "sandbox", "--breaker", "wide", office=office)).status == 2


async def test_no_office_no_key_and_bad_usage_are_one_sentence_and_2(tmp_path: Path) -> None:
    nobody = await fairdrop(
        "sale", "list", FAIRDROP_OFFICE_URL="http://127.0.0.1:1", FAIRDROP_OPERATOR_KEY="k" * 20
    )
    assert nobody.status == 2 and nobody.err.startswith("fairdrop: no office answers at http://127.0.0.1:1")
    keyless = await fairdrop(
        "sale", "list", "--data-dir", str(tmp_path), FAIRDROP_OFFICE_URL="http://127.0.0.1:1"
    )
    assert keyless.status == 2 and "FAIRDROP_OPERATOR_KEY" in keyless.err
    nothing = await fairdrop("sale", "list", "--data-dir", str(tmp_path))
    assert nothing.status == 2 and "start `fairdrop up` first" in nothing.err
    for run in (nobody, keyless, nothing):
        assert run.err.count("\n") == 1 and run.out == ""
    for words in (("sale",), ("sale", "fly"), ("sale", "pause"), ("key", "create", "x", "--role", "root")):
        assert (await fairdrop(*words)).status == 2, words


async def test_urls_json_of_a_running_up_is_enough(office: Office, tmp_path: Path) -> None:
    (tmp_path / "urls.json").write_text(json.dumps({"office": office.url, "operator_key": FIRST_KEY}))
    await office.draft()
    ran = await fairdrop("sale", "list", "--json", "--data-dir", str(tmp_path))
    assert [one["id"] for one in ran.json["data"]] == ["drop"], ran.err


@pytest.mark.parametrize(
    "words",
    [("sale",), ("sale", "apply"), ("sale", "publish"), ("key", "create"), ("providers",), ("audit",)],
)
async def test_every_command_has_help(words: tuple[str, ...]) -> None:
    ran = await fairdrop(*words, "--help")
    assert ran.status == 0 and "Usage:" in ran.out


class _Told:
    """An office that knows two transitions."""

    rows: ClassVar[list[dict[str, Any]]] = [
        {
            "at": f"2026-11-11T12:00:0{second}.000Z", "at_ms": second, "before": before, "after": after, "why": why,
            "calls": 10, "failures": 7, "slow": 0, "last_error": "create: http_500", "open_for_ms": 1_000, "by": "w1",
        }
        for second, before, after, why in (
            (1, "closed", "open", "failure_rate"),
            (2, "open", "half_open", "interval_over"),
        )
    ]  # fmt: skip

    def ask(self, method: str, path: str) -> Any:
        assert (method, path) == ("GET", "/v1/admin/providers")
        return {"data": [{"name": "one", "history": self.rows}, {"name": "two", "history": []}]}

    def all_of(self, path: str) -> list[dict[str, Any]]:
        assert path == "/v1/admin/providers/one/history"
        return self.rows[::-1]


@pytest.mark.parametrize("name", [None, "one"])
def test_the_history_of_breakers_is_told_newest_first(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    transitions(cast(Any, _Told()), name, as_json=True)
    told = json.loads(capsys.readouterr().out)["data"]
    assert [(one["name"], one["after"]) for one in told] == [("one", "half_open"), ("one", "open")]
    transitions(cast(Any, _Told()), name, as_json=False)
    shown = capsys.readouterr().out
    assert 0 < shown.index("12:00:02.000Z") < shown.index("12:00:01.000Z")


async def test_bills_are_listed_with_what_differs(office: Office) -> None:
    assert (await fairdrop("bills", office=office)).status == 0  # none yet
    day = date(2026, 11, 11)
    line = BillLine(
        kind="capture", provider_ref="ref-1", our_id="A1-1", order_no="A1", amount_minor=100, currency="CNY",
        at=datetime(2026, 11, 11, 12, tzinfo=UTC),
    )  # fmt: skip
    async with office.desk.engine.begin() as conn:
        await bills.want(conn, "sandbox", day)
        held = await bills.lease(conn, ["sandbox"], 60)
        assert held is not None and await bills.store(conn, held, [line])
        await bills.compare(conn, "sandbox", day)
    shown = await fairdrop("bills", "--differing", office=office)
    assert shown.status == 1, shown.err
    assert all(word in shown.out for word in ("2026-11-11", "missing_here", "ref-1", "A1-1"))
    document = await fairdrop("bills", "--provider", "sandbox", "--json", office=office)
    assert document.status == 1 and document.json["data"][0]["differing"] == 1


async def test_an_order_is_traced(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office, state="paid")
    shown = await fairdrop("trace", number, office=office)
    assert shown.status == 0, shown.err
    assert "Redis tells its buyer: paid" in shown.out and "money captured" in shown.out
    document = await fairdrop("trace", number, "--json", office=office)
    assert document.json["order_no"] == number
    assert (await fairdrop("trace", "0123456789ABCDEFGHIJ", office=office)).status == 1


async def test_a_setting_that_does_not_hold_is_one_sentence() -> None:
    ran = await fairdrop("audit", "drop", FAIRDROP_FRONT_PORT="door")
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("fairdrop: FAIRDROP_FRONT_PORT: ")
