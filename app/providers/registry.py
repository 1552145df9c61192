"""Opens the suppliers that the settings name, each behind its own guard."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from pydantic import SecretStr

from app.breaker import Rules
from app.errors import CannotStart
from app.providers.alipay import Alipay
from app.providers.aliyun_sms import AliyunSms
from app.providers.guard import Guard, GuardedPayment, GuardedSms, GuardRules
from app.providers.payment import PaymentProvider, WantsAddress
from app.providers.reports import report_token
from app.providers.routes import Routes
from app.providers.sandbox_adapter import SandboxPayment, SandboxSms
from app.providers.sms import SmsProvider
from app.providers.stripe import Stripe
from app.providers.templates import Templates
from app.providers.tencent_sms import TencentSms
from app.providers.twilio import Twilio
from app.providers.wechat_pay import WechatPay
from app.settings import Settings


@dataclass(slots=True)
class Providers:
    """The suppliers in use, in order of preference, and the routes that lead to them."""

    payment: dict[str, GuardedPayment] = field(default_factory=dict)
    sms: dict[str, GuardedSms] = field(default_factory=dict)
    routes: Routes = field(default_factory=lambda: Routes({}, ()))

    def payment_for(self, channel: str, key: str, but: Collection[str] = ()) -> str | None:
        """The supplier that a new payment goes to: the first of its route that may be tried now, `but` left out.

        None: there is none such now.
        """
        for name in self.routes.order("payment", channel, key):
            if name not in but and self.payment[name].guard.refusal() is None:
                return name
        return None

    def payment_now(self, channel: str, key: str) -> str:
        """The same, and the first of the route where none is well: the payment waits for it."""
        found = self.payment_for(channel, key)
        return self.routes.order("payment", channel, key)[0] if found is None else found

    def wants_address(self, channel: str) -> bool:
        """Whether a supplier of this channel must be told the payer's network address."""
        adapters = (self.payment[name].adapter for name in self.routes.route("payment", channel))
        return any(isinstance(one, WantsAddress) and channel in one.address_channels for one in adapters)

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


def supplier_kinds(settings: Settings) -> dict[str, Literal["payment", "sms"]]:
    """Every supplier in use by the settings, by the one name that it has everywhere, preferred ones first."""
    return {
        **dict.fromkeys(_words(settings.payment_provider, settings.payment_also), "payment"),
        **dict.fromkeys(_words(settings.sms_provider, settings.sms_also), "sms"),
    }


def guard_rules(settings: Settings, kind: Literal["payment", "sms"]) -> GuardRules:
    """Limits of a supplier's guard. A call that takes more than half of its deadline is slow.

    Payments are probed more often in a long outage: a buyer's deadline runs meanwhile, a text waits on its ticket.
    """
    deadline_s = settings.provider_deadline_s
    return GuardRules(
        deadline_s=deadline_s,
        places_max=settings.provider_concurrency,
        wait_max_s=settings.provider_wait_max_s,
        retries_max=settings.provider_retries_max,
        retry_earned=settings.provider_retry_earned,
        retry_per_s=settings.provider_retry_per_s,
        retry_first_s=settings.provider_retry_first_ms / 1000,
        breaker=Rules(
            failure_rate=settings.breaker_failure_rate,
            slow_rate=settings.breaker_slow_rate,
            slow_ms=int(deadline_s * 500),
            window_ms=settings.breaker_window_s * 1000,
            calls_min=settings.breaker_calls_min,
            open_ms=settings.breaker_open_ms,
            open_max_ms=settings.breaker_payment_open_max_ms
            if kind == "payment"
            else settings.breaker_open_max_ms,
            probes_max=settings.breaker_probes_max,
            lease_ms=int(deadline_s * 1000) * 2 + 1_000,
        ),
    )


def bill_rules(settings: Settings) -> GuardRules:
    """Of reading daily bills: one at a time, slow by nature; that it fails says nothing about payments."""
    deadline_s = settings.bill_deadline_s
    return GuardRules(
        deadline_s=deadline_s,
        places_max=1,
        wait_max_s=deadline_s,
        breaker=Rules(
            slow_ms=int(deadline_s * 1000), slow_rate=100.0, lease_ms=int(deadline_s * 1000) * 2 + 1_000
        ),
    )


