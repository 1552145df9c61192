"""The sale document: times, YAML, copies and what is locked, without a store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import Refusal
from app.sale.document import (
    EARLIEST,
    LATEST,
    House,
    SaleIn,
    SalePatch,
    Terms,
    amend,
    format_time,
    keep_freeze,
    locked,
    read_time,
    read_yaml,
    settle,
    to_ms,
)

YAML = """
id: phone-2026
title: no
time_zone: Asia/Shanghai
line_opens_at: 2026-11-11 19:50
opens_at: 2026-11-11T20:00:00
closes_at: 2026-11-11T22:00:00+09:00
rate_per_s: 12.5
items:
  - {sku: PH-128, title: "Phone, 128 GB", price_minor: 59900, currency: EUR, units: 500}
"""


def sale(**changed: Any) -> Terms:
    return settle(SaleIn.model_validate({**read_yaml(YAML), **changed}))


def errors_of(**changed: Any) -> list[tuple[str, str]]:
    with pytest.raises(Refusal) as refused:
        sale(**changed)
    return [(one["path"], one["code"]) for one in refused.value.errors]


def test_yaml_says_what_it_says() -> None:
    terms = sale()
    assert terms.title == "no"
    assert terms.opens_at == datetime(2026, 11, 11, 12, 0, tzinfo=UTC)
    assert terms.closes_at == datetime(2026, 11, 11, 13, 0, tzinfo=UTC)
    assert (terms.rate_per_s, terms.draw_freeze_s, terms.standby, terms.channels) == (
        12.5,
        10,
        True,
        ("sandbox",),
    )


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", "just text", "", "a: &x [1]\nb: *x", "id: a\nid: b", "? [1]\n: 2", "a: !!python/object:os.system x",
        "a: [", "\t", "a: b: c", "1: 2", "{" * 3000, "x: '" + "y" * 20_000 + "'",
    ],
)  # fmt: skip
def test_yaml_that_is_no_document_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "zone", "expected"),
    [
        ("2026-11-11T20:00:00Z", None, "2026-11-11T20:00:00.000Z"),
        ("2026-11-11t20:00:00.123456789z", None, "2026-11-11T20:00:00.123Z"),
        ("2026-11-11T20:00:00+08:00", "Europe/Berlin", "2026-11-11T12:00:00.000Z"),
        ("2026-11-11 20:00", "Asia/Shanghai", "2026-11-11T12:00:00.000Z"),
        ("2026-03-29T02:30:00", "Europe/Berlin", "time_skipped"),
        ("2026-10-25T02:30:00", "Europe/Berlin", "time_ambiguous"),
        ("2026-10-25T02:30:00+01:00", "Europe/Berlin", "2026-10-25T01:30:00.000Z"),
        ("2026-11-11T20:00:00", None, "time_without_zone"),
        ("2026-11-11", "UTC", "not_a_time"),
        ("2026-13-11T20:00:00Z", None, "not_a_time"),
        ("2026-11-11T24:00:00Z", None, "not_a_time"),
        ("2026-11-11T23:59:60Z", None, "not_a_time"),
        ("2026-11-11T20:00:00+25:00", None, "not_a_time"),
        ("0001-01-01T00:00:00+14:00", None, "not_a_time"),
        ("1999-01-01T00:00:00Z", None, "out_of_range"),
        ("２０２６-11-11T20:00:00Z", None, "not_a_time"),
    ],
)
def test_a_time_is_one_moment_or_refused(text: str, zone: str | None, expected: str) -> None:
    found = read_time(text, zone)
    assert (found if isinstance(found, str) else format_time(found)) == expected


@given(st.text(max_size=40), st.sampled_from([None, "UTC", "Asia/Shanghai", "America/New_York"]))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_the_reading_of_times(text: str, zone: str | None) -> None:
    found = read_time(text, zone)
    assert isinstance(found, str | datetime)


@given(st.datetimes(EARLIEST.replace(tzinfo=None), LATEST.replace(tzinfo=None) - timedelta(days=1)))
@settings(max_examples=100, deadline=None)
def test_what_is_shown_is_read_as_the_same_moment(naive: datetime) -> None:
    moment = naive.replace(tzinfo=UTC, microsecond=naive.microsecond // 1000 * 1000)
    shown = format_time(moment)
    assert shown is not None and read_time(shown, None) == moment
    assert to_ms(moment) == round(moment.timestamp() * 1000)


def test_each_thing_that_is_wrong_is_named() -> None:
    assert errors_of(opens_at="2026-11-11T23:00:00") == [("closes_at", "not_after_opening")]
    assert errors_of(line_opens_at="2026-11-11T20:01:00") == [("opens_at", "before_line_opens")]
    assert errors_of(closes_at="2026-12-25T20:01:00") == [("closes_at", "runs_too_long")]
    item = {"sku": "A", "title": "x", "price_minor": 1, "currency": "EUR", "units": 1}
    assert errors_of(items=[item, item]) == [("items.1.sku", "not_unique")]
    assert errors_of(items=[{**item, "currency": "XYZ"}]) == [("items.0.currency", "unknown_currency")]
    assert errors_of(title=None, time_zone="X/Y", limit_per_buyer=2, standby=True) == [
        ("time_zone", "unknown_time_zone"), ("title", "missing"), ("standby", "standby_needs_limit_1"),
    ]  # fmt: skip
    assert errors_of(time_zone=None)[:2] == [
        ("line_opens_at", "time_without_zone"),
        ("opens_at", "time_without_zone"),
    ]


@pytest.mark.parametrize("url", ["https://a.example/x?y=1", "http://localhost:3000/", "http://127.0.0.1/x"])
def test_return_urls_are_web_addresses(url: str) -> None:
    assert sale(return_urls=[url]).return_urls == (url,)


@pytest.mark.parametrize(
    "url",
    ["http://a.example/", "ftp://a.example/", "https://u@a.example/", "https://a.example/#x", "https:///x",
     "//a.example/", "https://a.example:99999/", "https://[::1/", "https://ä.example/"],
)  # fmt: skip
def test_other_return_urls_are_refused(url: str) -> None:
    assert errors_of(return_urls=[url]) == [("return_urls.0", "not_an_address")]


def test_short_payment_times_are_for_development() -> None:
    given_in = SaleIn.model_validate({**read_yaml(YAML), "pay_within_s": 5})
    assert settle(given_in, house=House(development=True)).pay_within_s == 5
    with pytest.raises(Refusal):
        settle(given_in)


def test_a_copy_takes_everything_but_the_times() -> None:
    base = sale(rate_per_s=3, limit_per_buyer=4, standby=False, draw_freeze_s=300)
    copy = SaleIn.model_validate(
        {"id": "encore", "copy_of": "phone-2026", "line_opens_at": "2026-12-01T10:00:00Z",
         "opens_at": "2026-12-01T10:01:00Z", "closes_at": "2026-12-01T11:00:00Z"}
    )  # fmt: skip
    made = settle(copy, base)
    assert (made.rate_per_s, made.limit_per_buyer, made.items, made.title) == (3, 4, base.items, base.title)
    assert made.draw_freeze_s == 60, "the freeze of the original would lie before the line opens"


def test_a_patch_keeps_what_it_does_not_name() -> None:
    terms = sale(rate_per_s=3)
    assert amend(SalePatch.model_validate({"title": "Other"}), terms) == replace(terms, title="Other")
    with pytest.raises(ValidationError):
        SalePatch.model_validate({"id": "other"})


def test_a_freeze_that_has_happened_stays_when_the_opening_moves() -> None:
    terms = sale(draw_freeze_s=30)
    later = replace(terms, opens_at=terms.opens_at + timedelta(seconds=100.5))
    assert keep_freeze(terms, later, terms.freeze_at - timedelta(seconds=1)) == later
    kept = keep_freeze(terms, later, terms.freeze_at + timedelta(seconds=1))
    assert timedelta(0) <= terms.freeze_at - kept.freeze_at < timedelta(seconds=1)


def test_nothing_of_a_draft_is_locked_and_everything_of_a_closed_sale_is() -> None:
    terms = sale()
    other = replace(terms, title="x", limit_per_buyer=3, standby=False, beacon="word")
    assert locked(terms, other, "draft", terms.closes_at) == []
    assert {one["path"] for one in locked(terms, other, "open", terms.line_opens_at)} == {
        "limit_per_buyer",
        "beacon",
    }
    assert {one["code"] for one in locked(terms, other, "settled", terms.line_opens_at)} == {"sale_closed"}
