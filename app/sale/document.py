"""What a sale is, as an operator writes it: the document, its limits, and what may still change after publish.

`SaleIn` (JSON or YAML) → `settle` → `Terms`, with every default filled in and every time in UTC. A refusal is a
`Refusal` 422 whose `errors` name each path and code. Nothing here touches a store.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.config import JsonDict

from app.errors import Refusal

# ---- limits: everything a document may hold has one -----------------------------------------------------------------
SALE_ID = r"^[a-z0-9][a-z0-9-]{0,47}$"
SKU = r"^[A-Za-z0-9._-]{1,64}$"
TITLE_MAX = 200  # characters; a title is one line on a phone
MESSAGE_MAX = 500  # characters; shown above the line
ITEMS_MAX = 50  # every front door reads each item ten times a second
UNITS_MAX = 10_000_000  # a sale is small against its crowd; ten million fills one outcome string of 10 MB
PRICE_MINOR_MAX = 1_000_000_000_000  # with 100 units an order stays far below 2**53, exact in any JSON reader
LIMIT_PER_BUYER_MAX = 100
LINE_MAX_MAX = 10_000_000  # waiting tickets of an item
LINE_MAX_DEFAULT = 1_000_000
RATE_MIN, RATE_MAX = 0.001, 1_000_000.0  # tickets per s; Redis counts in thousandths
PAY_WITHIN_MIN_S, PAY_WITHIN_MAX_S, PAY_WITHIN_DEFAULT_S = 60, 86_400, 900
DRAW_FREEZE_MAX_S, DRAW_FREEZE_DEFAULT_S = 3_600, 10
BEACON_WAIT_MAX_S, BEACON_WAIT_DEFAULT_S = 3_600, 60
CHANNELS_MAX, AUDIENCE_MAX, RETURN_URLS_MAX = 10, 100, 20
RETURN_URL_MAX = 500  # characters
RUNS_MAX = timedelta(
    days=31
)  # from the line's opening to the close; outcome strings and streams live that long
EARLIEST, LATEST = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
YAML_MAX = 16_384  # bytes, as for a request body

PassMode = Literal["optional", "required"]
Challenge = Literal["none", "pow", "captcha"]

_CURRENCIES = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLF CLP CNY
COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR
IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR
MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD
SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VES VND VUV WST XAF XCD XCG
XOF XPF YER ZAR ZMW ZWG
"""
CURRENCIES = frozenset(_CURRENCIES.split())  # ISO 4217, active codes


def _line_of_text(value: str) -> str:
    """Refuse what Postgres cannot store or a terminal would obey: control characters and lone surrogates."""
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError("control characters are not allowed")
    if value != value.strip():
        raise ValueError("spaces at the ends are not allowed")
    return value


Line = Annotated[str, AfterValidator(_line_of_text)]
Title = Annotated[Line, StringConstraints(min_length=1, max_length=TITLE_MAX)]
SaleId = Annotated[str, StringConstraints(pattern=SALE_ID)]
Sku = Annotated[str, StringConstraints(pattern=SKU)]
Message = Annotated[Line, StringConstraints(max_length=MESSAGE_MAX)]
Time = Annotated[
    str,
    StringConstraints(min_length=10, max_length=40),
    Field(
        description="RFC 3339, any offset; without an offset only where the document has `time_zone`",
        examples=["2026-11-11T20:00:00+08:00"],
    ),
]
Currency = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Z]{3}$"),
    Field(description="ISO 4217", examples=["EUR", "CNY", "JPY"]),
]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,31}$")]
Beacon = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-zA-Z0-9:._/?=&-]{0,199}$"),
    Field(
        description="the public random value that the draw waits for, or `none` (the draw trusts the operator): "
        "an https address that serves it (its JSON `randomness`, else SHA-256 of the body), or a word"
    ),
]
Rate = Annotated[float, Field(ge=RATE_MIN, le=RATE_MAX, allow_inf_nan=False)]
PayWithin = Annotated[
    int,
    Field(
        ge=1,
        le=PAY_WITHIN_MAX_S,
        description=f"s; at least {PAY_WITHIN_MIN_S}, in development at least 1 so that a demo need not wait",
    ),
]
Units = Annotated[int, Field(ge=1, le=UNITS_MAX)]


