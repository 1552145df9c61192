"""What a supplier's answer means, as a closed union. Every adapter speaks it; match with `assert_never`.

| answer   | happened?            | may the same be repeated? | another supplier?          | for the breaker (default) |
|----------|----------------------|---------------------------|----------------------------|---------------------------|
| Done     | yes                  | no need                   | no                         | success                   |
| NotDone  | certainly not        | yes                       | yes                        | failure                   |
| Refused  | certainly not        | no                        | only if `other_may`        | success: the channel works|
| MaybeDone| unknown: treat as yes| with the same key only    | never before query + close | failure                   |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from app.breaker import Result

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Done(Generic[T_co]):
    """The supplier did it (or had done it before under the same key) and said so."""

    value: T_co


@dataclass(frozen=True, slots=True)
class NotDone:
    """It certainly did not happen: not sent, refused before processing, breaker open, no place. Repeat later.

    code: stable word. retry_in_ms: a hint, 0 = none. counts: what the breaker learns.
    """

    code: str
    retry_in_ms: int = 0
    counts: Result = Result.FAILURE


@dataclass(frozen=True, slots=True)
class Refused:
    """A business "no" (declined, closed, bad number). Repeating gets the same answer; the supplier is well."""

    code: str
    other_may: bool = False
    counts: Result = Result.SUCCESS


@dataclass(frozen=True, slots=True)
class MaybeDone:
    """Sent, and no answer that can be believed. It may have happened: query, then close, before anything else."""

    code: str
    counts: Result = Result.FAILURE


Answer = Done[T] | NotDone | Refused | MaybeDone

# What the guard itself answers, always as NotDone and never counted against the supplier.
BREAKER_OPEN = "breaker_open"  # retry_in_ms: until it may be probed
NO_PLACE = "no_place"  # all places were taken, or the deadline passed before the call


def other_may(answer: Answer[T]) -> bool:
    """May another supplier be asked for the same thing now? Only where this one has certainly not done it."""
    return isinstance(answer, NotDone) or (isinstance(answer, Refused) and answer.other_may)
