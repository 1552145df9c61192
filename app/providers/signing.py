"""What the suppliers' signatures have in common: keys from PEM, and encodings that exist in exactly one form.

A call-back with a flipped bit must be refused even where a lenient decoder would not see the difference: Base64 has
unused bits, percent-escapes have two cases.
"""

from __future__ import annotations

import base64
import binascii
import re

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key

from app.errors import CannotStart

WINDOW_S = 300  # five minutes, what Stripe and WeChat Pay recommend: clocks differ by less, a stolen call-back gets old
RSA_BITS_MIN = 2048
FIELDS_MAX = 200  # of a form: a call-back has some thirty
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BLOCK_END = re.compile(r"(?<=-----)\s*(?=-----BEGIN)")  # between two PEM blocks
_ARMOUR = re.compile(r"-----(?:BEGIN|END) [A-Z ]+-----")


def private_key(text: str, setting: str) -> rsa.RSAPrivateKey:
    """An RSA key: PEM, or the bare Base64 that suppliers' consoles show (PKCS#8 or PKCS#1).

    CannotStart names the setting; nothing of the key is in the message.
    """
    try:
        key = load_der_private_key(_der(text), password=None)
    except (ValueError, TypeError) as error:
        raise CannotStart(f"{setting} is not a private key in PEM or Base64 form") from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < RSA_BITS_MIN:
        raise CannotStart(f"{setting} must be an RSA key of at least {RSA_BITS_MIN} bits")
    return key


def public_key(text: str, setting: str) -> rsa.RSAPublicKey:
    """An RSA public key: PEM or bare Base64. CannotStart names the setting."""
    try:
        key = load_der_public_key(_der(text))
    except (ValueError, TypeError) as error:
        raise CannotStart(f"{setting} is not a public key in PEM or Base64 form") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise CannotStart(f"{setting} must be an RSA key")
    return key


def public_keys(text: str, setting: str) -> list[rsa.RSAPublicKey]:
    """One RSA public key or several: PEM blocks one after the other, or bare Base64 with commas. Empty: none."""
    parts = [part.strip() for part in _BLOCK_END.sub(",", text).split(",")]
    return [public_key(part, setting) for part in parts if part]


def certificates(text: str, setting: str) -> list[x509.Certificate]:
    """The certificates of a PEM text, in its order. CannotStart names the setting."""
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except ValueError as error:
        raise CannotStart(f"{setting} holds no certificate in PEM form") from error


def _der(text: str) -> bytes:
    # PKCS#1 and PKCS#8 are told apart by the DER itself, so the armour is not needed.
    return base64.b64decode("".join(_ARMOUR.sub("", text).split()), validate=True)


def sign(key: rsa.RSAPrivateKey, message: bytes) -> str:
    """SHA256 with RSA (PKCS#1 v1.5), Base64."""
    return base64.b64encode(key.sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()


def verify(key: rsa.RSAPublicKey, message: bytes, signature: str) -> bool:
    """Whether this is the key's signature of the message, in Base64's canonical form."""
    raw = unbase64(signature)
    if raw is None:
        return False
    try:
        key.verify(raw, message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def unbase64(text: str) -> bytes | None:
    """The bytes, or None if the text is not the one Base64 form of them (unused bits set, blanks, other alphabet)."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def form(raw_body: bytes) -> dict[str, str] | None:
    """The fields of an application/x-www-form-urlencoded body. None: not one that a supplier's encoder has made.

    Each name once, UTF-8, every `%` an escape, and the hex digits of the escapes in one case: an encoder does not
    change its mind in the middle of a body, a flipped bit does.
    """
    if not raw_body.isascii() or raw_body.count(b"%") != len(_ESCAPE.findall(raw_body)):
        return None
    digits = b"".join(_ESCAPE.findall(raw_body)).decode()
    if digits.upper() != digits != digits.lower():
        return None
    fields: dict[str, str] = {}
    parts = raw_body.split(b"&")
    if len(parts) > FIELDS_MAX:
        return None
    for part in parts:
        name, equals, value = part.partition(b"=")
        if not name or not equals:
            return None
        try:
            key, text = _unescape(name), _unescape(value)
        except UnicodeDecodeError:
            return None
        if key in fields:
            return None
        fields[key] = text
    return fields


def _unescape(part: bytes) -> str:
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), part.replace(b"+", b" ")).decode()


def timestamp(text: str) -> int | None:
    """Seconds since 1970 as a supplier writes them: ASCII digits, no leading zero. None: something else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12) or text.startswith("0"):
        return None
    return int(text)
