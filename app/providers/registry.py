"""Opens the suppliers that the settings name, each behind its own guard."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.breaker import Rules
from app.errors import CannotStart
from app.providers.guard import Guard, GuardedPayment, GuardedSms, GuardRules
from app.providers.payment import PaymentProvider
from app.providers.sandbox_adapter import SandboxPayment, SandboxSms
from app.providers.sms import SmsProvider
from app.settings import Settings


@dataclass(slots=True)
class Providers:
    """The suppliers in use, in order of preference."""

    payment: dict[str, GuardedPayment] = field(default_factory=dict)
    sms: dict[str, GuardedSms] = field(default_factory=dict)

    def for_channel(self, channel: str) -> GuardedPayment | None:
        """The supplier of a buyer's channel: one of that name, else the preferred one, which serves every channel."""
        return self.payment.get(channel) or next(iter(self.payment.values()), None)

    def guards(self) -> list[Guard]:
        return [
            *(payment.guard for payment in self.payment.values()),
            *(sms.guard for sms in self.sms.values()),
        ]

    async def aclose(self) -> None:
        for payment in self.payment.values():
            await payment.aclose()
        for sms in self.sms.values():
            await sms.aclose()


def guard_rules(settings: Settings) -> GuardRules:
    """Limits of a supplier's guard. A call that takes more than half of its deadline is slow."""
    deadline_s = settings.provider_deadline_s
    return GuardRules(
        deadline_s=deadline_s,
        places_max=settings.provider_concurrency,
        wait_max_s=settings.provider_wait_max_s,
        breaker=Rules(slow_ms=int(deadline_s * 500), lease_ms=int(deadline_s * 1000) * 2 + 1_000),
    )


def open_providers(settings: Settings) -> Providers:
    """Adapters for `payment_provider` and `sms_provider`; nothing is connected yet. CannotStart: an unknown name."""
    rules = guard_rules(settings)
    secret = settings.sandbox_secret.get_secret_value()
    providers = Providers()
    if (
        "sandbox" in (settings.payment_provider, settings.sms_provider)
        and not secret
        and not settings.development
    ):
        raise CannotStart("FAIRDROP_SANDBOX_SECRET is missing: without it anyone could sign payments")
    payment: PaymentProvider
    sms: SmsProvider
    match settings.payment_provider:
        case "sandbox":
            payment = SandboxPayment(
                settings.sandbox_url, secret, deadline_s=settings.provider_deadline_s,
                connections_max=settings.provider_concurrency,
            )  # fmt: skip
        case other:
            raise CannotStart(
                f"FAIRDROP_PAYMENT_PROVIDER: there is no payment supplier {other!r}; there is: sandbox"
            )
    match settings.sms_provider:
        case "sandbox":
            sms = SandboxSms(
                settings.sandbox_url, secret, deadline_s=settings.provider_deadline_s,
                connections_max=settings.provider_concurrency,
            )  # fmt: skip
        case other:
            raise CannotStart(f"FAIRDROP_SMS_PROVIDER: there is no SMS supplier {other!r}; there is: sandbox")
    providers.payment[payment.name] = GuardedPayment(payment, Guard(payment.name, "payment", rules))
    providers.sms[sms.name] = GuardedSms(sms, Guard(sms.name, "sms", rules))
    return providers
