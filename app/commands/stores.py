"""What is done to the stores by hand: `fairdrop migrate`, `rebuild`, `rotate-keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands.installation import DataDir, log_as, settings_of, with_pii_keys, with_stores

commands = typer.Typer()


@commands.command()
def migrate(
    data_dir: DataDir = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if a migration is missing.")
    ] = False,
) -> None:
    """Bring the database up to this release, or say what is missing."""
    from app.ledger import migrate as migrations

    settings = settings_of(data_dir=data_dir)
    database_url = settings.database_url
    if not database_url:
        from app.data_dir import read_urls

        database_url = str(read_urls(settings.data_dir)["database"])
    missing = migrations.pending(database_url)
    for line in missing:
        print(line)
    if check:
        raise typer.Exit(1 if missing else 0)
    migrations.upgrade(database_url)
    print("up to date" if not missing else f"{len(missing)} run, up to date")


@commands.command()
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

    from app.errors import DidNotHappen, Unknown
    from app.redis.cluster import open_link
    from app.repair import rebuild as rebuilding
    from app.scripts import Scripts

    settings = with_pii_keys(with_stores(settings_of(data_dir=data_dir), "database", "redis"))
    log_as(settings, "rebuild")  # to standard error: standard output is the report's

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


@commands.command("rotate-keys")
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

    from app.buyer import contacts
    from app.ledger.engine import create_engine
    from app.sealing import sealing_keys

    settings = with_pii_keys(with_stores(settings_of(data_dir=data_dir), "database"))
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
