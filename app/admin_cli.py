"""The operators' commands: they talk to a running office over HTTP, as any client does.

The office is FAIRDROP_OFFICE_URL with FAIRDROP_OPERATOR_KEY, else what a running `up` wrote into urls.json. Exit
status: 0 fine, 1 the office refused or the checked thing failed, 2 bad usage, no office, no key. `--json` prints the
office's own answer and nothing else.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.errors import CannotStart

ASK_WITHIN_S = 30.0  # an audit of a large sale reads every order
PAGE = 500  # rows asked for at once

Json = Annotated[bool, typer.Option("--json", help="Print the office's answer as JSON, and nothing else.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where a running `up` wrote urls.json. [default: .fairdrop]")
]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; kept in the journal.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")]
Key = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="Repeat a command safely; the same key has one effect."),
]
SaleArgument = Annotated[str, typer.Argument(metavar="SALE", help="The sale's id.")]

sale = typer.Typer(help="Draft, publish, pause, resume, close and list sales.", no_args_is_help=True)
key = typer.Typer(help="Make, list and revoke operators' keys (admin).", no_args_is_help=True)
webhooks = typer.Typer(
    help="Make, list, rotate, replay, enable and delete the shop's endpoints (admin).", no_args_is_help=True
)
sms = typer.Typer(help="Look at the texts that buyers get.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to `fairdrop`."""
    app.add_typer(sale, name="sale")
    app.add_typer(key, name="key")
    app.add_typer(webhooks, name="webhooks")
    app.add_typer(sms, name="sms")
    app.command("providers")(providers)
    app.command("bills")(bills)
    app.command("audit")(audit)
    app.command("trace")(trace)