class _Strict(BaseModel):
    """Unknown fields are refused, and "1" is not 1."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ItemIn(_Strict):
    """One SKU on sale."""

    sku: Sku
    title: Title
    price_minor: int = Field(
        ge=0, le=PRICE_MINOR_MAX, description="in minor units of the currency; 0: a gift"
    )
    currency: Currency
    units: Units


class _Fields(_Strict):
    """Every field of a sale but its id, none required: what PATCH takes."""

    title: Title | None = None
    time_zone: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="IANA name; times without an offset are read there"
    )
    line_opens_at: Time | None = None
    opens_at: Time | None = None
    closes_at: Time | None = None
    draw_freeze_s: int | None = Field(
        None,
        ge=0,
        le=DRAW_FREEZE_MAX_S,
        description=f"s before the opening at which the draw's entries are fixed; default {DRAW_FREEZE_DEFAULT_S}, "
        "less where the line opens later",
    )
    beacon: Beacon | None = None
    beacon_wait_s: int | None = Field(None, ge=0, le=BEACON_WAIT_MAX_S, description="s after the opening")
    pay_within_s: PayWithin | None = None
    limit_per_buyer: int | None = Field(None, ge=1, le=LIMIT_PER_BUYER_MAX, description="units")
    rate_per_s: Rate | None = Field(None, description="tickets served per s; null: as fast as stock allows")
    standby: bool | None = Field(
        None, description="the line waits for returned units; needs limit_per_buyer = 1"
    )
    line_max: int | None = Field(None, ge=1, le=LINE_MAX_MAX, description="waiting tickets of an item")
    pass_: PassMode | None = Field(None, alias="pass")
    challenge: Challenge | None = None
    audience: (
        Annotated[
            list[Annotated[Line, StringConstraints(min_length=1, max_length=64)]],
            Field(max_length=AUDIENCE_MAX),
        ]
        | None
    ) = Field(None, description="groups of buyers (JWT claim `groups`) that may take part; null: everyone")
    channels: Annotated[list[Word], Field(min_length=1, max_length=CHANNELS_MAX)] | None = None
    default_channel: Word | None = Field(None, description="null: no payment is started by itself")
    return_urls: (
        Annotated[
            list[Annotated[Line, StringConstraints(min_length=8, max_length=RETURN_URL_MAX)]],
            Field(max_length=RETURN_URLS_MAX),
        ]
        | None
    ) = Field(None, description="beginnings that a payment's return_url may have")
    items: Annotated[list[ItemIn], Field(min_length=1, max_length=ITEMS_MAX)] | None = None


_EXAMPLE_ITEM: JsonDict = {
    "sku": "PH-128",
    "title": "Phone 128 GB",
    "price_minor": 59900,
    "currency": "EUR",
    "units": 500,
}


class SaleIn(_Fields):
    """A sale as an operator writes it. With `copy_of`, what is not given is taken from that sale."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "required": ["id", "line_opens_at", "opens_at", "closes_at"],
            "examples": [
                {
                    "id": "phone-2026",
                    "title": "Phone, first batch",
                    "time_zone": "Asia/Shanghai",
                    "line_opens_at": "2026-11-11T19:50:00",
                    "opens_at": "2026-11-11T20:00:00",
                    "closes_at": "2026-11-11T22:00:00",
                    "items": [_EXAMPLE_ITEM],
                }
            ],
        },
    )

    id: SaleId
    copy_of: SaleId | None = None


class SalePatch(_Fields):
    """The fields to change; fields left out stay, null puts a field back to its default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"title": "Phone, first batch", "rate_per_s": 50}]},
    )


@dataclass(frozen=True)
class ItemTerms:
    sku: str
    title: str
    price_minor: int
    currency: str
    units: int


@dataclass(frozen=True)
class Terms:
    """A whole, valid sale: what is stored, and what a later change is compared with. Times are UTC."""

    id: str
    title: str
    time_zone: str | None
    line_opens_at: datetime
    opens_at: datetime
    closes_at: datetime
    draw_freeze_s: int
    beacon: str
    beacon_wait_s: int
    pay_within_s: int
    limit_per_buyer: int
    rate_per_s: float | None
    standby: bool
    line_max: int
    pass_mode: PassMode
    challenge: Challenge
    audience: tuple[str, ...] | None
    channels: tuple[str, ...]
    default_channel: str | None
    return_urls: tuple[str, ...]
    items: tuple[ItemTerms, ...]
    copy_of: str | None = None

    @property
    def freeze_at(self) -> datetime:
        return self.opens_at - timedelta(seconds=self.draw_freeze_s)


# ---- times ----------------------------------------------------------------------------------------------------------
_TIME = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)[Tt ](?P<clock>\d\d:\d\d)(?P<seconds>:\d\d)?(?P<part>\.\d{1,9})?"
    r"(?P<zone>[Zz]|[+-]\d\d:\d\d)?"
)


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def read_time(text: str, zone: str | None) -> datetime | str:
    """The moment a text names, in UTC with milliseconds; else the code that says why it names none.

    A time without an offset is read in `zone`: one that the clocks skip, or show twice, is refused rather than guessed.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        return "not_a_time"
    part = (found["part"] or ".0")[1:4].ljust(3, "0")
    try:
        naive = datetime.fromisoformat(f"{found['day']}T{found['clock']}{found['seconds'] or ':00'}.{part}")
        if found["zone"]:
            offset = "+00:00" if found["zone"] in "Zz" else found["zone"]
            moment = datetime.fromisoformat(f"{naive.isoformat(timespec='milliseconds')}{offset}").astimezone(
                UTC
            )
        elif zone is None:
            return "time_without_zone"
        else:
            local = naive.replace(tzinfo=ZoneInfo(zone))
            moment = local.astimezone(UTC)
            if moment.astimezone(local.tzinfo).replace(tzinfo=None) != naive:
                return "time_skipped"
            if local.utcoffset() != local.replace(fold=1).utcoffset():
                return "time_ambiguous"
    except (ValueError, OverflowError):
        return "not_a_time"
    return moment if EARLIEST <= moment < LATEST else "out_of_range"


