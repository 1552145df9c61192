"""Signs what the shop is told, as Standard Webhooks 1.0 says: the shop's own libraries for it can verify it.

    webhook-id          the event's id, the same at every try
    webhook-timestamp   s since 1970 of this try
    webhook-signature   v1,<Base64 of HMAC-SHA256(secret, "<id>.<timestamp>.<body>")>, one for each secret

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Sequence


def sign(secret: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """One signature, with its version."""
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return "v1," + b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


def headers(secrets: Sequence[bytes], message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The three headers. Two secrets while one is rotated: whoever knows either can verify."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(sign(secret, message_id, timestamp_s, body) for secret in secrets),
    }
