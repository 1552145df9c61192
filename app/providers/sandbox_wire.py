"""The sandbox supplier's wire: how requests and call-backs are signed. Shared by its adapter and its server.

    Sandbox-Timestamp: seconds since 1970
    Sandbox-Signature: v1=<hex HMAC-SHA-256(secret, timestamp "." method "." path "." body)>

Call-backs sign `POST` and the path `/hook`, because proxies may mount our route elsewhere. Several signatures,
separated by commas, may be sent while a secret is rotated; `sandbox_secret` may hold several: the first signs, all
verify.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence

TIMESTAMP = "sandbox-timestamp"
SIGNATURE = "sandbox-signature"
WINDOW_S = 300  # the usual five minutes: longer than clocks differ, shorter than a stolen call-back is useful
MERCHANT = "fairdrop"
DEVELOPMENT_SECRET = (
    "sandbox-development-secret"  # used where the setting is empty; production refuses to start then
)


def secrets_of(text: str) -> list[bytes]:
    """The secrets of the setting; the first signs, all verify."""
    return [part.strip().encode() for part in text.split(",") if part.strip()] or [
        DEVELOPMENT_SECRET.encode()
    ]


def sign(secret: bytes, timestamp: str, method: str, path: str, body: bytes) -> str:
    message = f"{timestamp}.{method}.{path}.".encode() + body
    return "v1=" + hmac.new(secret, message, hashlib.sha256).hexdigest()


def headers(secret: bytes, method: str, path: str, body: bytes, at_s: float | None = None) -> dict[str, str]:
    timestamp = str(int(time.time() if at_s is None else at_s))
    return {TIMESTAMP: timestamp, SIGNATURE: sign(secret, timestamp, method, path, body)}


def refusal(
    secrets: Sequence[bytes], headers: Mapping[str, str], method: str, path: str, body: bytes, now_s: float
) -> str | None:
    """None if the signature holds, else why not. `headers`: names in lower case. Compares in constant time."""
    timestamp = headers.get(TIMESTAMP, "")
    given = headers.get(SIGNATURE, "")
    if not timestamp or not given:
        return "signature_missing"
    # ASCII digits only, one way to write a number: what is signed is exactly what is compared with the clock.
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12) or not given.isascii():
        return "signature_malformed"
    if abs(now_s - int(timestamp)) > WINDOW_S:
        return "timestamp_outside_window"
    found = False
    for signature in given.split(",")[:4]:
        for secret in secrets[:4]:
            found |= hmac.compare_digest(signature.strip(), sign(secret, timestamp, method, path, body))
    return None if found else "signature_wrong"
