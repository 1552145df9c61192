"""What an SMS supplier must be able to do.

An unknown result is never repeated: two texts confuse, and what a lost one says is on the page too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from app.providers.answer import Answer


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


class SmsProvider(Protocol):
    @property
    def name(self) -> str: ...

    async def send(self, text: Text) -> Answer[Sent]:
        """Hand a message to the channel. Refused: bad number, blacklist, template. NotDone: safe to send again."""

    async def aclose(self) -> None: ...
