"""`fairdrop bench` and `fairdrop rehearse`: commands that only a checkout has, from loadtest/."""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

import typer

from app.errors import CannotStart

commands = typer.Typer()


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


@commands.command(add_help_option=False, context_settings=ITS_OWN_OPTIONS)
def bench(context: typer.Context) -> None:
    """Measure every goal of the hot path on this machine, against the limits of its own server. Needs the checkout."""
    _of_checkout("loadtest.bench.command", context.args)


@commands.command(add_help_option=False, context_settings=ITS_OWN_OPTIONS)
def rehearse(context: typer.Context) -> None:
    """Play a peak with Locust against servers of its own or running ones, and judge it. Needs the checkout."""
    _of_checkout("loadtest.run", context.args)
