"""Amounts cross to suppliers exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.providers.money import decimal_of, exponent, minor_of
from app.providers.stripe import minor_amount, stripe_amount
from app.sale.document import CURRENCIES

AMOUNTS = st.integers(min_value=0, max_value=10**14)
CURRENCY = st.sampled_from(sorted(CURRENCIES))


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (8888, "CNY", "88.88"),
        (1, "CNY", "0.01"),
        (10, "CNY", "0.10"),
        (100, "CNY", "1.00"),
        (0, "CNY", "0.00"),
        (500, "JPY", "500"),
        (1234, "KWD", "1.234"),
        (5, "KWD", "0.005"),
        (12345, "CLF", "1.2345"),
    ],
)
def test_minor_units_are_written_with_the_currencys_own_digits(minor: int, currency: str, text: str) -> None:
    assert decimal_of(minor, currency) == text
    assert minor_of(text, currency) == minor


@given(AMOUNTS, CURRENCY)
def test_an_amount_comes_back_as_it_went(minor: int, currency: str) -> None:
    assert minor_of(decimal_of(minor, currency), currency) == minor


@pytest.mark.parametrize(
    "text", ["", ".5", "1.", "01.00", "-1.00", "+1", "1e2", "1,00", " 1", "1 ", "1.001", "٣", "1_0", "nan"]
)
def test_what_is_not_a_plain_amount_is_no_amount(text: str) -> None:
    assert minor_of(text, "CNY") is None


def test_fewer_and_more_digits_than_the_currency_has_are_read_if_they_are_exact() -> None:
    assert minor_of("20", "CNY") == 2000
    assert minor_of("20.5", "CNY") == 2050
    assert minor_of("20.500", "CNY") == 2050
    assert minor_of("20.50", "JPY") is None


@given(AMOUNTS, CURRENCY)
def test_what_stripe_is_told_is_worth_the_same_or_it_is_not_told(minor: int, currency: str) -> None:
    amount = stripe_amount(minor, currency)
    if amount is not None:
        assert minor_amount(amount, currency) == minor
    else:
        assert currency in ("MGA", "BHD", "JOD", "KWD", "OMR", "TND")


@pytest.mark.parametrize(
    ("minor", "currency", "amount"),
    [
        (1000, "USD", 1000),
        (500, "JPY", 500),
        (5, "ISK", 500),  # two digits at Stripe, none in ISO 4217
        (5, "UGX", 500),
        (500, "MGA", 5),  # none at Stripe, two in ISO 4217
        (501, "MGA", None),
        (5120, "KWD", 5120),
        (5124, "KWD", None),  # the last digit must be 0
    ],
)
def test_stripes_special_currencies(minor: int, currency: str, amount: int | None) -> None:
    assert stripe_amount(minor, currency) == amount


def test_only_three_kinds_of_currencies_differ_from_two_digits() -> None:
    assert {exponent(currency) for currency in CURRENCIES} <= {0, 2, 3, 4}
