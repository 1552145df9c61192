"""Passes, tickets and cursors: short signed texts that a front door can trust without asking Redis.

All have one form: base64url without padding of `format byte, key id, body, MAC`, the MAC a keyed BLAKE2b with a
key of its own for each purpose. Only the canonical spelling is accepted, so any changed character or bit is
refused. The first signing key signs, all verify: keys rotate by putting a new one in front. Tokens are for the eyes
of their holder: redact them in logs.
"""

from __future__ import annotations

import struct
from binascii import a2b_base64, b2a_base64, hexlify
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, NamedTuple

import msgspec

from app.errors import CannotStart

FORMAT = 1  # first byte of every token
SIGNING_KEY_MIN = 32  # characters of a signing key
MAC_BYTES = 16  # 2^128 guesses; a ticket stays within 128 characters
TICKET_HASH_BYTES = 10  # as in app.draw
TEXT_MAX = 256  # characters; the longest pass has 204
CURSOR_MAX = 1_024  # characters


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """A place in a sale. item: position of the sku in the sale's `items`. The same ticket gives the same text."""

    sale: str
    epoch: int
    item: int
    seq: int
    units: int
    ticket_hash: bytes


class Pass(NamedTuple):
    """Permission to join one sale until expires_ms. flags: 0..255, free for the front door."""

    sale: str
    buyer_id: bytes
    expires_ms: int
    flags: int = 0


def ticket_id(ticket: Ticket) -> bytes:
    """The public name of a ticket: found again in /draw/entries, tells nothing about the buyer."""
    return b"%d-%b" % (ticket.seq, hexlify(ticket.ticket_hash))


_TICKET = struct.Struct(">BBIHQH10s")  # format, key id, epoch, item, seq, units, ticket hash; then the sale
_ITEM, _PLACE = (
    struct.Struct(">BBIH"),
    struct.Struct(">QH10s"),
)  # _TICKET, cut where tickets of an item differ
_PASS = struct.Struct(">BBBQ")  # format, key id, flags, expires_ms; then the MAC and the buyer id
_PASS_HEAD = _PASS.size
_PASS_CUT = _PASS_HEAD + MAC_BYTES


_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(
    b"-_+/=", b"+/!!!"
)  # what the plain alphabet has besides is not ours; `!` is in none
_PADDING = (b"", b"!", b"==", b"=")  # by length mod 4; a remainder of 1 is no base64


def _encode(raw: bytes) -> bytes:
    return b2a_base64(raw, newline=False).translate(_TO_URL).rstrip(b"=")


def _decode(text: str | bytes, longest: int) -> bytes | None:
    """The bytes, or None unless `text` is the one spelling that `_encode` gives them."""
    if not 4 <= len(text) <= longest:
        return None
    try:
        given = text.encode("ascii") if isinstance(text, str) else text
        spelled = given.translate(_FROM_URL) + _PADDING[len(given) & 3]
        raw = a2b_base64(spelled, strict_mode=True)
    except ValueError:
        return None
    return raw if b2a_base64(raw, newline=False) == spelled else None


class _Key:
    """One signing key: a sub-key for each purpose, as a keyed hash that is copied for every use."""

    def __init__(self, signing_key: bytes) -> None:
        master = blake2b(signing_key, digest_size=32, person=b"fairdrop-master").digest()
        self.id = blake2b(master, digest_size=1, person=b"fairdrop-key-id").digest()[0]

        def keyed(purpose: bytes, size: int) -> blake2b:
            sub_key = blake2b(purpose, key=master, digest_size=32, person=b"fairdrop-sub").digest()
            return blake2b(key=sub_key, digest_size=size)

        self.of_ticket = keyed(b"ticket", MAC_BYTES)
        self.of_pass = keyed(b"pass", MAC_BYTES)
        self.of_cursor = keyed(b"cursor", MAC_BYTES)
        self.of_hash = keyed(b"ticket hash", TICKET_HASH_BYTES)


