"""The command `fairdrop`. Each command loads what it needs when it runs, so that --help answers at once.

Exit status: 0 fine, 1 the checked thing failed, 2 bad usage or cannot start (one sentence on standard error).
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from app.errors import CannotStart, FairdropError

if TYPE_CHECKING:
    from app.settings import Settings

app = typer.Typer(
    name="fairdrop",
    help="Flash sales with a fair line, stock that is never oversold, and orders that survive every crash.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Stores, secrets, logs, urls.json. [default: .fairdrop]")
]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; 0 = any free one.")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Fd = Annotated[int | None, typer.Option("--fd", hidden=True)]  # a socket that the supervisor opened
Server = Annotated[
    Literal["uvicorn", "granian"] | None, typer.Option("--server", help="ASGI server of the front.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=64, help="Front-door processes.")]


def _settings(**given: Any) -> Settings:
    """The settings of this process: options over environment. CannotStart: one sentence for each that is wrong."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(
            f"FAIRDROP_{'_'.join(str(part) for part in one['loc']).upper()}: {one['msg']}"
            for one in error.errors()
        )
        raise CannotStart(wrong) from error


@app.command()
def up(
    data_dir: DataDir = None,
    front_port: Port = None,
    office_port: Port = None,
    worker_port: Port = None,
    sandbox_port: Port = None,
    front_workers: Workers = None,
    server: Server = None,
    lan: Annotated[
        bool, typer.Option("--lan", help="Let other machines reach front, office and sandbox.")
    ] = False,
) -> None:
    """Run everything on this machine for development: stores, front, office, worker and a sandbox supplier."""
    from app.supervisor import Up

    given = {"data_dir": data_dir, "front_workers": front_workers, "server": server, "env": "development"}
    ports = {"front": front_port, "office": office_port, "worker": worker_port, "sandbox": sandbox_port}
    Up(_settings(**given, **{f"{name}_port": port for name, port in ports.items()}), lan=lan).run()


@app.command()
def front(
    host: Host = None, port: Port = None, workers: Workers = None, server: Server = None, fd: Fd = None
) -> None:
    """Run the front door: what buyers talk to. Needs Redis only."""
    settings = _settings(front_host=host, front_port=port, front_workers=workers, server=server)
    if settings.front_workers > 1 and fd is None:
        from app.supervisor import run_fronts

        run_fronts(settings, settings.front_host, settings.front_port)
        return
    _logging(settings, "front")
    from app.front import create_app
    from app.serve import serve

    serve(
        "front",
        create_app,
        settings,
        host=settings.front_host,
        port=settings.front_port,
        fd=fd,
        drain_s=settings.drain_s,
        server=settings.server,
    )


@app.command()
def office(host: Host = None, port: Port = None, fd: Fd = None) -> None:
    """Run the office: what operators and suppliers' call-backs talk to. Needs Redis and Postgres."""
    settings = _settings(office_host=host, office_port=port)
    _logging(settings, "office")
    from app.office import create_app
    from app.serve import serve

    serve(
        "office",
        create_app,
        settings,
        host=settings.office_host,
        port=settings.office_port,
        fd=fd,
        drain_s=settings.drain_s,
    )


@app.command()
def worker(host: Host = None, port: Port = None) -> None:
    """Run the worker: it confirms, takes payments, tells, expires, releases, reconciles."""
    settings = _settings(worker_host=host, worker_port=port)
    _logging(settings, "worker")
    from app import worker as worker_process
    from app.serve import keep_what_has_started, run

    keep_what_has_started()  # its modules: a collection that walks them all stalls every loop of the worker
    run(worker_process.run(settings))


@app.command()
def sandbox(host: Host = None, port: Port = None, fd: Fd = None) -> None:
    """Run the sandbox: payment and SMS suppliers that misbehave on request."""
    settings = _settings(sandbox_host=host, sandbox_port=port)
    _logging(settings, "sandbox")
    from app.providers.sandbox import create_app
    from app.serve import serve

    serve("sandbox", create_app, settings, host=settings.sandbox_host, port=settings.sandbox_port, fd=fd)


