"""`fairdrop demo`: a whole sale in front of your eyes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command()
def demo(
    buyers: Annotated[int, typer.Option(min=1, max=50_000, help="People and bots who want a unit.")] = 5_000,
    units: Annotated[int, typer.Option(min=1, max=50_000, help="Units on sale.")] = 200,
    seed: Annotated[int, typer.Option(help="Same seed, same crowd.")] = 1,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print nothing but one JSON document on standard output.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Keep the stores here; default: a temporary directory, removed at the end."),
    ] = None,
    front_workers: Annotated[int, typer.Option(min=1, max=8, help="Front-door processes.")] = 1,
    kill_worker: Annotated[
        bool, typer.Option("--kill-worker", help="kill -9 the worker in the middle: nothing may change.")
    ] = False,
) -> None:
    """Run a whole sale in front of your eyes: line, draw, opening, claims, orders, payments, standby, SMS, audit."""
    from app.demo.hold import run_demo

    raise typer.Exit(run_demo(buyers, units, seed, json_output, data_dir, front_workers, kill_worker))
