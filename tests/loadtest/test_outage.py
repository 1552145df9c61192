"""The outage campaign, short: suppliers hang, flap, lie and fail in the middle of a sale, on whole servers."""

from __future__ import annotations

import pytest

from loadtest.outage import Campaign, Joins, Report, Struck, note, parse, run, table
from loadtest.run import CannotStart


@pytest.mark.serial
@pytest.mark.slow
async def test_a_suppliers_bad_minute_is_not_the_sales() -> None:
    """Times are judged loosely: this machine may be busy, and a join that met a supplier would wait 3 s for it. The
    campaign holds p99 to 20 %, fail-over to 1 s."""
    options = parse(
        ["--faults", "hang", "lost", "all", "texts", "--fault-s", "8", "--calm-s", "4", "--joins-per-s", "40",
         "--orders-per-s", "6", "--p99-times", "3", "--p99-plus-ms", "2000", "--failover-max-s", "15"]
    )  # fmt: skip
    try:
        report = await run(options)
    except CannotStart as error:
        pytest.fail(str(error))
    assert report.kept, table(report)
    by_fault = {struck.fault: struck for struck in report.faults}
    assert by_fault["hang"].trips and by_fault["lost"].trips, "nothing was tried"
    assert by_fault["texts"].failover_s, "no text was sent another way"
    assert report.numbers["texts"]["sandbox-sms-2 sent"] > 0
    assert all(struck.orders for struck in report.faults), table(report)


def test_a_trip_that_is_told_twice_a_few_ms_apart_is_one() -> None:
    seen: dict[int, str] = {}
    note(seen, [(5_000, "closed"), (9_000, "half_open")])
    note(seen, [(5_001, "closed"), (8_999, "half_open"), (13_000, "half_open")])
    assert sorted(seen) == [5_000, 9_000, 13_000]


def judged(struck: Struck, **changed: int) -> Report:
    books = {
        "orders": 10, "paid": 10, "ended_unpaid": 0, "paid_minor": 100, "kept_twice": 0, "captured_twice": 0,
        "captured_minor": 100, "refunded_minor": 0,
    } | changed  # fmt: skip
    stage = Campaign.__new__(Campaign)
    stage.options, stage.faults = parse([]), [struck]
    return stage.judge(True, books, [{"ok": True, "checks": []}])


FINE = Struck(
    "error",
    Joins(100, 0, 1.0, 10.0),
    Joins(100, 0, 1.0, 12.0),
    Joins(100, 0, 1.0, 9.0),
    failover_s=[0.4],
    well_after_s=3.0,
)


def test_the_verdict_sees_each_broken_promise() -> None:
    assert judged(FINE).kept

    def broken(struck: Struck, **changed: int) -> list[str]:
        return [name for name, ok in judged(struck, **changed).promises.items() if not ok]

    def but(**changed: object) -> Struck:
        return Struck(**{**FINE.__dict__, **changed})  # type: ignore[arg-type]

    assert broken(but(during=Joins(100, 0, 1.0, 14.1))) == ["joins_as_fast"]
    assert broken(but(after=Joins(100, 1, 1.0, 9.0))) == ["no_join_failed"]
    assert broken(but(failover_s=[0.2, 1.1])) == ["other_supplier_in_time"]
    assert broken(but(well_after_s=None)) == ["well_again_by_itself"]
    assert broken(FINE, paid=9, ended_unpaid=1) == ["no_order_lost"]
    assert broken(FINE, captured_minor=110) == ["nobody_charged_twice"]
    assert broken(FINE, kept_twice=1) == ["nobody_charged_twice"]
    assert broken(FINE, captured_minor=110, refunded_minor=10) == []