def format_time(moment: datetime | None) -> str | None:
    """A moment as the API shows it: UTC, milliseconds, Z."""
    if moment is None:
        return None
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def to_ms(moment: datetime) -> int:
    """Unix milliseconds, exact."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


# ---- validation -----------------------------------------------------------------------------------------------------
def refuse(errors: Sequence[Mapping[str, str]]) -> Refusal:
    """422 with every path and code; the problem's own code is `time_without_zone` if that is among them."""
    code = "time_without_zone" if any(e["code"] == "time_without_zone" for e in errors) else "invalid"
    return Refusal(422, code, says(errors), errors=errors)


_SAYS = {  # what is wrong, for people; a code that is not here says it itself
    "missing": "is missing",
    "not_a_time": "is no RFC 3339 time",
    "time_without_zone": "has no offset; give it one, or the document a time_zone",
    "time_skipped": "does not exist there: the clocks are put forward",
    "time_ambiguous": "is there twice: the clocks are put back; give it an offset",
    "out_of_range": "is too far away",
    "unknown_time_zone": "is no IANA name",
    "before_line_opens": "comes before the line opens",
    "not_after_opening": "is not after the opening",
    "runs_too_long": f"is more than {RUNS_MAX.days} days after the line opens",
    "standby_needs_limit_1": "needs limit_per_buyer = 1; set one of the two",
    "challenge_needs_pass": "is asked for with the pass; set pass to required",
    "not_in_channels": "is none of `channels`",
    "not_an_address": "is no https address",
    "not_unique": "is there twice",
    "unknown_currency": "is no active ISO 4217 code",
    "greater_than_equal": "is too small",
    "has_passed": "has passed and stays",
    "in_the_past": "is in the past",
    "fixed_after_publish": "stays as it was published",
    "sale_closed": "stays: the sale is over",
}


def says(errors: Sequence[Mapping[str, str]]) -> str:
    """The same errors as one sentence."""
    return "; ".join(f"{e['path']}: {_SAYS.get(e['code'], e['code'])}" for e in errors[:5])


@dataclass(frozen=True)
class House:
    """What a document's limits and defaults depend on here: the settings."""

    development: bool = False  # pay_within_s may be short, so that a demo need not wait
    channel: str = "sandbox"  # the payment channel of a sale that names none


def settle(given: SaleIn, base: Terms | None = None, house: House = House()) -> Terms:
    """Fill in what is missing (from `base`, the sale of copy_of, else the defaults) and hold everything to its limits.

    Refusal 422: with one {path, code} for each thing that is wrong.
    """
    return _settle(given.id, given.copy_of, given, given.model_fields_set, base, house, fresh=True)


def amend(patch: SalePatch, now: Terms, house: House = House()) -> Terms:
    """The sale that a PATCH asks for, whole and valid; whether it may still change is `locked`'s business.

    Refusal 422: the sale would not hold.
    """
    return _settle(now.id, now.copy_of, patch, patch.model_fields_set, now, house, fresh=False)