class Office:
    """A client of the office."""

    def __init__(self, data_dir: Path | None) -> None:
        import httpx

        url, operator_key = _where(data_dir)
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {operator_key}"},
            timeout=ASK_WITHIN_S,
            trust_env=False,
        )
        self._unreachable: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
        self.url = url

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One call: the answer's JSON. Refused: exit 1, or 2 if it is the key. CannotStart: nobody answers."""
        status, answer, _ = self.look(method, path, body, params=params, headers=headers)
        if status >= 400:
            refused(status, answer)
        return answer

    def look(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, str | None]:
        """One call, whatever the answer: status, JSON, ETag."""
        given = {name: value for name, value in (params or {}).items() if value not in (None, False)}
        try:
            answer = self._http.request(method, path, json=body, params=given, headers=dict(headers or {}))
        except self._unreachable as error:
            raise CannotStart(f"no office answers at {self.url}: {error or type(error).__name__}") from error
        try:
            found = answer.json() if answer.content else None
        except ValueError:
            raise CannotStart(
                f"{self.url} is no office: it answers {answer.status_code} without JSON"
            ) from None
        return answer.status_code, found, answer.headers.get("etag")

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> Any:
        """A change, under a key of its own unless one is given."""
        headers = {"Idempotency-Key": idempotency_key or f"cli-{secrets.token_hex(12)}"}
        params = {"reason": reason, "dry_run": "true" if dry_run else None}
        return self.ask("POST", path, body, params=params, headers=headers)

    def all_of(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """Every row of a list."""
        rows: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = self.ask("GET", path, params={**params, "limit": PAGE, "cursor": cursor})
            rows += page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return rows


def _where(data_dir: Path | None) -> tuple[str, str]:
    """The office's address and a key for it. CannotStart: one of them is missing."""
    from app.settings import Settings
    from app.supervisor import read_urls

    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    url, operator_key = settings.office_url, settings.operator_key.get_secret_value()
    if url and operator_key:
        return url, operator_key
    if url and not (settings.data_dir / "urls.json").is_file():
        raise CannotStart("FAIRDROP_OPERATOR_KEY is missing: the office wants a key")
    urls = read_urls(settings.data_dir)
    return url or str(urls["office"]), operator_key or str(urls["operator_key"])


def refused(status: int, problem: Any) -> None:
    """Say what the office refused, and end."""
    problem = problem if isinstance(problem, dict) else {}
    told = f"{problem.get('code', status)}: {problem.get('detail') or problem.get('title') or 'refused'}"
    sys.stderr.write(f"fairdrop: {told}\n")
    for error in problem.get("errors", ()):
        sys.stderr.write(f"  {error.get('path')}: {error.get('code')}\n")
    raise typer.Exit(2 if status in (401, 403) else 1)


def show(answer: Any, as_json: bool, draw: Callable[[], None]) -> None:
    """The answer for a program, or for a person."""
    if as_json:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=2) + "\n")
    else:
        draw()


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, bad: Sequence[bool] = ()
) -> None:
    """Rows for a person; `bad` rows stand out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", header_style="bold")
    for name in columns:
        drawn.add_column(name, overflow="fold")
    for at, row in enumerate(rows):
        style = "bold red" if at < len(bad) and bad[at] else None
        drawn.add_row(*(Text("" if cell is None else str(cell)) for cell in row), style=style)
    Console(width=None if sys.stdout.isatty() else 160).print(drawn)


# ---- sale -----------------------------------------------------------------------------------------------------------


def show_sale(found: Mapping[str, Any], as_json: bool) -> None:
    def draw() -> None:
        facts = [
            (name, found[name])
            for name in (
                "id", "title", "state", "version", "line_opens_at", "opens_at", "closes_at", "rate_per_s",
                "limit_per_buyer", "standby", "pay_within_s", "message", "seed_hash",
            )
        ]  # fmt: skip
        table("", ("field", "value"), facts)
        table(
            "Items",
            ("sku", "title", "price", "units", "reserved", "sold"),
            [
                (
                    i["sku"],
                    i["title"],
                    f"{i['price_minor']} {i['currency']} minor",
                    i["units"],
                    i["reserved"],
                    i["sold"],
                )
                for i in found["items"]
            ],
        )

    show(dict(found), as_json, draw)


@sale.command("apply")
def sale_apply(
    file: Annotated[Path, typer.Argument(help="YAML or JSON; - reads standard input.")],
    publish: Annotated[bool, typer.Option("--publish", help="Publish the draft as well.")] = False,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Make the sale of a document, or change it to what the document says."""
    from app.sale.document import read_yaml

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        document = read_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise CannotStart(f"{file}: {error}") from error
    sale_id = document.get("id")
    if not isinstance(sale_id, str) or not sale_id:
        raise CannotStart(f"{file}: `id` is missing")
    office = Office(data_dir)
    path = f"/v1/admin/sales/{_quoted(sale_id)}"
    status, current, etag = office.look("GET", path)
    if status == 404 and current.get("code") == "no_such_sale":
        found = office.post(
            "/v1/admin/sales", document, idempotency_key=idempotency_key, reason=reason, dry_run=dry_run
        )
    elif status == 422 or status == 404:
        # Not even an id: let the office say what is wrong with the whole document.
        found = office.post("/v1/admin/sales", document, dry_run=dry_run)
    elif status >= 400:
        refused(status, current)
    else:
        change = {name: value for name, value in document.items() if name not in ("id", "copy_of")}
        found = office.ask(
            "PATCH",
            path,
            change,
            params={"reason": reason, "dry_run": "true" if dry_run else None},
            headers={"If-Match": etag or "*"},
        )
    if publish and not dry_run and found["state"] == "draft":
        found = office.post(f"{path}/publish", reason=reason)
    show_sale(found, as_json)


def _quoted(part: str) -> str:
    from urllib.parse import quote

    return quote(part, safe="")


def _switch(action: str, does: str) -> None:
    """One command that turns a published sale."""

    @sale.command(action, help=does)
    def turn(
        sale_id: SaleArgument,
        reason: Reason = None,
        dry_run: DryRun = False,
        idempotency_key: Key = None,
        as_json: Json = False,
        data_dir: DataDir = None,
    ) -> None:
        found = Office(data_dir).post(
            f"/v1/admin/sales/{_quoted(sale_id)}/{action}",
            idempotency_key=idempotency_key,
            reason=reason,
            dry_run=dry_run,
        )
        show_sale(found, as_json)