PAYMENT = ("sandbox", "sandbox-2", "stripe", "alipay", "wechat-pay")
SMS = ("sandbox-sms", "sandbox-sms-2", "aliyun-sms", "tencent-sms", "twilio")


def open_providers(settings: Settings) -> Providers:
    """Adapters for the preferred suppliers and the further ones; nothing is connected yet.

    CannotStart: an unknown name, or a setting of a supplier in use is missing or bad.
    """
    providers = Providers()
    for word in _words(settings.payment_provider, settings.payment_also):
        payment = _payment(word, settings)
        bills = Guard(f"{payment.name}-bill", "payment", bill_rules(settings))
        providers.payment[payment.name] = GuardedPayment(
            payment, Guard(payment.name, "payment", guard_rules(settings, "payment")), bills
        )
    for word in _words(settings.sms_provider, settings.sms_also):
        sms = _sms(word, settings)
        providers.sms[sms.name] = GuardedSms(sms, Guard(sms.name, "sms", guard_rules(settings, "sms")))
    providers.routes = Routes(
        {name: payment.adapter.channels for name, payment in providers.payment.items()},
        list(providers.sms),
        payment_routes=settings.payment_routes,
        sms_route=settings.sms_route,
    )
    return providers


def _words(first: str, also: str) -> list[str]:
    return list(dict.fromkeys([first, *(word.strip() for word in also.split(",") if word.strip())]))


def _payment(word: str, settings: Settings) -> PaymentProvider:
    deadline_s, connections_max = settings.provider_deadline_s, settings.provider_concurrency
    match word:
        case "sandbox" | "sandbox-2":
            return SandboxPayment(
                _sandbox_url(word, settings),
                _sandbox_secret(settings),
                deadline_s=deadline_s,
                connections_max=connections_max,
                name=word,
            )
        case "stripe":
            _need(settings, "stripe_key", "stripe_hook_secrets")
            return Stripe(
                settings.stripe_key.get_secret_value(),
                _split(settings.stripe_hook_secrets.get_secret_value()),
                deadline_s=deadline_s,
                connections_max=connections_max,
                url=settings.stripe_url,
                return_url=settings.stripe_return_url,
                methods=_split(settings.stripe_methods),
            )
        case "alipay":
            _need(settings, "alipay_app_id", "alipay_seller_id", "alipay_private_key")
            return Alipay(
                app_id=settings.alipay_app_id,
                seller_id=settings.alipay_seller_id,
                private_key=settings.alipay_private_key.get_secret_value(),
                public_key=settings.alipay_public_key,
                app_cert=settings.alipay_app_cert,
                alipay_cert=settings.alipay_cert,
                root_cert=settings.alipay_root_cert,
                deadline_s=deadline_s,
                connections_max=connections_max,
                url=settings.alipay_url,
                way=settings.alipay_way,
            )
        case "wechat-pay":
            _need(
                settings, "wechat_pay_mchid", "wechat_pay_appid", "wechat_pay_serial", "wechat_pay_private_key",
                "wechat_pay_apiv3_key",
            )  # fmt: skip
            return WechatPay(
                mchid=settings.wechat_pay_mchid,
                appid=settings.wechat_pay_appid,
                serial=settings.wechat_pay_serial,
                private_key=settings.wechat_pay_private_key.get_secret_value(),
                apiv3_key=settings.wechat_pay_apiv3_key.get_secret_value(),
                public_key_id=settings.wechat_pay_public_key_id,
                public_key=settings.wechat_pay_public_key,
                deadline_s=deadline_s,
                connections_max=connections_max,
                url=settings.wechat_pay_url,
            )
    raise CannotStart(
        f"FAIRDROP_PAYMENT_PROVIDER: there is no payment supplier {word!r}; there are: {', '.join(PAYMENT)}"
    )