def _logging(settings: Settings, process: str) -> None:
    from app.telemetry import configure_logging

    configure_logging(settings, process)


@app.command()
def migrate(
    data_dir: DataDir = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if a migration is missing.")
    ] = False,
) -> None:
    """Bring the database up to this release, or say what is missing."""
    from app.ledger import migrate as migrations

    settings = _settings(data_dir=data_dir)
    database_url = settings.database_url
    if not database_url:
        from app.supervisor import read_urls

        database_url = str(read_urls(settings.data_dir)["database"])
    missing = migrations.pending(database_url)
    for line in missing:
        print(line)
    if check:
        raise typer.Exit(1 if missing else 0)
    migrations.upgrade(database_url)
    print("up to date" if not missing else f"{len(missing)} run, up to date")


def _with_stores(settings: Settings, *needed: Literal["database", "redis"]) -> Settings:
    """The addresses of these stores: as set, else those of the `fairdrop up` that runs in the data directory."""
    missing = [name for name in needed if not getattr(settings, f"{name}_url")]
    if not missing:
        return settings
    from app.supervisor import read_urls

    urls = read_urls(settings.data_dir)
    return settings.model_copy(update={f"{name}_url": str(urls[name]) for name in missing})


def _with_sandbox(settings: Settings) -> Settings:
    """The database as set; else all of the `fairdrop up` that runs in the data directory, its sandbox included."""
    if settings.database_url:
        return settings
    from app.supervisor import made_secrets, read_urls

    urls = read_urls(settings.data_dir)
    found: dict[str, Any] = {"database_url": str(urls["database"]), "sandbox_url": str(urls["sandbox"])}
    if (file := made_secrets(settings.data_dir).get("sandbox_secret")) is not None:
        found["sandbox_secret"] = file.read_text(encoding="ascii").strip()
    return _settings(data_dir=settings.data_dir, env="development", **found)


def _with_pii_keys(settings: Settings) -> Settings:
    """The keys that seal contacts: as set, else those that `fairdrop up` made in the data directory."""
    if settings.pii_keys.get_secret_value():
        return settings
    from pydantic import SecretStr

    from app.supervisor import made_secrets

    file = made_secrets(settings.data_dir).get("pii_keys")
    if file is None:
        raise CannotStart("FAIRDROP_PII_KEYS is missing: contacts could be neither sealed nor found")
    return settings.model_copy(update={"pii_keys": SecretStr(file.read_text(encoding="ascii").strip())})


