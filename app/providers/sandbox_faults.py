"""How the sandbox supplier misbehaves: what a tester sets with `POST /control`."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

HANG_MAX_MS = 120_000

S = TypeVar("S", bound=msgspec.Struct)


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of the API calls of one kind. Rates in [0, 1]; at most one of error, refuse, hang, lost applies to a call."""

    latency_ms: int = 0
    jitter_ms: int = 0
    error_rate: float = 0.0  # answers `error_status`, nothing was done
    error_status: int = 500
    refuse_rate: float = 0.0  # 503 not_taken: promises that nothing was done
    hang_rate: float = 0.0  # nothing is done and no answer comes for `hang_ms`
    lost_rate: float = (
        0.0  # it IS done (links can be paid, refunds are booked), and no answer comes for `hang_ms`
    )
    hang_ms: int = 60_000
    only: list[
        str
    ] = []  # operations that are struck (create, query, close, refund, refund_query, bill, send); [] = all


class HookFaults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of call-backs."""

    delay_ms: int = 0
    shuffle_ms: int = 0  # each copy is late by up to this: they arrive in another order
    copies: int = 1  # each is sent so many times
    drop_rate: float = 0.0
    forge_rate: float = 0.0  # a forged copy goes along: somebody else's signature, the amount raised
    early: bool = False  # `paid` is sent before the create call has been answered


class AutoPay(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Plays the buyers: the same seed and attempt id decide alike."""

    share: float = 0.0  # of the links that are paid
    decline_share: float = 0.0  # of the links that are declined
    delay_ms: int = 500
    jitter_ms: int = 500
    seed: int = 1


class Control(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    payments: Faults = msgspec.field(default_factory=Faults)
    sms: Faults = msgspec.field(default_factory=Faults)
    hooks: HookFaults = msgspec.field(default_factory=HookFaults)
    auto_pay: AutoPay = msgspec.field(default_factory=AutoPay)
    link_life_max_s: int = 86_400  # links end by then, whatever was asked for
    late_pay: bool = False  # closed and expired links can still be paid
    refund_pending_ms: int = 0  # refunds are `pending` so long
    seed: int = 1  # of the faults' dice


def changed(control: Control, changes: object) -> Control:
    """What is set, with these changes (JSON values). ValueError: a name is unknown, or a value wrong."""
    return _check(_merge(control, changes))


def _merge(old: S, changes: object) -> S:
    """`old` with the given members replaced, members that are objects merged likewise. ValueError: unknown or wrong."""
    document = msgspec.to_builtins(old)

    def fold(into: dict[str, Any], patch: dict[str, Any]) -> None:
        for key, value in patch.items():
            if isinstance(into.get(key), dict) and isinstance(value, dict):
                fold(into[key], value)
            else:
                into[key] = value

    if not isinstance(changes, dict):
        raise ValueError("not an object")
    fold(document, changes)
    try:
        return msgspec.convert(document, type=type(old))
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _check(control: Control) -> Control:
    rates = [
        rate
        for faults in (control.payments, control.sms)
        for rate in (faults.error_rate, faults.refuse_rate, faults.hang_rate, faults.lost_rate)
    ] + [
        control.hooks.drop_rate,
        control.hooks.forge_rate,
        control.auto_pay.share,
        control.auto_pay.decline_share,
    ]
    times = [
        control.payments.latency_ms, control.payments.jitter_ms, control.payments.hang_ms, control.sms.latency_ms,
        control.sms.jitter_ms, control.sms.hang_ms, control.hooks.delay_ms, control.hooks.shuffle_ms,
        control.auto_pay.delay_ms, control.auto_pay.jitter_ms, control.refund_pending_ms,
    ]  # fmt: skip
    statuses = (control.payments.error_status, control.sms.error_status)
    if (
        not all(0 <= rate <= 1 for rate in rates)
        or not all(0 <= ms <= 3_600_000 for ms in times)
        or not all(400 <= status <= 599 for status in statuses)
        or max(control.payments.hang_ms, control.sms.hang_ms) > HANG_MAX_MS
        or not 0 <= control.hooks.copies <= 100
        or not 1 <= control.link_life_max_s <= 86_400
    ):
        raise ValueError("a number is out of range")
    return control
