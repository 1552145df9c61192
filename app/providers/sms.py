"""What an SMS supplier must be able to do.

An unknown result is never repeated: two texts confuse, and what a lost one says is on the page too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from app.providers.answer import Answer
from app.providers.payment import HookForged


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One message. `id` is the idempotency key where the supplier has one. `phone` (E.164) is never in repr or logs.

    params: the values that `body` was made with; suppliers in China send an approved template and only these.
    """

    id: str
    phone: str
    language: str
    template: str
    body: str
    params: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Text(id={self.id!r}, template={self.template!r}, language={self.language!r}, phone=***)"


@dataclass(frozen=True, slots=True)
class Sent:
    provider_ref: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SmsStatus:
    """What became of a text, as its supplier reports it. event_id: the same for every copy of one report.

    arrived: None = it is still on its way. code: why not. The phone number that a report may carry is not kept.
    """

    event_id: str
    provider_ref: str
    status: str
    arrived: bool | None
    code: str | None


@runtime_checkable
class ReportsStatus(Protocol):
    """A supplier whose reports are signed."""

    def read_status(self, headers: Mapping[str, str], raw_body: bytes) -> SmsStatus | HookForged:
        """Verify a report on its raw bytes. headers: names in lower case."""


@runtime_checkable
class ReportsByToken(Protocol):
    """A supplier whose reports are not signed: a secret in the address vouches for them (reports.py)."""

    report_token: str  # empty: none are taken
    report_answer: bytes  # the JSON that it wants to hear

    def read_reports(self, raw_body: bytes) -> Sequence[SmsStatus] | HookForged:
        """The reports of one call; the caller has checked the token."""


class SmsProvider(Protocol):
    @property
    def name(self) -> str: ...

    async def send(self, text: Text) -> Answer[Sent]:
        """Hand a message to the channel. Refused: bad number, blacklist, template. NotDone: safe to send again."""

    async def aclose(self) -> None: ...
