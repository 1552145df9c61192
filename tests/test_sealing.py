"""Contacts are sealed: for one sale and buyer, with keys that can rotate."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import CannotStart
from app.sealing import CannotOpen, contact_aad, key_id_of, seal, sealing_key, sealing_keys, unseal

OLD, NEW = sealing_key(b"o" * 32), sealing_key(b"n" * 32)
AAD = contact_aad("x", b"ann")


@given(st.binary(max_size=500))
def test_what_is_sealed_opens_again_and_never_looks_the_same(plaintext: bytes) -> None:
    sealed = seal([OLD], plaintext, AAD)
    assert unseal([OLD], sealed, AAD) == plaintext
    assert sealed != seal([OLD], plaintext, AAD)
    assert sealed[:1] == b"1"
    assert key_id_of(sealed) == OLD.id
    assert len(sealed) == 1 + 4 + 12 + len(plaintext) + 16


def test_any_flipped_bit_is_refused() -> None:
    sealed = seal([OLD], b'{"phone":"+4912345"}', AAD)
    for at in range(len(sealed)):
        for bit in range(8):
            bent = bytearray(sealed)
            bent[at] ^= 1 << bit
            with pytest.raises(CannotOpen):
                unseal([OLD, NEW], bytes(bent), AAD)


def test_it_opens_for_no_other_sale_or_buyer() -> None:
    sealed = seal([OLD], b"secret", AAD)
    for aad in (contact_aad("y", b"ann"), contact_aad("x", b"bob"), b""):
        with pytest.raises(CannotOpen):
            unseal([OLD], sealed, aad)
    assert contact_aad("x", "ann") == AAD


def test_the_first_key_seals_and_all_open() -> None:
    sealed = seal([OLD], b"secret", AAD)
    assert unseal([NEW, OLD], sealed, AAD) == b"secret"
    assert key_id_of(seal([NEW, OLD], b"secret", AAD)) == NEW.id
    with pytest.raises(CannotOpen, match=OLD.id.hex()):
        unseal([NEW], sealed, AAD)


@pytest.mark.parametrize("sealed", [b"", b"1", b"1" + bytes(16), b"2" + bytes(60)])
def test_what_is_not_a_sealed_contact_is_refused(sealed: bytes) -> None:
    with pytest.raises(CannotOpen):
        unseal([OLD], sealed, AAD)


def test_keys_are_read_as_hex_and_base64() -> None:
    raw = bytes(range(32))
    texts = [raw.hex(), base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode().rstrip("=")]
    assert [key.key for key in sealing_keys(" , ".join(texts))] == [raw] * 3


@pytest.mark.parametrize(
    "text", ["short", "zz" * 32, "ab" * 31, base64.b64encode(bytes(31)).decode(), "!" * 43]
)
def test_a_bad_key_is_named_and_never_shown(text: str) -> None:
    with pytest.raises(CannotStart) as refused:
        sealing_keys("ab" * 32 + "," + text)
    assert "key 2" in str(refused.value)
    assert text not in str(refused.value)
