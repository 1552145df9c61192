"""What can go wrong, as one small tree.

    FairdropError
    ├── Refusal            an expected "no" that the caller is told (carries an HTTP status and a stable code)
    ├── DidNotHappen       nothing changed; the same call may be repeated
    ├── Unknown            it may have happened; look before repeating (money: treat as happened)
    └── CannotStart        a process cannot start; one sentence for a person, exit status 2

Refusals of the purchase scripts are values (`app.scripts`), not exceptions; `Refusal` is for the HTTP edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FairdropError(Exception):
    """Base of every failure that this project raises on purpose."""


class Refusal(FairdropError):
    """The request is refused; answer with a problem document (RFC 9457) and change nothing.

    status: HTTP status. code: stable word of api.md. detail: one sentence for a person.
    retry_after_s: seconds, sent as Retry-After (always with 429 and 503).
    errors: [{"path", "code"}] for 422. extra: further members of the problem document.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        retry_after_s: int | None = None,
        errors: Sequence[Mapping[str, str]] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = (
            retry_after_s if retry_after_s is not None else (1 if status in (429, 503) else None)
        )
        self.errors = list(errors)
        self.extra = dict(extra or {})


class DidNotHappen(FairdropError):
    """The call certainly changed nothing (refused, not sent, READONLY, LOADING, CLUSTERDOWN): repeat when it heals."""


class Unknown(FairdropError):
    """The call was sent and no answer came: it may have happened. Repeat only what is idempotent; query money first."""


class CannotStart(FairdropError):
    """A process cannot start. str(error) is one clear sentence; the command prints it and exits with status 2."""
