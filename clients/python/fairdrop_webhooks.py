"""Verifies what Fairdrop pushes to a shop (Standard Webhooks 1.0). One file without dependencies, Python 3.9+: copy it.

try:
    event = verify([SECRET], request.headers, raw_body)
except NotOurs:
    return 401
if first_time(event["id"]):     # at least once: remember ids for a week
    take(event)                 # in no order: compare event["version"] with what you have of the order
return 204
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from typing import Any, Mapping, Optional, Sequence  # noqa: UP035 - shops run older Pythons than we do

TOLERANCE_S = 300  # a delivery that is older or newer than this was recorded by somebody and sent again


class NotOurs(Exception):
    """Forged, changed on the way, too old, or signed with another secret. Answer 401 and do nothing."""


def verify(
    secrets: Sequence[str],
    headers: Mapping[str, str],
    body: bytes,
    *,
    now_s: Optional[float] = None,  # noqa: UP045
    tolerance_s: float = TOLERANCE_S,
) -> Any:
    """The event. `body`: the raw bytes as received. `secrets`: `whsec_…`, several while one is rotated."""
    given = {name.lower(): value for name, value in headers.items()}
    message_id = given.get("webhook-id", "")
    timestamp = given.get("webhook-timestamp", "")
    if not message_id or not (timestamp.isascii() and timestamp.isdigit()) or len(timestamp) > 15:
        raise NotOurs("headers are missing")
    now = time.time() if now_s is None else now_s
    if abs(now - int(timestamp)) > tolerance_s:
        raise NotOurs("too old or too new")
    signed = f"{message_id}.{timestamp}.".encode() + body
    for part in given.get("webhook-signature", "").split(" "):
        version, _, signature = part.partition(",")
        try:
            found = base64.b64decode(signature, validate=True)
        except (ValueError, binascii.Error):
            continue
        for secret in secrets:
            key = base64.b64decode(secret[6:] if secret.startswith("whsec_") else secret)
            wanted = hmac.new(key, signed, hashlib.sha256).digest()
            if version == "v1" and hmac.compare_digest(wanted, found):
                return json.loads(body)
    raise NotOurs("no signature fits")