def _settle(
    sale_id: str,
    copy_of: str | None,
    given: _Fields,
    given_names: set[str],
    base: Terms | None,
    house: House,
    *,
    fresh: bool,
) -> Terms:
    errors: list[dict[str, str]] = []

    def wrong(path: str, code: str) -> None:
        errors.append({"path": path, "code": code})

    def chosen(name: str, default: Any) -> Any:
        """The given value; null and missing mean the base's value (missing only) or the default."""
        value = getattr(given, name)
        if value is not None:
            return value
        if name not in given_names and base is not None:
            kept = getattr(base, "pass_mode" if name == "pass_" else name)
            return list(kept) if isinstance(kept, tuple) else kept
        return default

    zone: str | None = chosen("time_zone", None)
    if zone is not None and zone not in _zones():
        wrong("time_zone", "unknown_time_zone")
        zone = None
    zone_told = bool(errors)

    times: dict[str, datetime] = {}
    for name in ("line_opens_at", "opens_at", "closes_at"):
        text: str | None = getattr(given, name)
        if text is not None:
            moment = read_time(text, zone)
            if isinstance(moment, str):
                if not (zone_told and moment == "time_without_zone"):  # its zone is what is wrong
                    wrong(name, moment)
            else:
                times[name] = moment
        elif not fresh and base is not None and name not in given_names:
            times[name] = getattr(base, name)
        else:
            wrong(name, "missing")

    title: str | None = chosen("title", None)
    if title is None:
        wrong("title", "missing")
    items = _items_of(given, given_names, base, wrong)
    limit: int = chosen("limit_per_buyer", 1)
    standby: bool = chosen("standby", limit == 1)
    if standby and limit != 1:
        wrong("standby", "standby_needs_limit_1")
    pass_mode: PassMode = chosen("pass_", "optional")
    challenge: Challenge = chosen("challenge", "none")
    if challenge != "none" and pass_mode != "required":
        wrong("challenge", "challenge_needs_pass")
    pay_within_s: int = chosen("pay_within_s", PAY_WITHIN_DEFAULT_S)
    if pay_within_s < PAY_WITHIN_MIN_S and not house.development:
        wrong("pay_within_s", "greater_than_equal")
    channels: list[str] = chosen("channels", [house.channel])
    default_channel: str | None = chosen("default_channel", None)
    if len(set(channels)) != len(channels):
        wrong("channels", "not_unique")
    if default_channel is not None and default_channel not in channels:
        wrong("default_channel", "not_in_channels")
    beacon: str = chosen("beacon", "none")
    if "://" in beacon and not is_web_address(beacon):
        wrong("beacon", "not_an_address")
    audience: list[str] | None = chosen("audience", None)
    if audience is not None and len(set(audience)) != len(audience):
        wrong("audience", "not_unique")
    return_urls: list[str] = chosen("return_urls", [])
    for at, url in enumerate(return_urls):
        if not is_web_address(url):
            wrong(f"return_urls.{at}", "not_an_address")
    rate: float | None = chosen("rate_per_s", None)

    freeze_s = 0
    if len(times) == 3:
        if times["line_opens_at"] > times["opens_at"]:
            wrong("opens_at", "before_line_opens")
        elif times["opens_at"] >= times["closes_at"]:
            wrong("closes_at", "not_after_opening")
        elif times["closes_at"] - times["line_opens_at"] > RUNS_MAX:
            wrong("closes_at", "runs_too_long")
        gap_s = max(0, int((times["opens_at"] - times["line_opens_at"]).total_seconds()))
        default_freeze_s = min(DRAW_FREEZE_DEFAULT_S, gap_s)
        # A copy has other times: only a freeze that was asked for must fit them.
        kept = base.draw_freeze_s if base is not None else default_freeze_s
        freeze_s = (
            given.draw_freeze_s
            if given.draw_freeze_s is not None
            else (default_freeze_s if "draw_freeze_s" in given_names else min(kept, gap_s))
        )
        if freeze_s > gap_s:
            wrong("draw_freeze_s", "before_line_opens")
    if errors:
        raise refuse(errors)
    assert title is not None
    return Terms(
        id=sale_id,
        title=title,
        time_zone=zone,
        line_opens_at=times["line_opens_at"],
        opens_at=times["opens_at"],
        closes_at=times["closes_at"],
        draw_freeze_s=freeze_s,
        beacon=beacon,
        beacon_wait_s=chosen("beacon_wait_s", BEACON_WAIT_DEFAULT_S),
        pay_within_s=pay_within_s,
        limit_per_buyer=limit,
        rate_per_s=None if rate is None else float(rate),
        standby=standby,
        line_max=chosen("line_max", LINE_MAX_DEFAULT),
        pass_mode=pass_mode,
        challenge=challenge,
        audience=None if audience is None else tuple(audience),
        channels=tuple(channels),
        default_channel=default_channel,
        return_urls=tuple(return_urls),
        items=items,
        copy_of=copy_of,
    )


