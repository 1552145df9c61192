"""How a text is packed: GSM 03.38 where it can be, else UCS-2; segments as networks count them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import texts
from app.texts import Size, size_of


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ("", Size("GSM-7", 0, 1)),
        ("a" * 160, Size("GSM-7", 160, 1)),
        ("a" * 161, Size("GSM-7", 161, 2)),
        ("a" * 306, Size("GSM-7", 306, 2)),
        ("a" * 307, Size("GSM-7", 307, 3)),
        ("€" * 80, Size("GSM-7", 160, 1)),
        ("a" * 152 + "€" + "a" * 153, Size("GSM-7", 307, 3)),  # the euro is not torn apart
        ("付" * 70, Size("UCS-2", 70, 1)),
        ("付" * 71, Size("UCS-2", 71, 2)),
        ("付" * 135, Size("UCS-2", 135, 3)),
        ("😀" * 35, Size("UCS-2", 70, 1)),
        ("a×", Size("UCS-2", 2, 1)),
    ],
)
def test_a_text_has_the_size_that_networks_bill(body: str, size: Size) -> None:
    assert size_of(body) == size


@given(st.text(max_size=400))
def test_more_text_never_takes_fewer_segments(body: str) -> None:
    assert size_of(body).segments <= size_of(body + "付").segments


def test_every_kind_speaks_every_language_with_known_values_only() -> None:
    row = {
        "sale_title": "{s}", "item_title": "i" * 50, "units": 1, "amount_minor": 1, "currency": "CNY",
        "pay_within_s": 60, "order_no": "N",
    }  # fmt: skip
    assert tuple(texts.values(row)) == texts.VALUES
    for name, kind in texts.KINDS.items():
        assert set(kind.texts) == set(texts.LANGUAGES) and kind.true_in and not kind.one_time, name
        for language in texts.LANGUAGES:
            assert texts.render(name, language, row)


def test_a_ticket_shows_the_text_that_goes_with_its_state() -> None:
    said = {"reserved": "a", "expired": "b"}
    assert texts.still_true(said, "expired") == "b"
    assert texts.still_true(said, "paid") is None