_switch("publish", "Put a draft on every front door, and commit to the seed of its draw.")
_switch("pause", "Stop admission; joining, payments, releases and deadlines go on.")
_switch("resume", "Go on after a pause.")
_switch("close", "Close for good: whoever waits is told so, whoever holds a unit may finish.")

SaleState = Literal["draft", "scheduled", "open", "paused", "closed", "settled"]


@sale.command("list")
def sale_list(
    state: Annotated[SaleState | None, typer.Option("--state", help="Only these.")] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """All sales, newest first."""
    rows = Office(data_dir).all_of("/v1/admin/sales", state=state)
    show(
        {"data": rows},
        as_json,
        lambda: table(
            "",
            ("id", "title", "state", "opens", "closes", "units", "reserved", "sold"),
            [
                (
                    s["id"],
                    s["title"],
                    s["state"],
                    s["opens_at"],
                    s["closes_at"],
                    *(sum(item[name] for item in s["items"]) for name in ("units", "reserved", "sold")),
                )
                for s in rows
            ],
        ),
    )


# ---- key ------------------------------------------------------------------------------------------------------------


@key.command("create")
def key_create(
    name: Annotated[str, typer.Argument(help="Who will hold it.")],
    role: Annotated[Literal["viewer", "operator", "admin"], typer.Option("--role")] = "viewer",
    reason: Reason = None,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Make a key. It is shown this once."""
    made = Office(data_dir).post(
        "/v1/admin/keys", {"name": name, "role": role}, idempotency_key=idempotency_key, reason=reason
    )
    show(
        made,
        as_json,
        lambda: table("", ("id", "name", "role", "key"), [[made[c] for c in ("id", "name", "role", "key")]]),
    )


@key.command("list")
def key_list(as_json: Json = False, data_dir: DataDir = None) -> None:
    """Keys that work; never the keys themselves."""
    rows = Office(data_dir).all_of("/v1/admin/keys")
    columns = ("id", "name", "role", "created_at")
    show(
        {"data": rows}, as_json, lambda: table("", columns, [[row[name] for name in columns] for row in rows])
    )


@key.command("revoke")
def key_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id (`fairdrop key list`).")],
    reason: Reason = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """End a key, at once."""
    Office(data_dir).ask("DELETE", f"/v1/admin/keys/{_quoted(key_id)}", params={"reason": reason})
    show({"id": key_id, "revoked": True}, as_json, lambda: table("", ("id", "revoked"), [(key_id, "yes")]))


# ---- webhooks -------------------------------------------------------------------------------------------------------

EndpointArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The endpoint's id (`fairdrop webhooks list`).")
]


def _show_endpoint(found: Mapping[str, Any], as_json: bool) -> None:
    columns = ("id", "url", "events", "secret_before_until", "disabled_at", "secret")
    rows = [(name, found[name]) for name in columns if found.get(name) is not None]
    show(dict(found), as_json, lambda: table("", ("field", "value"), rows))


@webhooks.command("create")
def webhooks_create(
    url: Annotated[str, typer.Argument(metavar="URL", help="https; http only to this machine.")],
    events: Annotated[list[str], typer.Option("--event", help="Event type to push; may be repeated.")],
    reason: Reason = None,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Push events to an address. Its secret is shown this once."""
    made = Office(data_dir).post(
        "/v1/admin/webhooks", {"url": url, "events": events}, idempotency_key=idempotency_key, reason=reason
    )
    _show_endpoint(made, as_json)


@webhooks.command("list")
def webhooks_list(as_json: Json = False, data_dir: DataDir = None) -> None:
    """Endpoints; never their secrets."""
    rows = Office(data_dir).all_of("/v1/admin/webhooks")
    columns = ("id", "url", "events", "created_at", "disabled_at", "disabled_why")
    show(
        {"data": rows},
        as_json,
        lambda: table(
            "",
            columns,
            [[row[name] if name != "events" else ", ".join(row[name]) for name in columns] for row in rows],
            bad=[row["disabled_at"] is not None for row in rows],
        ),
    )


@webhooks.command("rotate")
def webhooks_rotate(
    endpoint_id: EndpointArgument,
    overlap_s: Annotated[
        int | None, typer.Option(min=0, help="s in which the old secret signs too. [default: a day]")
    ] = None,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Sign with a new secret; it is shown this once."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{_quoted(endpoint_id)}/rotate",
        {} if overlap_s is None else {"overlap_s": overlap_s},
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    _show_endpoint(found, as_json)


@webhooks.command("replay")
def webhooks_replay(
    endpoint_id: EndpointArgument,
    after: Annotated[
        str, typer.Option("--after", help="A time with its offset (from then on), or a cursor of the feed.")
    ],
    until: Annotated[str | None, typer.Option("--until", help="A time with its offset (before it).")] = None,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Push events of the past again, whatever became of them."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{_quoted(endpoint_id)}/replay",
        {"after": after, "until": until},
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    show(found, as_json, lambda: table("", ("id", "replayed"), [(found["id"], found["replayed"])]))


@webhooks.command("enable")
def webhooks_enable(
    endpoint_id: EndpointArgument,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Tell an endpoint again that answered 410 Gone; what it missed of the last 72 h is pushed."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{_quoted(endpoint_id)}/enable",
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    show(found, as_json, lambda: table("", ("id", "due again"), [(found["id"], found["due"])]))


@webhooks.command("delete")
def webhooks_delete(
    endpoint_id: EndpointArgument, reason: Reason = None, as_json: Json = False, data_dir: DataDir = None
) -> None:
    """Tell an address no more."""
    Office(data_dir).ask("DELETE", f"/v1/admin/webhooks/{_quoted(endpoint_id)}", params={"reason": reason})
    show(
        {"id": endpoint_id, "deleted": True},
        as_json,
        lambda: table("", ("id", "deleted"), [(endpoint_id, "yes")]),
    )


# ---- sms -------------------------------------------------------------------------------------------------------------


@sms.command("preview")
def sms_preview(
    event: Annotated[
        str | None,
        typer.Option("--event", help="reserved, paid, expired, cancelled, refunded. [default: all]"),
    ] = None,
    language: Annotated[str | None, typer.Option("--language", help="zh-CN or en. [default: both]")] = None,
    sale_id: Annotated[
        str | None,
        typer.Option("--sale", help="Titles, price and deadline of this sale's first item, from the office."),
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Each text as buyers get it, what it costs, and the template that each supplier in use sends it with.

    Suppliers and templates are those of this shell's FAIRDROP_* settings. Exit status 2: a template is missing.
    """
    from app import texts
    from app.providers.registry import sms_templates
    from app.settings import Settings

    for given, known in ((event, tuple(texts.KINDS)), (language, texts.LANGUAGES)):
        if given is not None and given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}")
    row: dict[str, Any] = {
        "sale_title": "Phone, first batch", "item_title": "Phone, 128 GB", "units": 1, "amount_minor": 499900,
        "currency": "CNY", "pay_within_s": 900, "order_no": "0123456789ABCDEFGHIJKLMN",
    }  # fmt: skip
    if sale_id is not None:
        found = Office(data_dir).ask("GET", f"/v1/admin/sales/{_quoted(sale_id)}")
        item = found["items"][0]
        row |= {
            "sale_title": found["title"], "item_title": item["title"], "amount_minor": item["price_minor"],
            "currency": item["currency"], "pay_within_s": found["pay_within_s"],
        }  # fmt: skip
    suppliers = sms_templates(Settings() if data_dir is None else Settings(data_dir=data_dir))
    previews: list[dict[str, Any]] = []
    for kind in texts.KINDS if event is None else (event,):
        for spoken in texts.LANGUAGES if language is None else (language,):
            body = texts.render(kind, spoken, row)
            size = texts.size_of(body)
            sent: dict[str, dict[str, Any]] = {}
            for name, templates in suppliers.items():
                template = templates.named(kind, spoken) if templates is not None else None
                way = "text" if templates is None else "none" if template is None else "template"
                sent[name] = {"way": way}
                if template is not None:
                    values = texts.values(row)
                    sent[name] |= {
                        "template": template.code,
                        "params": {name: values[name] for name in template.params},
                    }
            previews.append(
                {
                    "event": kind, "language": spoken, "text": body, "length": len(body), "encoding": size.encoding,
                    "units": size.units, "segments": size.segments, "suppliers": sent,
                }
            )  # fmt: skip

    def way_of(sent: Mapping[str, Any]) -> str:
        words = {"text": "as it is", "none": "not sent"}
        return words.get(sent["way"]) or f"{sent['template']} ({', '.join(sent['params'])})"

    show(
        {"data": previews},
        as_json,
        lambda: table(
            "",
            ("event", "language", "text", "length", "encoding", "segments", *suppliers),
            [
                [one[name] for name in ("event", "language", "text", "length", "encoding", "segments")]
                + [way_of(sent) for sent in one["suppliers"].values()]
                for one in previews
            ],
        ),
    )


# ---- providers and audit --------------------------------------------------------------------------------------------


def providers(
    name: Annotated[
        str | None,
        typer.Argument(help="The supplier whose breaker is overridden, or whose history is shown."),
    ] = None,
    breaker: Annotated[
        Literal["auto", "forced_open", "disabled", "metrics_only"] | None,
        typer.Option("--breaker", help="auto: by its own measure; the others override it."),
    ] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="Show who serves which channel, and who else.")
    ] = False,
    route: Annotated[
        str | None, typer.Option("--route", help="A payment channel, or `sms`: set its route, with --to.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Suppliers in order with their weights, `stripe=3,sandbox=1,alipay=0` (0: a backup), or `settings`.",
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option("--history", help="The transitions: of NAME all that are kept, else the last of each."),
    ] = False,
    reason: Reason = None,
    idempotency_key: Key = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Suppliers and their breakers; with NAME and --breaker, override one; --history: what happened to them; --routes
    and --route: who serves what."""
    if history and breaker is not None:
        raise typer.BadParameter("--history and --breaker do not go together")
    if not history and (name is None) != (breaker is None):
        raise typer.BadParameter("a name goes with --breaker or --history")
    if (route is None) != (to is None):
        raise typer.BadParameter("--route and --to go together")
    if routes or route is not None:
        _routes(Office(data_dir), route, to, reason, idempotency_key, dry_run, as_json)
        return
    office = Office(data_dir)
    if history:
        transitions(office, name, as_json)
        return
    if name is not None:
        rows = [
            office.post(
                f"/v1/admin/providers/{_quoted(name)}/breaker",
                {"mode": breaker},
                idempotency_key=idempotency_key,
                reason=reason,
                dry_run=dry_run,
            )
        ]
        answer: Any = rows[0]
    else:
        answer = office.ask("GET", "/v1/admin/providers")
        rows = answer["data"]
    columns = ("name", "kind", "mode", "state", "calls", "failures", "slow", "last_error")
    show(
        answer,
        as_json,
        lambda: table(
            "",
            columns,
            [[row.get(column) for column in columns] for row in rows],
            bad=[row.get("state") in ("open", "forced_open") for row in rows],
        ),
    )


def bills(
    provider: Annotated[str | None, typer.Option("--provider", help="Only this payment supplier.")] = None,
    differing: Annotated[
        bool, typer.Option("--differing", help="Only days that differ, or cannot be read.")
    ] = False,
    days: Annotated[int, typer.Option("--days", min=1, max=1_000, help="So many bills, the newest.")] = 30,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Suppliers' daily bills beside our books, newest first, and what differs. Exit status 1: something does.

    `fairdrop reconcile-bill DATE` reads a day at once."""
    asked = {"provider": provider, "differing": differing, "limit": days}
    answer = Office(data_dir).ask("GET", "/v1/admin/bills", params=asked)
    columns = ("day", "provider", "state", "lines", "read_at", "differing", "code")
    shown = (
        "day",
        "provider",
        "what",
        "kind",
        "ref",
        "our_id",
        "order_no",
        "ours_minor",
        "theirs_minor",
        "currency",
    )
    rows = answer["data"]
    found = [{**row, **one} for row in rows for one in row["differences"]]

    def tables() -> None:
        table(
            "",
            columns,
            [[row[name] for name in columns] for row in rows],
            bad=[row["differing"] > 0 for row in rows],
        )
        if found:
            table("what differs", shown, [[one[name] for name in shown] for one in found])

    show(answer, as_json, tables)
    raise typer.Exit(1 if any(row["differing"] for row in rows) else 0)


def _routes(
    office: Office,
    route: str | None,
    to: str | None,
    reason: str | None,
    idempotency_key: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    path = "/v1/admin/providers/routes"
    answer: Any
    if route is None:
        answer = office.ask("GET", path)
        rows = answer["data"]
    else:
        body: dict[str, Any] = {"kind": "sms" if route == "sms" else "payment", "suppliers": None}
        if route != "sms":
            body["channel"] = route
        if to != "settings":
            body["suppliers"] = [_share(part) for part in (to or "").split(",")]
        answer = office.post(path, body, idempotency_key=idempotency_key, reason=reason, dry_run=dry_run)
        rows = [answer]
    show(
        answer,
        as_json,
        lambda: table(
            "",
            ("route", "suppliers", "set by"),
            [
                (
                    row["channel"] or row["kind"],
                    ", ".join(f"{one['name']}={one['weight']}" for one in row["suppliers"]),
                    row["set_by"],
                )
                for row in rows
            ],
        ),
    )


def transitions(office: Office, name: str | None, as_json: bool) -> None:
    """What happened to one supplier's breaker, or to all of them, newest first."""
    if name is not None:
        told = [
            {"name": name, **one} for one in office.all_of(f"/v1/admin/providers/{_quoted(name)}/history")
        ]
    else:
        answer = office.ask("GET", "/v1/admin/providers")
        told = [{"name": row["name"], **one} for row in answer["data"] for one in row["history"]]
        told.sort(key=lambda one: int(one["at_ms"]), reverse=True)
    columns = (
        "at",
        "name",
        "before",
        "after",
        "why",
        "calls",
        "failures",
        "slow",
        "last_error",
        "open_for_ms",
        "by",
    )
    show(
        {"data": told},
        as_json,
        lambda: table(
            "",
            columns,
            [[one.get(column) for column in columns] for one in told],
            bad=[one["after"] in ("open", "forced_open") for one in told],
        ),
    )


def _share(text: str) -> dict[str, Any]:
    name, _, weight = text.strip().partition("=")
    if not name or not weight.isascii() or not weight.isdigit():
        raise typer.BadParameter(f"{text!r} is not like stripe=3", param_hint="--to")
    return {"name": name, "weight": int(weight)}


def audit(sale_id: SaleArgument, as_json: Json = False, data_dir: DataDir = None) -> None:
    """Compare stock, orders and money; exit status 1 if they do not agree."""
    answer = Office(data_dir).ask("GET", f"/v1/admin/sales/{_quoted(sale_id)}/audit")
    checks = answer["checks"]
    show(
        answer,
        as_json,
        lambda: table(
            f"Audit of {sale_id}: {'all agree' if answer['ok'] else 'DOES NOT HOLD'}",
            ("check", "ok", "left", "right"),
            [(c["name"], "yes" if c["ok"] else "NO", c["left"], c["right"]) for c in checks],
            bad=[not c["ok"] for c in checks],
        ),
    )
    if not answer["ok"]:
        raise typer.Exit(1)


def trace(
    order_no: Annotated[str, typer.Argument(metavar="ORDER_NO", help="The order's number.")],
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """What happened to one order, oldest first: claim, confirm, pay, release, tell, and who at the desk did what."""
    answer = Office(data_dir).ask("GET", f"/v1/admin/orders/{_quoted(order_no)}/trace")
    show(
        answer,
        as_json,
        lambda: table(
            f"{order_no}: {answer['state'] or 'refused'}; Redis tells its buyer: {answer['told'] or '?'}",
            ("at", "step", "what", "detail"),
            [
                (
                    one["at"],
                    one["step"],
                    one["what"],
                    ", ".join(f"{name} {value}" for name, value in one["detail"].items()),
                )
                for one in answer["data"]
            ],
        ),
    )