@app.command("rotate-keys")
def rotate_keys(
    data_dir: DataDir = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Orders in one transaction.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Seal contacts, payers, webhook secrets, kept answers with the first of FAIRDROP_PII_KEYS; index numbers by it.

    Put the new key in front of the old one, restart every process, run this; it may be stopped and run again. Keep the
    old key until the sales then open have settled: contacts of waiting buyers are in Redis. Exit status 1: something
    could not be opened with any key given.
    """
    import asyncio
    import json

    from app import contacts
    from app.ledger.engine import create_engine
    from app.sealing import sealing_keys

    settings = _with_pii_keys(_with_stores(_settings(data_dir=data_dir), "database"))
    keys = sealing_keys(settings.pii_keys.get_secret_value())

    async def run() -> contacts.Resealed:
        engine = create_engine(settings, name="rotate-keys")
        try:
            return await contacts.reseal(engine, keys, batch=batch)
        finally:
            await engine.dispose()

    done = asyncio.run(run())
    newest = keys[0].id.hex()
    if as_json:
        found = {
            name: getattr(done, name) for name in ("contacts", "payers", "secrets", "answers", "cannot_open")
        }
        print(json.dumps({"key": newest, **found}))
    else:
        print(
            f"key {newest}: sealed {done.contacts} contacts, {done.payers} payers, {done.secrets} secrets,"
            f" {done.answers} kept answers; not opened {done.cannot_open}"
        )
    raise typer.Exit(1 if done.cannot_open else 0)


@app.command("reconcile-bill")
def reconcile_bill(
    day: Annotated[str, typer.Argument(metavar="DATE", help="UTC day, for example 2026-11-11.")],
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this supplier; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read the payment suppliers' bills of a day now and compare them with our captures and refunds, both ways.

    It talks to the suppliers and to Postgres with the settings of a worker; the worker does the same by itself every
    day. It may be run again at any time. Exit status 1: something differs, or a bill could not be read.
    """
    import asyncio
    import json
    from datetime import UTC, date, datetime

    from app import bills
    from app.ledger.engine import create_engine
    from app.providers.registry import open_providers

    try:
        wanted = date.fromisoformat(day)
    except ValueError:
        raise typer.BadParameter("a day is written like 2026-11-11") from None
    if wanted > datetime.now(UTC).date():
        raise typer.BadParameter("this day has not begun")
    settings = _with_sandbox(_settings(data_dir=data_dir))
    _logging(settings, "reconcile-bill")

    async def run() -> list[dict[str, Any]]:
        providers = open_providers(settings)
        engine = create_engine(settings, name="reconcile-bill")
        try:
            names = provider or list(providers.payment)
            for name in names:
                if name not in providers.payment:
                    raise CannotStart(
                        f"there is no payment supplier {name!r} in use; there are: {', '.join(providers.payment)}"
                    )
            return await bills.read_now(engine, providers, settings, wanted, names)
        finally:
            await engine.dispose()
            await providers.aclose()

    reports = asyncio.run(run())
    if as_json:
        print(json.dumps({"day": day, "bills": reports}, default=str, ensure_ascii=False, indent=2))
    for row in () if as_json else reports:
        said = (
            f"{row['lines']} lines"
            if row["state"] == "read"
            else f"not read: {row['code'] or 'a worker has it'}"
        )
        print(f"{row['provider']} {day}: {said}, {len(row['differences'])} differences")
        for one in row["differences"]:
            amounts = f"ours {one['ours_minor']}, theirs {one['theirs_minor']} {one['currency']} minor"
            print(
                f"  {one['what']} {one['kind']}: {one['ref']} ({one['our_id']}), order {one['order_no']}: {amounts}"
            )
    raise typer.Exit(1 if any(row["differences"] or row["state"] != "read" for row in reports) else 0)


@app.command()
def rebuild(
    sale: Annotated[str, typer.Argument(help="The sale's id.")],
    data_dir: DataDir = None,
    reason: Annotated[str, typer.Option(help="For the journal.")] = "by hand",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a sale anew in Redis from what Postgres knows, in a new epoch. Workers do it by themselves (see README).

    Orders keep their tickets. Whoever waited, or was claimed and not yet written, is told `lapsed` and may join again.
    Exit status 1: not done, and why.
    """
    import asyncio
    import json
    from dataclasses import asdict

    from app import rebuild as rebuilding
    from app.cluster import open_link
    from app.errors import DidNotHappen, Unknown
    from app.scripts import Scripts

    settings = _with_pii_keys(_with_stores(_settings(data_dir=data_dir), "database", "redis"))
    _logging(settings, "rebuild")  # to standard error: standard output is the report's

    async def run() -> rebuilding.Report | None:
        link = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="rebuild")
        await link.start()
        try:
            if not link.connected:
                raise DidNotHappen(f"Redis cannot be reached: {link.trouble}")
            return await rebuilding.rebuild(
                settings, link, Scripts(link), sale, actor="command line", reason=reason
            )
        finally:
            await link.close()

    try:
        report = asyncio.run(run())
    except (DidNotHappen, Unknown) as error:
        print(json.dumps({"rebuilt": False, "why": str(error)}) if as_json else f"not rebuilt: {error}")
        raise typer.Exit(1) from None
    if report is None:
        why = "another process is rebuilding this sale now"
        print(json.dumps({"rebuilt": False, "why": why}) if as_json else f"not rebuilt: {why}")
        raise typer.Exit(1)
    if as_json:
        print(json.dumps({"rebuilt": True, **asdict(report)}))
    else:
        units = ", ".join(f"{sku} {left}" for sku, left in report.units_left.items())
        print(
            f"{sale}: epoch {report.epoch} after {report.seconds} s; {report.orders_live} live orders, units left:"
            f" {units}; {report.claims_drained} claims were still in Redis. Whoever waited is told `lapsed`."
        )


@app.command()
def token(
    buyer: Annotated[str, typer.Argument(help="The shop's own id of the buyer.")],
    data_dir: DataDir = None,
    valid_s: Annotated[int, typer.Option(min=1, help="s the token stays valid.")] = 3600,
    phone: Annotated[str | None, typer.Option(help="E.164, for example +8613800138000.")] = None,
    language: Annotated[str | None, typer.Option(help="For example zh-CN.")] = None,
) -> None:
    """Print a buyer's JWT, signed with the JWT secret of this installation (for trying things out)."""
    import time

    import jwt

    settings = _settings(data_dir=data_dir)
    secret = settings.jwt_secret.get_secret_value()
    if not secret:
        from app.supervisor import made_secrets

        file = made_secrets(settings.data_dir).get("jwt_secret")
        if file is None:
            raise CannotStart(
                f"no JWT secret: set FAIRDROP_JWT_SECRET, or start `fairdrop up` in {settings.data_dir} once"
            )
        secret = file.read_text(encoding="ascii").strip()
    now_s = int(time.time())
    optional = {
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
        "phone_number": phone,  # OpenID Connect's names
        "locale": language,
    }
    claims: dict[str, Any] = {"sub": buyer, "iat": now_s, "exp": now_s + valid_s}
    claims |= {name: value for name, value in optional.items() if value}
    print(jwt.encode(claims, secret, algorithm="HS256"))


def _of_checkout(module: str, args: list[str]) -> NoReturn:
    """Run a command of loadtest/, which an installed wheel does not have; it reads its own options."""
    try:
        run = import_module(module).main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("loadtest", "psutil"):
            raise
        raise CannotStart(
            "this command is part of the checkout and needs its development packages: run it there, after `make test`"
        ) from error
    raise typer.Exit(run(args))


ITS_OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(add_help_option=False, context_settings=ITS_OWN_OPTIONS)
def bench(context: typer.Context) -> None:
    """Measure every goal of the hot path on this machine, against the limits of its own server. Needs the checkout."""
    _of_checkout("loadtest.bench.command", context.args)


@app.command(add_help_option=False, context_settings=ITS_OWN_OPTIONS)
def rehearse(context: typer.Context) -> None:
    """Play a peak with Locust against servers of its own or running ones, and judge it. Needs the checkout."""
    _of_checkout("loadtest.run", context.args)


# A command starts faster when those that it is not are left alone.
OWN_COMMANDS = (
    "up", "front", "office", "worker", "sandbox", "migrate", "token", "rotate-keys", "reconcile-bill", "bench",
    "rehearse",
)  # fmt: skip


def _register(wanted: str) -> None:
    """Add the commands that live in files of their own: the wanted one, or all (--help, a word that is none)."""
    if wanted in OWN_COMMANDS:
        return
    alone = ("demo", "verify-draw", "check-history")
    if wanted == "demo" or wanted not in alone:
        from app import demo

        app.command()(demo.demo)
    if wanted == "verify-draw" or wanted not in alone:
        from app import verify_draw

        app.command("verify-draw")(verify_draw.verify_draw)
    if wanted == "check-history" or wanted not in alone:
        from app import check_history

        app.command("check-history")(check_history.check_history)
    if wanted not in alone:
        from app import admin_cli

        admin_cli.register(app)


def _cause(error: BaseException) -> BaseException:
    """What is inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def main() -> None:
    """Run the command of the command line, and end the process with its exit status."""
    try:
        _register(sys.argv[1] if len(sys.argv) > 1 else "")
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except FairdropError as error:
        _end(error)
    except BaseExceptionGroup as group:
        cause = _cause(group)
        if not isinstance(cause, FairdropError):
            raise
        _end(cause)
    except BrokenPipeError:
        # `fairdrop … | head`: the reader has gone; say nothing more, and let no exit handler try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _end(error: BaseException) -> None:
    """One sentence for a person and status 2; with FAIRDROP_LOG_LEVEL=debug also where it came from."""
    if os.environ.get("FAIRDROP_LOG_LEVEL", "").lower() == "debug":
        traceback.print_exception(error)
    sys.stderr.write(f"fairdrop: {error}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
