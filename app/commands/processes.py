"""`fairdrop up`, and the processes that it starts: front, office, worker and sandbox."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from app.commands.installation import DataDir, log_as, settings_of

commands = typer.Typer()

Port = Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; 0 = any free one.")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Fd = Annotated[int | None, typer.Option("--fd", hidden=True)]  # a socket that the supervisor opened
Server = Annotated[
    Literal["uvicorn", "granian"] | None, typer.Option("--server", help="ASGI server of the front.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=64, help="Front-door processes.")]


@commands.command()
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
    settings = settings_of(**given, **{f"{name}_port": port for name, port in ports.items()})
    for sentence in settings.misspelt(os.environ):
        typer.echo(f"fairdrop: {sentence}", err=True)
    Up(settings, lan=lan).run()


@commands.command()
def front(
    host: Host = None, port: Port = None, workers: Workers = None, server: Server = None, fd: Fd = None
) -> None:
    """Run the front door: what buyers talk to. Needs Redis only."""
    settings = settings_of(front_host=host, front_port=port, front_workers=workers, server=server)
    if settings.front_workers > 1 and fd is None:
        from app.supervisor import run_fronts

        run_fronts(settings, settings.front_host, settings.front_port)
        return
    log_as(settings, "front")
    from app.front import create_app
    from app.serving.server import serve

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


@commands.command()
def office(host: Host = None, port: Port = None, fd: Fd = None) -> None:
    """Run the office: what operators and suppliers' call-backs talk to. Needs Redis and Postgres."""
    settings = settings_of(office_host=host, office_port=port)
    log_as(settings, "office")
    from app.office import create_app
    from app.serving.server import serve

    serve(
        "office",
        create_app,
        settings,
        host=settings.office_host,
        port=settings.office_port,
        fd=fd,
        drain_s=settings.drain_s,
    )


@commands.command()
def worker(host: Host = None, port: Port = None) -> None:
    """Run the worker: it confirms, takes payments, tells, expires, releases, reconciles."""
    settings = settings_of(worker_host=host, worker_port=port)
    log_as(settings, "worker")
    from app import worker as worker_process
    from app.serving.server import keep_what_has_started, run

    keep_what_has_started()  # its modules: a collection that walks them all stalls every loop of the worker
    run(worker_process.run(settings))


@commands.command()
def sandbox(host: Host = None, port: Port = None, fd: Fd = None) -> None:
    """Run the sandbox: payment and SMS suppliers that misbehave on request."""
    settings = settings_of(sandbox_host=host, sandbox_port=port)
    log_as(settings, "sandbox")
    from app.providers.sandbox import create_app
    from app.serving.server import serve

    serve("sandbox", create_app, settings, host=settings.sandbox_host, port=settings.sandbox_port, fd=fd)