def _mac(keyed: blake2b, data: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(data)
    return mac.digest()


def signing_keys(text: str) -> list[bytes]:
    """FAIRDROP_SIGNING_KEYS: comma-separated; the first signs, all verify. CannotStart: none, or a short one."""
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise CannotStart("FAIRDROP_SIGNING_KEYS is missing: passes, tickets and cursors could not be signed")
    if any(len(key) < SIGNING_KEY_MIN for key in keys):
        raise CannotStart(f"FAIRDROP_SIGNING_KEYS: each key needs at least {SIGNING_KEY_MIN} characters")
    return [key.encode() for key in keys]


class Keyring:
    """Signs with the first key, verifies with all. Every read gives None for anything that is not exactly ours."""

    def __init__(self, signing_keys: Sequence[bytes]) -> None:
        if not signing_keys:
            raise ValueError("a keyring needs a signing key")
        self._keys = [_Key(key) for key in signing_keys]
        self._first = self._keys[0]
        self._by_id: dict[int, list[_Key]] = {}
        for key in self._keys:
            self._by_id.setdefault(key.id, []).append(key)

    # tickets
    def ticket_hash(self, sale: str, sku: str, buyer_id: bytes | str) -> bytes:
        """What stands for the buyer in the draw and in the token; nobody without the key can tell whose it is."""
        return _mac(self._first.of_hash, _whose(sale, sku, buyer_id))

    def ticket_hashes(self, sale: str, sku: str, buyer_ids: Iterable[bytes]) -> list[bytes]:
        """`ticket_hash` of many buyers of one item."""
        begun = self._first.of_hash.copy()
        begun.update(_whose(sale, sku, b""))
        return [_mac(begun, buyer_id) for buyer_id in buyer_ids]

    def ticket_hash_is(self, ticket_hash: bytes, sale: str, sku: str, buyer_id: bytes | str) -> bool:
        """Whether this hash is this buyer's, under any of the keys: the token belongs to whoever asks."""
        whose = _whose(sale, sku, buyer_id)
        return any(compare_digest(_mac(key.of_hash, whose), ticket_hash) for key in self._keys)

    def ticket_sign(self, ticket: Ticket) -> str:
        """At most 128 URL-safe characters. Sale at most 48 characters (ASCII)."""
        sign = self.ticket_signer(ticket.sale, ticket.epoch, ticket.item)
        return sign(ticket.seq, ticket.units, ticket.ticket_hash).decode("ascii")

    def ticket_signer(self, sale: str, epoch: int, item: int) -> Callable[[int, int, bytes], bytes]:
        """`ticket_sign` for many tickets of one item: sign(seq, units, ticket_hash) gives the text as bytes."""
        key = self._first
        keyed, pack = key.of_ticket, _PLACE.pack
        before, after = _ITEM.pack(FORMAT, key.id, epoch, item), sale.encode("ascii")

        def sign(seq: int, units: int, ticket_hash: bytes) -> bytes:
            body = before + pack(seq, units, ticket_hash) + after
            mac = keyed.copy()
            mac.update(body)
            return _encode(body + mac.digest())

        return sign

    def ticket_read(self, text: str) -> Ticket | None:
        raw = _decode(text, 128)
        if raw is None or len(raw) <= _TICKET.size + MAC_BYTES or raw[0] != FORMAT:
            return None
        body, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        for key in self._by_id.get(raw[1], ()):
            if compare_digest(_mac(key.of_ticket, body), mac):
                _, _, epoch, item, seq, units, ticket_hash = _TICKET.unpack_from(body)
                return Ticket(body[_TICKET.size :].decode("ascii"), epoch, item, seq, units, ticket_hash)
        return None

    # passes
    def pass_sign(self, granted: Pass) -> str:
        """At most 204 URL-safe characters. The sale is under the MAC and not in the text: the path names it."""
        key = self._first
        buyer_id = granted.buyer_id
        if not 1 <= len(buyer_id) <= 128:
            raise ValueError("a buyer_id has 1 to 128 bytes")
        head = _PASS.pack(FORMAT, key.id, granted.flags, granted.expires_ms)
        mac = _mac(key.of_pass, _pass_body(head, granted.sale, buyer_id))
        return _encode(head + mac + buyer_id).decode("ascii")

    def pass_read(self, text: str | bytes, sale: str, now_ms: int) -> bytes | None:
        """The buyer_id, if this pass is ours, for this sale, and has not ended."""
        raw = _decode(text, TEXT_MAX)
        if raw is None or len(raw) <= _PASS_CUT or raw[0] != FORMAT:
            return None
        head, mac, buyer_id = raw[:_PASS_HEAD], raw[_PASS_HEAD:_PASS_CUT], raw[_PASS_CUT:]
        body = _pass_body(head, sale, buyer_id)
        for key in self._by_id.get(raw[1], ()):
            if compare_digest(_mac(key.of_pass, body), mac):
                return buyer_id if now_ms < int.from_bytes(head[3:], "big") else None
        return None

    # cursors
    def cursor_sign(self, kind: str, payload: list[Any]) -> str:
        """An opaque place in a list. payload: JSON values. `kind` is under the MAC: it works for no other."""
        key = self._first
        body = bytes((FORMAT, key.id)) + msgspec.json.encode(payload)
        return _encode(body + _mac(key.of_cursor, kind.encode() + b"\0" + body)).decode("ascii")

    def cursor_read(self, kind: str, text: str) -> list[Any] | None:
        raw = _decode(text, CURSOR_MAX)
        if raw is None or len(raw) <= 2 + MAC_BYTES or raw[0] != FORMAT:
            return None
        body, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        for key in self._by_id.get(raw[1], ()):
            if compare_digest(_mac(key.of_cursor, kind.encode() + b"\0" + body), mac):
                return msgspec.json.decode(body[2:], type=list[Any])
        return None


def _whose(sale: str, sku: str, buyer_id: bytes | str) -> bytes:
    return b"%b\0%b\0%b" % (
        sale.encode(),
        sku.encode(),
        buyer_id if isinstance(buyer_id, bytes) else buyer_id.encode(),
    )


def _pass_body(head: bytes, sale: str, buyer_id: bytes) -> bytes:
    return head + sale.encode() + b"\0" + buyer_id
