"""Minor units to a supplier's decimal text and back, exactly: digits are moved, nothing is divided or rounded.

The exponents are ISO 4217's (list one, "minor unit"); a currency that is not named here has two digits.
"""

from __future__ import annotations

import re

_EXPONENTS = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
_EXPONENT_OF = {currency: digits for digits, names in _EXPONENTS.items() for currency in names.split()}
# A plain number as suppliers write it: ASCII digits, no sign, no exponent, no spaces, no thousands separators.
_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,14})(?:\.([0-9]{1,8}))?", re.ASCII)


def exponent(currency: str) -> int:
    """How many digits a currency's minor unit has."""
    return _EXPONENT_OF.get(currency, 2)


def decimal_of(amount_minor: int, currency: str) -> str:
    """8888, CNY → "88.88"; 500, JPY → "500". amount_minor: not negative."""
    if amount_minor < 0:
        raise ValueError("an amount is not negative")
    digits = exponent(currency)
    if not digits:
        return str(amount_minor)
    text = str(amount_minor).rjust(digits + 1, "0")
    return f"{text[:-digits]}.{text[-digits:]}"


def minor_of(text: str, currency: str) -> int | None:
    """ "88.88", CNY → 8888. None: not a plain number, or finer than the currency's minor unit."""
    found = _DECIMAL.fullmatch(text)
    if found is None:
        return None
    digits = exponent(currency)
    fraction = found[2] or ""
    if fraction[digits:].strip("0"):
        return None
    return int(found[1] + fraction[:digits].ljust(digits, "0"))
