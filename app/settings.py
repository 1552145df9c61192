"""Every setting: FAIRDROP_<NAME>, with its unit and default. Secrets may also come from FAIRDROP_<NAME>_FILE."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import EnvSettingsSource

from app.errors import CannotStart

SECRETS = (
    "signing_keys",
    "pii_keys",
    "jwt_secret",
    "operator_key",
    "sandbox_secret",
    "redis_url",
    "database_url",
    "captcha_secret",
    "stripe_key",
    "stripe_hook_secrets",
    "alipay_private_key",
    "alipay_public_key",
    "alipay_app_cert",
    "alipay_cert",
    "alipay_root_cert",
    "wechat_pay_private_key",
    "wechat_pay_apiv3_key",
    "wechat_pay_public_key",
    "aliyun_sms_key_secret",
    "aliyun_sms_templates",
    "aliyun_sms_report_token",
    "tencent_sms_secret_key",
    "tencent_sms_templates",
    "tencent_sms_report_token",
    "twilio_auth_token",
)  # also public keys, certificates and templates: what people keep in files


NO_SETTINGS = ("FAIRDROP_PORT_FILE", "FAIRDROP_TEST_")  # what tests tell processes


class _SecretFiles(EnvSettingsSource):
    """Reads FAIRDROP_X_FILE for the settings in SECRETS (Docker and Kubernetes mount secrets as files)."""

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in SECRETS:
            path = os.environ.get(f"FAIRDROP_{name.upper()}_FILE")
            if path:
                try:
                    found[name] = Path(path).read_text(encoding="utf-8").strip()
                except OSError as error:
                    raise CannotStart(
                        f"FAIRDROP_{name.upper()}_FILE: cannot read {path}: {error.strerror}"
                    ) from error
        return found


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="FAIRDROP_", extra="ignore", validate_default=False, env_ignore_empty=True
    )

    env: Literal["production", "development"] = Field(
        "production", description="development allows X-Buyer-Id and made-up secrets; `up` and `demo` set it"
    )

    # stores
    redis_url: str = Field(
        "",
        description="redis://[:password@]host:port/0, or redis+sentinel://[:password@]host:port,host:port,host:port"
        "/service[?sentinel_password=…], or redis+cluster://[:password@]host:port,host:port,host:port "
        "(rediss… with TLS); empty: `up` embeds Valkey",
    )
    database_url: str = Field(
        "",
        description="postgresql://user:password@host:port/name, or host:port,host:port: the one of them that takes"
        " writes; empty: `up` embeds Postgres",
    )
    data_dir: Path = Field(
        Path(".fairdrop"), description="where `up` keeps stores, secrets, logs and urls.json"
    )
    disk_min_mb: int = Field(
        256,
        ge=0,
        description="MB left on the disk of `up`'s own stores below which joins get 503; 0: nobody looks",
    )
    ballast_mb: int = Field(
        64,
        ge=0,
        description="MB of a file that is removed when Valkey ended on a full disk, so that it can start; 0: none",
    )
    redis_deadline_s: float = Field(2.0, description="s; a Redis call without an answer by then is unknown")
    database_pool: int = Field(
        8,
        description="connections a process keeps to Postgres; a worker also confirm_in_flight_max + 2",
    )
    database_deadline_s: float = Field(15.0, description="s; one SQL statement")

    # secrets
    signing_keys: SecretStr = Field(
        SecretStr(""),
        description="comma-separated, >= 32 characters each; the first signs passes, tickets and cursors, all verify",
    )
    pii_keys: SecretStr = Field(
        SecretStr(""),
        description="comma-separated 32-byte keys, base64 or hex; the first seals contacts (AES-GCM), all open",
    )
    jwt_secret: SecretStr = Field(SecretStr(""), description="HS256 secret of the shop's buyer tokens")
    jwt_jwks_url: str = Field(
        "", description="JWKS address of the shop's buyer tokens (RS256, ES256, EdDSA), instead of a secret"
    )
    jwt_issuer: str = Field("", description="required `iss` of a buyer token; empty: not checked")
    jwt_audience: str = Field("", description="required `aud` of a buyer token; empty: not checked")
    operator_key: SecretStr = Field(SecretStr(""), description="the first admin's key for the office")

    # listening
    front_host: str = Field("127.0.0.1", description="address")
    front_port: int = Field(8080, description="TCP port, 0 = any")
    front_workers: int = Field(1, ge=1, le=64, description="front-door processes")
    behind_nice: int = Field(
        5,
        ge=0,
        le=19,
        description="how much lower `up` puts the CPU priority (nice) of worker, office and sandbox than that of the"
        " front doors and stores, so that their bursts are not what buyers wait for",
    )
    office_host: str = Field("127.0.0.1", description="address")
    office_port: int = Field(8081, description="TCP port, 0 = any")
    hooks_port: int = Field(
        0, description="TCP port of a listener of its own for supplier call-backs; 0: the office serves them"
    )
    worker_host: str = Field("127.0.0.1", description="address")
    worker_port: int = Field(8082, description="TCP port of probes and metrics, 0 = any")
    sandbox_host: str = Field("127.0.0.1", description="address")
    sandbox_port: int = Field(8083, description="TCP port of the sandbox supplier, 0 = any")
    server: Literal["uvicorn", "granian"] = Field("uvicorn", description="ASGI server of the front")
    drain_s: float = Field(
        5.0,
        ge=0,
        description="s of serving on after SIGTERM, with /readyz saying draining and each answer `Connection: close`; "
        "longer than a balancer needs to notice, and than it keeps idle connections to us",
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="comma-separated origins; default none"
    )
    metrics_allow: str = Field(
        "127.0.0.0/8,::1/128", description="comma-separated networks that may read /metrics"
    )
    trusted_proxies: str = Field("", description="comma-separated networks whose X-Forwarded-For is believed")
    public_url: str = Field("", description="where buyers reach the front; empty: its own address")
    office_url: str = Field("", description="where operators' commands and suppliers' hooks reach the office")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else JSON"
    )

    # connections
    listen_backlog: int = Field(
        4_096,
        ge=64,
        description="connections the kernel keeps until they are accepted (it may cap this: somaxconn)",
    )
    keep_alive_s: float = Field(
        30.0, gt=0, description="s an idle connection stays open; longer than a poll interval"
    )
    head_max_bytes: int = Field(
        16_384, ge=1_024, description="bytes of request line and headers; more is 431"
    )
    head_within_s: float = Field(
        10.0, gt=0, description="s a client may take to send request line and headers"
    )
    body_within_s: float = Field(
        10.0,
        gt=0,
        description="s a client may take to send a request's body; then 408, and the connection ends",
    )
    read_within_s: float = Field(
        30.0,
        gt=0,
        description="s an answer may wait for a client that does not read; then it is disconnected (Linux, uvicorn)",
    )
    connections_max: int = Field(
        20_000,
        ge=1,
        description="connections of one process; beyond: 503 and closed. Fewer where the limit of open files is lower",
    )
    overload_turn_ms: float = Field(
        20.0, gt=0, description="ms; a longer turn of the event loop is a sign of a crowd (uvicorn)"
    )
    overload_wait_max_ms: float = Field(
        30.0,
        ge=0,
        description="ms of waiting requests that a process takes; newcomers get 503 at once; 0: nobody is turned away",
    )
    close_within_s: float = Field(5.0, ge=0, description="s that requests under way get when a process stops")

    # the front door's limits
    body_max_bytes: int = Field(16_384, description="bytes; larger bodies are 413")
    batch_max: int = Field(256, ge=1, le=1000, description="buyers in one line_join call")
    batch_in_flight_max: int = Field(
        2, ge=1, le=8, description="line_join calls of one item on the wire at once"
    )
    batch_beside_min: int = Field(
        32,
        ge=1,
        description="buyers who must wait before a line_join call is made beside another of the item",
    )
    batch_queue_max: int = Field(
        20_000, description="buyers queued in one front-door process before 503 busy"
    )
    join_wait_max_ms: float = Field(
        25.0,
        gt=0,
        description="ms a buyer may have queued for Redis before newcomers get 503 (if batch_max are queued)",
    )
    orders_backlog_max: int = Field(
        100_000, description="claims waiting for Postgres before admission stops and joins get 503"
    )
    sse_max: int = Field(5_000, description="event streams of one front-door process; beyond: 503, poll")
    snapshot_every_ms: int = Field(100, ge=10, description="ms between two looks at a sale's state")
    snapshot_stale_s: float = Field(3.0, description="s without a fresh look before buyers get 503")
    line_serve_max: int = Field(
        32,
        ge=1,
        le=1_000,
        description="ranks that one script call serves or passes; Redis answers nobody else meanwhile, 10–20 µs each",
    )
    admit_every_ms: int = Field(50, ge=10, le=100, description="ms between two admit ticks")
    pass_rate_per_min: int = Field(30, description="passes one buyer may ask for in a minute")
    change_rate_per_min: int = Field(30, description="leave and payment requests of one buyer in a minute")
    poll_min_ms: int = Field(500, description="ms; the shortest poll interval told to a buyer")
    poll_max_ms: int = Field(15_000, description="ms; the longest poll interval told to a buyer")
    pass_pow_bits: int = Field(
        18, ge=1, le=30, description="leading zero bits of the proof-of-work challenge"
    )
    captcha_verify_url: str = Field(
        "", description="siteverify address of the captcha supplier (reCAPTCHA, hCaptcha, Turnstile form)"
    )
    captcha_site_key: str = Field("", description="public site key shown to buyers")
    captcha_secret: SecretStr = Field(SecretStr(""), description="the captcha supplier's secret")
    captcha_script_url: str = Field(
        "",
        description="the captcha supplier's script, for our own page (`render=explicit`); empty: the page loads "
        "nothing from elsewhere, and buyers of a sale with a captcha come with a pass from the shop's page",
    )
    captcha_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="comma-separated origins besides the script's: of the captcha's frame, styles and calls",
    )

    # the worker
    worker_name: str = Field("", description="consumer name in the streams; empty: host and process id")
    confirm_batch_max: int = Field(1_000, ge=1, le=10_000, description="claims confirmed in one transaction")
    confirm_in_flight_max: int = Field(
        6, ge=1, le=8, description="full batches of one sale that a worker confirms at once"
    )
    confirm_block_ms: int = Field(200, description="ms to wait for claims")
    autoclaim_idle_ms: int = Field(
        10_000, description="ms before another worker's unfinished claims are taken over"
    )
    lease_s: float = Field(30.0, description="s a due row stays leased to one worker")
    expire_every_ms: int = Field(500, description="ms between two looks for unpaid orders")
    relay_every_ms: int = Field(
        100, description="ms between two looks at what is due (at most 100 ms) and at what buyers ask for"
    )
    link_wait_max_s: int = Field(
        60, description="s after confirm before the payment deadline starts without a link"
    )
    unknown_max_s: int = Field(3_600, description="s an order may stay reserved while its payment is unknown")
    pay_extension_s: int = Field(
        300,
        ge=0,
        description="s more for an order whose deadline comes while its supplier is out, once an outage; 0: never",
    )
    pay_extension_max_s: int = Field(
        900, ge=0, description="s that all extensions of one order's deadline may add up to"
    )
    pay_outage_gap_s: float = Field(
        30.0,
        gt=0,
        description="s without trouble after which a supplier's outage is over, and the next is another",
    )
    slow_auto: bool = Field(
        True, description="slow admission down while Postgres or payment cannot keep up; false: never"
    )
    slow_confirm_lag_s: float = Field(
        5.0, gt=0, description="s a claim may wait for Postgres before admission slows down"
    )
    slow_link_wait_s: float = Field(
        20.0, gt=0, description="s payment links may be late before admission slows down"
    )
    slow_rate_min_per_s: float = Field(
        1.0, gt=0, description="tickets per second that a slowdown leaves at least"
    )
    advice_lease_s: float = Field(
        15.0, gt=1, description="s a slowdown holds after the worker that wanted it was last seen"
    )
    reconcile_every_s: float = Field(10.0, description="s between two comparisons of Redis and Postgres")
    audit_every_s: float = Field(
        20.0,
        ge=0.1,
        description="s between two audits of the sales that are going on (sums, not each ticket)",
    )
    pulse_every_s: float = Field(1.0, description="s between two pulses (rollback detection)")
    rebuild_auto: bool = Field(
        True, description="make a sale anew from Postgres when its Redis was lost, promoted or rolled back"
    )
    rebuild_after_s: float = Field(
        3.0,
        ge=0,
        description="s a sale has no home, and no worker's pulse, before it is rebuilt by itself; not waited for once"
        " sentinels or a cluster have elected another primary",
    )
    rebuild_every_min_s: float = Field(
        30.0,
        ge=0,
        description="s between two rebuilds of one sale by one worker: two Redis must not take turns",
    )
    pay_concurrency: int = Field(32, description="payment calls under way at once")
    tell_concurrency: int = Field(32, description="SMS calls under way at once")
    sms_ttl_s: int = Field(900, description="s after which an unsent SMS is dropped")
    sms_shown_after_s: float = Field(
        10.0, ge=0, description="s after which a text that no channel has taken is shown on the ticket"
    )
    sms_number_per_min: int = Field(
        3,
        ge=1,
        description="texts to one phone number in any minute; more wait. Keep it below your suppliers' own",
    )
    sms_number_per_hour: int = Field(8, ge=1, description="texts to one phone number in any hour; more wait")
    sms_number_per_day: int = Field(20, ge=1, description="texts to one phone number in any 24 h; more wait")
    settled_keep_days: int = Field(30, description="days contacts are kept after a sale has settled")

    # telling the shop
    webhooks_allow_private: bool = Field(
        False, description="push webhooks to private, loopback and link-local addresses too"
    )
    webhook_deadline_s: float = Field(
        15.0, gt=0, description="s; one delivery: look-up, connection, answer and all"
    )
    webhook_answer_max_bytes: int = Field(
        65_536, ge=0, description="bytes read of an endpoint's answer; it is not kept"
    )
    webhook_concurrency: int = Field(32, ge=1, description="deliveries under way at once")
    webhook_url_concurrency: int = Field(8, ge=1, description="deliveries to one address at once")
    webhook_retry_first_s: float = Field(5.0, gt=0, description="s before the second try; doubles, ± 20 %")
    webhook_retry_max_s: float = Field(14_400.0, gt=0, description="s between two tries at most")
    webhook_retry_for_s: float = Field(
        259_200.0, gt=0, description="s a delivery is tried again before it is given up"
    )
    webhook_keep_s: float = Field(604_800.0, gt=0, description="s the record of an ended delivery is kept")

    # suppliers
    payment_provider: str = Field("sandbox", description="payment supplier")
    sms_provider: str = Field("sandbox-sms", description="SMS supplier")
    sandbox_url: str = Field("http://127.0.0.1:8083", description="address of the sandbox supplier")
    sandbox_2_url: str = Field(
        "", description="address of a second sandbox, the supplier `sandbox-2`: to see how one stands in"
    )
    sandbox_public_url: str = Field(
        "", description="where buyers reach the sandbox's pay page; empty: sandbox_url"
    )
    sandbox_secret: SecretStr = Field(
        SecretStr(""), description="secret that signs the sandbox's webhooks and our requests to it"
    )
    sandbox_ledger: str = Field(
        "", description="file in which the sandbox keeps its books; empty: in memory, gone when it ends"
    )
    provider_deadline_s: float = Field(5.0, description="s; one call to a supplier")
    bill_deadline_s: float = Field(
        120.0, gt=0, description="s; reading one daily bill of a payment supplier, its download and all"
    )
    bill_after_s: float = Field(
        9_000.0, ge=0, description="s after a UTC day has ended before its bill is first asked for"
    )
    bill_days_back: int = Field(7, ge=1, description="days whose bills are still read when they were missed")
    provider_concurrency: int = Field(32, description="calls to one supplier at once")
    provider_wait_max_s: float = Field(1.0, description="s a call waits for a place before it is refused")
    provider_retries_max: int = Field(
        2,
        ge=0,
        le=10,
        description="repeats of one call, within its deadline; only of what certainly did not happen",
    )
    provider_retry_first_ms: int = Field(
        50, ge=1, description="ms before the first repeat; doubles, jittered"
    )
    provider_retry_earned: float = Field(
        0.2, ge=0, le=1, description="repeats that each call to a supplier earns: 0.2 is one in five"
    )
    provider_retry_per_s: float = Field(1.0, ge=0, description="repeats a second beside the earned ones")
    breaker_shared: bool = Field(
        True,
        description="one breaker a supplier for all processes, in Redis; false: each process has its own",
    )
    breaker_failure_rate: float = Field(
        50.0, gt=0, le=100, description="% of failed calls that open a breaker"
    )
    breaker_slow_rate: float = Field(
        80.0, gt=0, le=100, description="% of slow calls (over half the deadline) that open a breaker"
    )
    breaker_window_s: int = Field(10, ge=1, le=600, description="s of calls that are counted")
    breaker_calls_min: int = Field(10, ge=1, description="calls in the window below which nothing opens")
    breaker_open_ms: int = Field(
        1_000,
        ge=100,
        description="ms the first open interval lasts, ± 20 %; doubles after each failed recovery",
    )
    breaker_open_max_ms: int = Field(30_000, ge=100, description="ms an open interval lasts at most, ± 20 %")
    breaker_payment_open_max_ms: int = Field(
        10_000,
        ge=100,
        description="ms, the same for payment suppliers: buyers whose time runs wait for the end of this interval",
    )
    breaker_probes_max: int = Field(5, ge=1, le=1_000, description="calls that probe a supplier in half-open")
    breaker_history_max: int = Field(
        1_000, ge=10, description="transitions of each supplier kept for operators, the newest"
    )

    payment_also: str = Field(
        "",
        description="comma-separated further payment suppliers, in order: stripe, alipay, wechat-pay,"
        " sandbox, sandbox-2",
    )
    sms_also: str = Field(
        "",
        description="comma-separated further SMS suppliers, in order: aliyun-sms, tencent-sms, twilio,"
        " sandbox-sms, sandbox-sms-2",
    )

    payment_routes: str = Field(
        "",
        description="JSON: suppliers of a payment channel, in order, with their weights (0: backup)"
        ' {"card": {"stripe": 3, "sandbox": 0}}; other channels: the first supplier that knows them',
    )
    sms_route: str = Field(
        "",
        description='JSON: SMS suppliers in order, with their weights (0: backup) {"twilio": 1, "sandbox-sms": 0};'
        " empty: sms_provider, then sms_also",
    )

    # Stripe: docs.stripe.com/keys
    stripe_key: SecretStr = Field(SecretStr(""), description="secret or restricted key, sk_… or rk_…")
    stripe_hook_secrets: SecretStr = Field(
        SecretStr(""),
        description="comma-separated signing secrets of the webhook endpoint, whsec_…; all verify",
    )
    stripe_return_url: str = Field(
        "", description="where buyers return to when the payment request names no return_url"
    )
    stripe_methods: str = Field(
        "card",
        description="comma-separated payment methods; empty: as the dashboard says, late ones too",
    )
    stripe_url: str = Field("https://api.stripe.com", description="address of Stripe's API")

    # Alipay: opendocs.alipay.com; PEM, or the bare Base64 of its key tool
    alipay_app_id: str = Field("", description="app id, 2021…")
    alipay_seller_id: str = Field(
        "", description="merchant's user id (PID), 2088…; call-backs for another are refused"
    )
    alipay_private_key: SecretStr = Field(SecretStr(""), description="the app's RSA2 private key")
    alipay_public_key: str = Field(
        "", description="Alipay's public key, while it changes both; or set the three certificates instead"
    )
    alipay_app_cert: str = Field("", description="certificate mode: appCertPublicKey_….crt, PEM")
    alipay_cert: str = Field(
        "", description="certificate mode: alipayCertPublicKey_RSA2.crt, PEM; while it changes, both"
    )
    alipay_root_cert: str = Field("", description="certificate mode: alipayRootCert.crt, PEM")
    alipay_way: Literal["page", "wap", "app", "qr"] = Field(
        "page", description="what the channel `alipay` means; others: alipay-page, -wap, -app, -qr"
    )
    alipay_url: str = Field(
        "https://openapi.alipay.com/gateway.do", description="address of Alipay's gateway"
    )

    # WeChat Pay, API v3: pay.weixin.qq.com
    wechat_pay_mchid: str = Field("", description="merchant number")
    wechat_pay_appid: str = Field("", description="app id of the official account, mini program or app, wx…")
    wechat_pay_serial: str = Field("", description="serial number of the merchant's API certificate")
    wechat_pay_private_key: SecretStr = Field(SecretStr(""), description="apiclient_key.pem")
    wechat_pay_apiv3_key: SecretStr = Field(
        SecretStr(""), description="APIv3 key, 32 characters; opens call-backs"
    )
    wechat_pay_public_key_id: str = Field(
        "",
        description="PUB_KEY_ID_…, comma-separated while it changes (the first is asked for, all are believed);"
        " empty: platform certificates, downloaded and renewed by themselves",
    )
    wechat_pay_public_key: str = Field(
        "", description="pub_key.pem, belongs to wechat_pay_public_key_id; several one after the other"
    )
    wechat_pay_url: str = Field("https://api.mch.weixin.qq.com", description="address of WeChat Pay's API")

    # SMS: templates are JSON, {"reserved.zh-CN": ["CODE", "name of a value", …]}
    aliyun_sms_key_id: str = Field("", description="AccessKey id")
    aliyun_sms_key_secret: SecretStr = Field(SecretStr(""), description="AccessKey secret")
    aliyun_sms_signature: str = Field("", description="approved signature (签名)")
    aliyun_sms_templates: str = Field(
        "", description="JSON: approved template code and its values, by event and language"
    )
    aliyun_sms_report_token: SecretStr = Field(
        SecretStr(""),
        description="secret end of the address that delivery reports, which are not signed, are sent to:"
        " <office>/v1/hooks/aliyun-sms/<token>; empty: none are taken",
    )
    aliyun_sms_url: str = Field("https://dysmsapi.aliyuncs.com", description="address of the SMS API")
    tencent_sms_secret_id: str = Field("", description="SecretId")
    tencent_sms_secret_key: SecretStr = Field(SecretStr(""), description="SecretKey")
    tencent_sms_app_id: str = Field("", description="SmsSdkAppId")
    tencent_sms_signature: str = Field("", description="approved signature (签名)")
    tencent_sms_templates: str = Field(
        "", description="JSON: approved template id and its values in order, by event and language"
    )
    tencent_sms_report_token: SecretStr = Field(
        SecretStr(""), description="the same: <office>/v1/hooks/tencent-sms/<token>"
    )
    tencent_sms_region: str = Field("ap-guangzhou", description="region of the SMS API")
    tencent_sms_url: str = Field("https://sms.tencentcloudapi.com", description="address of the SMS API")
    twilio_account_sid: str = Field("", description="account, AC…")
    twilio_auth_token: SecretStr = Field(
        SecretStr(""), description="auth token; also verifies status call-backs"
    )
    twilio_sender: str = Field("", description="number (+…), sender name, or messaging service (MG…)")
    twilio_status_url: str = Field(
        "", description="where status call-backs reach us, as Twilio sees it; empty: none are asked for"
    )
    twilio_url: str = Field("https://api.twilio.com", description="address of Twilio's API")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SecretFiles(settings_cls)

    @field_validator("cors_origins", "captcha_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )

    @classmethod
    def misspelt(cls, environment: Iterable[str]) -> list[str]:
        """A sentence for each variable FAIRDROP_… that sets nothing, with the name that may be meant."""
        known = {f"FAIRDROP_{name.upper()}" for name in cls.model_fields}
        known |= {f"FAIRDROP_{name.upper()}_FILE" for name in SECRETS}
        told = []
        for name in sorted(set(environment) - known):
            if name.startswith("FAIRDROP_") and not name.startswith(NO_SETTINGS):
                like = get_close_matches(name, known, n=1, cutoff=0.8)
                told.append(f"{name} is no setting" + (f"; {like[0]}?" if like else ""))
        return told

    @cached_property
    def development(self) -> bool:
        return self.env == "development"