def _sms(word: str, settings: Settings) -> SmsProvider:
    deadline_s, connections_max = settings.provider_deadline_s, settings.provider_concurrency
    match word:
        case "sandbox-sms" | "sandbox-sms-2":
            return SandboxSms(
                _sandbox_url(word, settings),
                _sandbox_secret(settings),
                deadline_s=deadline_s,
                connections_max=connections_max,
                name=word,
            )
        case "aliyun-sms":
            _need(
                settings,
                "aliyun_sms_key_id",
                "aliyun_sms_key_secret",
                "aliyun_sms_signature",
                "aliyun_sms_templates",
            )
            return AliyunSms(
                key_id=settings.aliyun_sms_key_id,
                key_secret=settings.aliyun_sms_key_secret.get_secret_value(),
                signature=settings.aliyun_sms_signature,
                templates=Templates(settings.aliyun_sms_templates, "FAIRDROP_ALIYUN_SMS_TEMPLATES"),
                deadline_s=deadline_s,
                connections_max=connections_max,
                url=settings.aliyun_sms_url,
                report_token=report_token(
                    settings.aliyun_sms_report_token.get_secret_value(), "FAIRDROP_ALIYUN_SMS_REPORT_TOKEN"
                ),
            )
        case "tencent-sms":
            _need(
                settings, "tencent_sms_secret_id", "tencent_sms_secret_key", "tencent_sms_app_id",
                "tencent_sms_signature", "tencent_sms_templates",
            )  # fmt: skip
            return TencentSms(
                secret_id=settings.tencent_sms_secret_id,
                secret_key=settings.tencent_sms_secret_key.get_secret_value(),
                app_id=settings.tencent_sms_app_id,
                signature=settings.tencent_sms_signature,
                templates=Templates(settings.tencent_sms_templates, "FAIRDROP_TENCENT_SMS_TEMPLATES"),
                deadline_s=deadline_s,
                connections_max=connections_max,
                region=settings.tencent_sms_region,
                url=settings.tencent_sms_url,
                report_token=report_token(
                    settings.tencent_sms_report_token.get_secret_value(), "FAIRDROP_TENCENT_SMS_REPORT_TOKEN"
                ),
            )
        case "twilio":
            _need(settings, "twilio_account_sid", "twilio_auth_token", "twilio_sender")
            return Twilio(
                account_sid=settings.twilio_account_sid,
                auth_token=settings.twilio_auth_token.get_secret_value(),
                sender=settings.twilio_sender,
                deadline_s=deadline_s,
                connections_max=connections_max,
                status_url=settings.twilio_status_url,
                url=settings.twilio_url,
            )
    raise CannotStart(
        f"FAIRDROP_SMS_PROVIDER: there is no SMS supplier {word!r}; there are: {', '.join(SMS)}"
    )


def _sandbox_url(word: str, settings: Settings) -> str:
    if not word.endswith("-2"):
        return settings.sandbox_url
    _need(settings, "sandbox_2_url")
    return settings.sandbox_2_url


def sms_templates(settings: Settings) -> dict[str, Templates | None]:
    """SMS suppliers in use, in order, with their approved templates; None: it sends any text.

    CannotStart: an event has no template at one of them.
    """
    found: dict[str, Templates | None] = {}
    for word in _words(settings.sms_provider, settings.sms_also):
        match word:
            case "aliyun-sms":
                found[word] = Templates(settings.aliyun_sms_templates, "FAIRDROP_ALIYUN_SMS_TEMPLATES")
            case "tencent-sms":
                found[word] = Templates(settings.tencent_sms_templates, "FAIRDROP_TENCENT_SMS_TEMPLATES")
            case _:
                found[word] = None
    return found


def _sandbox_secret(settings: Settings) -> str:
    secret = settings.sandbox_secret.get_secret_value()
    if not secret and not settings.development:
        raise CannotStart("FAIRDROP_SANDBOX_SECRET is missing: without it anyone could sign payments")
    return secret


def _need(settings: Settings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (value.get_secret_value() if isinstance(value, SecretStr) else value):
            raise CannotStart(f"FAIRDROP_{name.upper()} is missing: its supplier is in use")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
