"""The documents of the buyers' API as types: they make the OpenAPI document; the hot path writes the same by hand."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TicketWord = Literal[
    "waiting",
    "claimed",
    "reserved",
    "paid",
    "sold_out",
    "closed",
    "left",
    "expired",
    "cancelled",
    "refunded",
    "lapsed",
]
SaleWord = Literal["scheduled", "line_open", "open", "paused", "sold_out", "closed"]
Instant = Annotated[
    str, Field(description="RFC 3339, UTC, milliseconds", examples=["2026-11-11T12:00:00.000Z"])
]

TOKEN = "AVt0b3d3LTIwMjYBAAABAAC8VQAB3q2-7wAAAAAAAA"  # a made-up ticket, for examples


class Strict(BaseModel):
    """Unknown fields are refused, and "1" is not 1."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TimeOut(BaseModel):
    """The sale clock."""

    now_ms: int = Field(examples=[1_794_398_400_000])


class OrderLineOut(BaseModel):
    kind: Literal["item", "adjustment"]
    sku: str | None
    title: str
    units: int
    unit_minor: int
    amount_minor: int


class OrderOut(BaseModel):
    order_no: str = Field(examples=["01K9ZQ4M6T3W8C5R7B2D"])
    state: Literal["reserved", "paid", "expired", "cancelled", "refunding", "refunded"]
    amount_minor: int = Field(description="minor units of the currency", examples=[59900])
    currency: str = Field(examples=["EUR"])
    lines: list[OrderLineOut]
    pay_by: Instant | None
    extended_s: int = Field(
        0, description="s that were added to pay_by because payment was down; absent: none", examples=[300]
    )


class PaymentOut(BaseModel):
    channel: str | None = Field(examples=["sandbox"])
    state: Literal["none", "starting", "ready", "unknown", "paid", "failed"]
    kind: Literal["redirect", "qr", "sdk"] | None
    url: str | None
    params: Any = None
    expires_at: Instant | None
    code: str | None


class EtaOut(BaseModel):
    p50: int = Field(description="s, as likely earlier as later", examples=[18])
    p90: int = Field(description="s, rarely later", examples=[26])


class NoticeOut(BaseModel):
    """Something around the ticket is out of order."""

    code: str = Field(
        description="payment_delayed, deadline_extended; an unknown one: show the text",
        examples=["payment_delayed"],
    )
    text: dict[str, str] = Field(description="for people, by language: zh-CN, en")


class TicketOut(BaseModel):
    """A buyer's place. Clients treat an unknown state as *keep polling*."""

    ticket: str = Field(description="signed token, at most 128 URL-safe characters", examples=[TOKEN])
    ticket_id: str = Field(
        description="found again in /draw/entries", examples=["48213-3f9a0c11d2e45b6a7788"]
    )
    sale: str = Field(examples=["phone-2026"])
    sku: str = Field(examples=["PH-128"])
    units: int = Field(examples=[1])
    state: TicketWord
    leaving: bool = Field(description="the buyer has asked to leave; the release is not committed yet")
    seq: int = Field(examples=[48213])
    rank: int | None = Field(description="place in the order of service; null until drawn", examples=[1732])
    ahead: int | None = Field(description="at most so many are served before; never rises", examples=[1531])
    standby: bool = Field(description="waits for returned units")
    eta_s: EtaOut | None
    now_ms: int = Field(examples=[1_794_398_400_000])
    poll_after_ms: int | None = Field(description="ask again after this; null: it has ended", examples=[4000])
    message: str | None = Field(
        description="what the shop says to everyone in this sale; on the buyer's own ticket instead, in the buyer's"
        " language, a text about the order that no SMS channel took in time"
    )
    reason: str | None = Field(None, description="why it ended", examples=["unpaid"])
    order: OrderOut | None = Field(description="only with the buyer's identity")
    payment: PaymentOut | None = Field(description="only with the buyer's identity")
    notice: NoticeOut | None = Field(None, description="only with the buyer's identity; absent: none")


class NothingToWaitFor(BaseModel):
    """Sold out: nothing was stored, there is nothing to wait for."""

    ticket: None
    state: Literal["sold_out"]


class DrawCommitment(BaseModel):
    freeze_at: Instant
    beacon: str = Field(
        description="public source of randomness named at publish, or none", examples=["none"]
    )
    seed_hash: str = Field(description="SHA-256 of the seed, hex")


