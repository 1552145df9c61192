"""Contacts (phone, language) are sealed from the first byte stored: AES-256-GCM, bound to sale and buyer. So are who
pays (an id at the channel) and from where, and the secrets of webhooks, bound to their endpoint.

Form: b"1", key id (4 bytes), nonce (12), ciphertext and tag. The first key seals, all open; the key id is the beginning
of the key's SHA-256, so a store can be told which key it still needs before one is retired.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import CannotStart, FairdropError

FORMAT = b"1"
KEY_BYTES = 32
KEY_ID_BYTES = 4
NONCE_BYTES = 12  # random; 2^32 contacts a key stay far from a repeat
INDEX_BYTES = 16  # of a phone number's index: no two of any shop's buyers meet
_HEAD = len(FORMAT) + KEY_ID_BYTES + NONCE_BYTES


class CannotOpen(FairdropError):
    """Sealed with a key we do not have, for somebody else, or changed. Nothing of it may be used."""


class SealingKey(NamedTuple):
    id: bytes
    key: bytes


def sealing_keys(text: str) -> list[SealingKey]:
    """FAIRDROP_PII_KEYS: comma-separated 32-byte keys in hex or base64; the first seals. CannotStart if one is not."""
    keys = []
    for number, part in enumerate((part.strip() for part in text.split(",") if part.strip()), 1):
        try:
            if len(part) == 2 * KEY_BYTES:
                key = bytes.fromhex(part)
            else:
                key = base64.b64decode(
                    part.replace("-", "+").replace("_", "/") + "=" * (-len(part) % 4), validate=True
                )
        except (ValueError, binascii.Error):
            key = b""
        if len(key) != KEY_BYTES:
            raise CannotStart(f"FAIRDROP_PII_KEYS: key {number} is not 32 bytes in base64 or hex")
        keys.append(sealing_key(key))
    return keys


def sealing_key(key: bytes) -> SealingKey:
    return SealingKey(hashlib.sha256(b"fairdrop key id\0" + key).digest()[:KEY_ID_BYTES], key)


def contact_aad(sale: str, buyer_id: bytes | str) -> bytes:
    """What a contact is bound to: it opens for no other sale or buyer."""
    return sale.encode() + b"\0" + (buyer_id if isinstance(buyer_id, bytes) else buyer_id.encode())


def address_aad(sale: str, buyer_id: bytes | str) -> bytes:
    """What a payer's network address is bound to."""
    return b"address\0" + contact_aad(sale, buyer_id)


def payer_aad(sale: str, buyer_id: bytes | str) -> bytes:
    """What the payer's id at a channel is bound to."""
    return b"payer\0" + contact_aad(sale, buyer_id)


def webhook_aad(endpoint_id: str) -> bytes:
    """What an endpoint's sealed secret is bound to."""
    return f"webhook\0{endpoint_id}".encode()


def answer_aad(actor: str, name: str | None) -> bytes:
    """What the secrets in an answer are bound to that is kept for its Idempotency-Key."""
    return f"idempotency\0{actor}\0{name}".encode()


def phone_index(key: SealingKey, sale: str, phone: str) -> bytes:
    """A number's blind index: finds the orders of a known number in one sale, and tells nothing without the key.

    The key is derived, so that an index is never computed with what seals; bound to the sale, so that two sales'
    tables cannot be joined by it.
    """
    derived = hmac.digest(key.key, b"fairdrop phone index 1", hashlib.sha256)
    return hmac.digest(derived, f"{sale}\0{phone}".encode(), hashlib.sha256)[:INDEX_BYTES]


def number_index(key: SealingKey, phone: str) -> bytes:
    """The same without a sale: what texts to one number are counted by. It is kept in Redis for a day at most."""
    derived = hmac.digest(key.key, b"fairdrop number index 1", hashlib.sha256)
    return hmac.digest(derived, phone.encode(), hashlib.sha256)[:INDEX_BYTES]


def seal(keys: Sequence[SealingKey], plaintext: bytes, aad: bytes) -> bytes:
    """Encrypt with the first key. The same plaintext never gives the same bytes twice."""
    first = keys[0]
    nonce = os.urandom(NONCE_BYTES)
    return FORMAT + first.id + nonce + AESGCM(first.key).encrypt(nonce, plaintext, FORMAT + first.id + aad)


def unseal(keys: Sequence[SealingKey], sealed: bytes, aad: bytes) -> bytes:
    """The plaintext. CannotOpen: log it and go on without a contact; never guess."""
    if len(sealed) <= _HEAD or sealed[:1] != FORMAT:
        raise CannotOpen("not a sealed contact of format 1")
    key_id, nonce = sealed[1 : 1 + KEY_ID_BYTES], sealed[1 + KEY_ID_BYTES : _HEAD]
    for key in keys:
        if key.id == key_id:
            try:
                return AESGCM(key.key).decrypt(nonce, sealed[_HEAD:], FORMAT + key_id + aad)
            except InvalidTag:
                continue
    raise CannotOpen(f"no key opens it (key id {key_id.hex()})")


def key_id_of(sealed: bytes) -> bytes:
    """Which key sealed it."""
    return sealed[1 : 1 + KEY_ID_BYTES]
