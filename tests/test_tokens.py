"""Tokens: deterministic, canonical, and nothing but what we signed is read."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.tokens import Keyring, Pass, Ticket, ticket_id

KEY, NEW_KEY, FOREIGN = b"k" * 32, b"n" * 40, b"f" * 32
RING = Keyring([KEY])
URL_SAFE = string.ascii_letters + string.digits + "-_"

SALES = st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,47}\Z")
BUYERS = st.binary(min_size=1, max_size=128)
TICKETS = st.builds(
    Ticket,
    sale=SALES,
    epoch=st.integers(1, 2**32 - 1),
    item=st.integers(0, 2**16 - 1),
    seq=st.integers(1, 2**53),
    units=st.integers(1, 2**16 - 1),
    ticket_hash=st.binary(min_size=10, max_size=10),
)
TICKET = Ticket("phone-2026", 1, 0, 48_213, 1, RING.ticket_hash("phone-2026", "PH-128", b"ann"))
PASS = Pass("phone-2026", b"ann", 2_000, 3)
PAYLOAD = ["2026", 17, None]


@given(TICKETS)
def test_a_ticket_is_read_as_it_was_signed(ticket: Ticket) -> None:
    text = RING.ticket_sign(ticket)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text)
    assert RING.ticket_sign(ticket) == text
    assert RING.ticket_read(text) == ticket
    assert Keyring([FOREIGN]).ticket_read(text) is None
    assert Keyring([NEW_KEY, KEY]).ticket_read(text) == ticket


@given(sale=SALES, buyer_id=BUYERS, expires_ms=st.integers(1, 2**53), flags=st.integers(0, 255))
def test_a_pass_is_read_for_its_sale_until_it_ends(
    sale: str, buyer_id: bytes, expires_ms: int, flags: int
) -> None:
    text = RING.pass_sign(Pass(sale, buyer_id, expires_ms, flags))
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,204}", text)
    assert RING.pass_read(text, sale, expires_ms - 1) == buyer_id
    assert RING.pass_read(text, sale, expires_ms) is None
    assert RING.pass_read(text, sale + "x", 0) is None
    assert Keyring([FOREIGN]).pass_read(text, sale, 0) is None
    assert Keyring([NEW_KEY, KEY]).pass_read(text, sale, 0) == buyer_id


def test_sale_and_buyer_cannot_be_cut_differently() -> None:
    text = RING.pass_sign(Pass("ab", b"c", 2_000))
    assert RING.pass_read(text, "a", 0) is None


@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.text(max_size=40), st.integers(-(2**63), 2**63 - 1)),
        max_size=5,
    )
)
def test_a_cursor_works_for_its_list_only(payload: list[object]) -> None:
    text = RING.cursor_sign("orders", payload)
    assert set(text) <= set(URL_SAFE)
    assert RING.cursor_read("orders", text) == payload
    assert RING.cursor_read("order", text) is None
    assert Keyring([FOREIGN]).cursor_read("orders", text) is None


def read_anything(text: str) -> list[object]:
    return [
        found
        for found in (
            RING.ticket_read(text),
            RING.pass_read(text, "phone-2026", 0),
            RING.cursor_read("orders", text),
        )
        if found is not None
    ]


TOKENS = {
    "ticket": RING.ticket_sign(TICKET),
    "pass": RING.pass_sign(PASS),
    "cursor": RING.cursor_sign("orders", PAYLOAD),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_is_of_one_kind(kind: str) -> None:
    assert len(read_anything(TOKENS[kind])) == 1


@pytest.mark.parametrize("kind", TOKENS)
def test_with_any_bit_flipped_it_is_refused(kind: str) -> None:
    text = TOKENS[kind].encode()
    for at in range(len(text)):
        for bit in range(8):
            bent = bytearray(text)
            bent[at] ^= 1 << bit
            assert read_anything(bent.decode("latin-1")) == []


@pytest.mark.parametrize("kind", TOKENS)
def test_with_any_character_changed_dropped_or_added_it_is_refused(kind: str) -> None:
    text = TOKENS[kind]
    for at in range(len(text)):
        for other in URL_SAFE + "=+/ \n\u0441":
            if other != text[at]:
                assert read_anything(text[:at] + other + text[at + 1 :]) == []
        assert read_anything(text[:at] + text[at + 1 :]) == []
    for other in URL_SAFE + "= \n":
        assert read_anything(text + other) == []
        assert read_anything(other + text) == []


@given(st.text(max_size=300))
@settings(max_examples=300)
def test_no_text_of_somebody_else_is_read(text: str) -> None:
    assert read_anything(text) == []


@pytest.mark.parametrize(
    "text", ["", "A", "AAAA", "A" * 128, "A" * 129, "_" * 90, "A" * 100_000, "=" * 8, "\0" * 8]
)
def test_nonsense_is_refused(text: str) -> None:
    assert read_anything(text) == []


def test_a_ticket_hash_is_of_one_buyer_sale_and_item() -> None:
    assert RING.ticket_hash("x", "A", "ann") == RING.ticket_hash("x", "A", b"ann")
    hashes = {
        RING.ticket_hash(*which)
        for which in [
            ("x", "A", b"ann"),
            ("y", "A", b"ann"),
            ("x", "B", b"ann"),
            ("x", "A", b"bob"),
            ("x", "", b"A\0ann"),
        ]
    }
    assert len(hashes) == 5
    assert {len(found) for found in hashes} == {10}


def test_after_a_rotation_a_ticket_still_belongs_to_its_buyer() -> None:
    rotated = Keyring([NEW_KEY, KEY])
    old = RING.ticket_hash("x", "A", b"ann")
    assert rotated.ticket_hash("x", "A", b"ann") != old
    assert rotated.ticket_hash_is(old, "x", "A", b"ann")
    assert not rotated.ticket_hash_is(old, "x", "A", b"bob")
    assert not Keyring([NEW_KEY]).ticket_hash_is(old, "x", "A", b"ann")


def test_the_public_id_tells_nothing_of_the_buyer() -> None:
    assert ticket_id(TICKET) == b"48213-%b" % TICKET.ticket_hash.hex().encode()


@pytest.mark.parametrize("buyer_id", [b"", b"x" * 129])
def test_a_buyer_id_has_its_limits(buyer_id: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 128"):
        RING.pass_sign(Pass("x", buyer_id, 1))


def test_a_keyring_needs_a_key() -> None:
    with pytest.raises(ValueError, match="signing key"):
        Keyring([])