def _items_of(given: _Fields, given_names: set[str], base: Terms | None, wrong: Any) -> tuple[ItemTerms, ...]:
    if given.items is None:
        if "items" not in given_names and base is not None:
            return base.items
        wrong("items", "missing")
        return ()
    seen: set[str] = set()
    for at, item in enumerate(given.items):
        if item.sku in seen:
            wrong(f"items.{at}.sku", "not_unique")
        seen.add(item.sku)
        if item.currency not in CURRENCIES:
            wrong(f"items.{at}.currency", "unknown_currency")
    return tuple(ItemTerms(i.sku, i.title, i.price_minor, i.currency, i.units) for i in given.items)


def is_web_address(url: str) -> bool:
    """https anywhere, http only to this machine; no user name, no fragment."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if (
        parts.username is not None
        or parts.fragment
        or not parts.hostname
        or port == 0
        or not url.isascii()
        or " " in url
    ):
        return False
    return parts.scheme == "https" or (
        parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    )


# ---- after publish --------------------------------------------------------------------------------------------------
# Free until the sale is closed. Everything else that is not named in `locked` is fixed by publish.
FREE_AFTER_PUBLISH = frozenset(
    {"title", "rate_per_s", "standby", "line_max", "closes_at", "pay_within_s", "time_zone"}
)


def locked(old: Terms, new: Terms, state: str, now: datetime) -> list[dict[str, str]]:
    """What of a change comes too late, as {path, code}; empty: all of it may be done.

    draft: nothing. Published: opening times until they have passed, prices until the line opens, FREE_AFTER_PUBLISH
    always. Closed or settled: everything.
    """
    if state == "draft":
        return []
    changed = [f.name for f in fields(Terms) if getattr(old, f.name) != getattr(new, f.name)]
    if state in ("closed", "settled"):
        return [{"path": _path(name), "code": "sale_closed"} for name in changed]
    late: list[dict[str, str]] = []
    for name in changed:
        match name:
            case "line_opens_at" | "opens_at":
                if getattr(old, name) <= now:
                    late.append({"path": name, "code": "has_passed"})
                elif getattr(new, name) <= now:
                    late.append({"path": name, "code": "in_the_past"})
            case "closes_at":
                if new.closes_at <= now:
                    late.append({"path": name, "code": "in_the_past"})
            case "items":
                late += _locked_items(old, new, now)
            case _ if name not in FREE_AFTER_PUBLISH:
                late.append({"path": _path(name), "code": "fixed_after_publish"})
    return late


def _path(name: str) -> str:
    return "pass" if name == "pass_mode" else name


def _locked_items(old: Terms, new: Terms, now: datetime) -> list[dict[str, str]]:
    if [i.sku for i in old.items] != [i.sku for i in new.items]:
        return [{"path": "items", "code": "fixed_after_publish"}]
    late: list[dict[str, str]] = []
    for at, (before, after) in enumerate(zip(old.items, new.items, strict=True)):
        for part in ("title", "currency", "units"):
            if getattr(before, part) != getattr(after, part):
                late.append({"path": f"items.{at}.{part}", "code": "fixed_after_publish"})
        if before.price_minor != after.price_minor and old.line_opens_at <= now:
            late.append({"path": f"items.{at}.price_minor", "code": "has_passed"})
    return late


def keep_freeze(old: Terms, new: Terms, now: datetime) -> Terms:
    """The new sale, with a freeze that has already happened left where it was.

    A later opening must not let anyone into a draw whose entries are public.
    """
    if new.opens_at == old.opens_at or old.freeze_at > now:
        return new
    return replace(new, draw_freeze_s=-((old.freeze_at - new.opens_at) // timedelta(seconds=1)))


# ---- YAML -----------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types only: no dates, no base-60 numbers, `no` is a word; no aliases, no repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in the base

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is repeated or no text", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?[0-9]+\.[0-9]+(?:[eE][-+]?[0-9]+)?$", "-+0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def read_yaml(text: str) -> dict[str, Any]:
    """A sale's YAML as the JSON object to send. ValueError: one sentence that says where it is wrong."""
    if len(text.encode("utf-8", "replace")) > YAML_MAX:
        raise ValueError(f"the document is larger than {YAML_MAX} bytes")
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise ValueError("a sale is a mapping of fields")
    return found
