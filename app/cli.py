"""The command `fairdrop`. A family of commands is a file of app/commands/, loaded only if it is asked for; a command
loads what it needs when it runs, so that --help answers at once.

Exit status: 0 fine, 1 the checked thing failed, 2 bad usage or cannot start (one sentence on standard error).
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import typer

from app.errors import FairdropError

# Heading in --help -> the families under it: a file of app/commands/ -> its commands. What stands here is what loads.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "Run": {"processes": ("up", "front", "office", "worker", "sandbox")},
    "Sell": {
        "sale": ("sale",),
        "providers": ("providers",),
        "webhooks": ("webhooks",),
        "sms": ("sms",),
        "key": ("key",),
    },
    "Check": {
        "audit": ("audit",),
        "trace": ("trace",),
        "bills": ("bills", "reconcile-bill"),
        "verify_draw": ("verify-draw",),
        "check_history": ("check-history",),
    },
    "Keep": {"stores": ("migrate", "rebuild", "rotate-keys")},
    "Try": {"demo": ("demo",), "token": ("token",), "checkout": ("rehearse", "bench")},
}


def command_line(wanted: str = "") -> typer.Typer:
    """`fairdrop` with the family of the wanted command, or with all of them (--help, a word that is none)."""
    app = typer.Typer(
        name="fairdrop",
        help="Flash sales with a fair line, stock that is never oversold, and orders that survive every crash.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    known = any(wanted in names for families in FAMILIES.values() for names in families.values())
    for heading, families in FAMILIES.items():
        for family, names in families.items():
            if known and wanted not in names:
                continue
            commands: typer.Typer = import_module(f"app.commands.{family}").commands
            for command in commands.registered_commands:
                command.rich_help_panel = heading
            for group in commands.registered_groups:
                group.rich_help_panel = heading
            app.add_typer(commands)
    return app


def _cause(error: BaseException) -> BaseException:
    """What is inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def main() -> None:
    """Run the command of the command line, and end the process with its exit status."""
    try:
        command_line(sys.argv[1] if len(sys.argv) > 1 else "")()
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