class ItemOut(BaseModel):
    sku: str = Field(examples=["PH-128"])
    title: str
    price_minor: int | None = Field(examples=[59900])
    currency: str | None = Field(examples=["EUR"])
    units: int = Field(description="on sale at publish", examples=[500])
    availability: Literal["plenty", "few", "none"]


class SaleOut(BaseModel):
    id: str = Field(examples=["phone-2026"])
    title: str
    state: SaleWord
    line_opens_at: Instant
    opens_at: Instant
    closes_at: Instant
    limit_per_buyer: int = Field(examples=[1])
    standby: bool
    pay_within_s: int | None = Field(examples=[900])
    pass_mode: Literal["optional", "required"] = Field(alias="pass")
    challenge: Literal["none", "pow", "captcha"]
    audience: list[str] | None
    channels: list[str]
    default_channel: str | None
    message: str | None
    items: list[ItemOut]
    draw: DrawCommitment


class SalesOut(BaseModel):
    data: list[SaleOut]
    next_cursor: str | None


class BoardItem(BaseModel):
    sku: str
    served: int = Field(description="rank served so far")
    line: int = Field(description="tickets in the line, those that left included until they are passed")
    rate_per_s: float | None
    sold_out: bool
    availability: Literal["plenty", "few", "none"]
    drawn: bool


class PollPolicy(BaseModel):
    min_ms: int
    max_ms: int


class BoardOut(BaseModel):
    sale: str
    state: SaleWord
    items: list[BoardItem]
    poll: PollPolicy
    message: str | None
    slowdown: str | None = Field(
        description="why service is slower than planned: payment_down, payment_slow, confirm_lag; null: it is not",
        examples=["payment_down"],
    )


class DrawItem(BaseModel):
    sku: str
    n: int | None = Field(description="tickets in the draw; null before the freeze")
    chain: str | None = Field(description="hash chain over (seq, ticket hash); null before the freeze")
    drawn: bool
    key: str | None = Field(description="SHA-1(seed, chain, beacon), hex; null until told")
    beacon_used: str | None


class Beacon(BaseModel):
    source: str = Field(examples=["none"])
    value: str | None


class DrawOut(BaseModel):
    sale: str
    epoch: int
    freeze_at: Instant
    seed_hash: str = Field(description="SHA-256 of the seed, hex; public from publish")
    seed: str | None = Field(description="hex; null until the sale has opened and every item is drawn")
    trust: Literal["operator", "beacon"] = Field(
        description="without a beacon the operator is trusted not to try seeds"
    )
    beacon: Beacon
    items: list[DrawItem]
    entries: str | None = Field(description="where the ticket hashes are, once they are public")
    algorithm: dict[str, Any]


class Contact(Strict):
    phone: str = Field(pattern=r"^\+[1-9][0-9]{6,14}$", description="E.164", examples=["+4915112345678"])
    language: str | None = Field(
        None, pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}$", description="BCP 47", examples=["zh-CN"]
    )


class ChallengeAnswer(Strict):
    token: str | None = Field(None, max_length=512, description="pow: the token as given")
    nonce: str | None = Field(
        None, max_length=64, description="pow: SHA-256 of `token:nonce` starts with `bits` zero bits"
    )
    response: str | None = Field(None, max_length=4096, description="captcha: what its widget returned")


class PassIn(Strict):
    """Ask for a pass."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"contact": {"phone": "+4915112345678", "language": "de"}, "source": "app"}]
        },
    )

    contact: Contact | None = Field(None, description="where to tell the result; default: claims of the JWT")
    source: str | None = Field(None, max_length=64, description="where the buyer came from")
    challenge: ChallengeAnswer | None = None


class PassOut(BaseModel):
    pass_: str = Field(alias="pass", description="for Authorization: Pass …")
    expires_at: Instant


class Payer(Strict):
    openid: str | None = Field(
        None, min_length=1, max_length=128, description="the payer's id at the channel"
    )


class PayIn(Strict):
    """Ask for a payment link."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"channel": "sandbox"}]}
    )

    channel: str = Field(
        min_length=1, max_length=32, description="one of the sale's channels", examples=["sandbox"]
    )
    return_url: str | None = Field(
        None, min_length=8, max_length=500, description="begins with one of the sale's return_urls"
    )
    payer: Payer | None = None


class HealthOut(BaseModel):
    status: Literal["ok"]


class ReadyOut(BaseModel):
    status: Literal["ready"]
    reasons: list[str] = Field(description="what is not as it should be; the front serves nevertheless")
