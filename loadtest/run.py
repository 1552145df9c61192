"""A short, whole load test in one command: start `fairdrop up`, send the crowd, pronounce the verdict, stop.

    fairdrop rehearse --users 500 --units 50

Exit status 0: every promise was kept; 1: one was broken; 2: it could not start. `--urls` tests servers that run
already instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_WITHIN_S = 90.0
STOP_WITHIN_S = 20.0
CHECKOUT = Path(__file__).resolve().parents[1]


class CannotStart(Exception):
    """str(error) is one sentence for a person."""


@contextlib.contextmanager
def servers(data_dir: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Path]:
    """`fairdrop up` on free ports; yields its urls.json. CannotStart: with its last words."""
    log_path = data_dir / "up.log"
    urls = data_dir / "urls.json"
    urls.unlink(missing_ok=True)
    command = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(data_dir), *options]
    for name in ("front", "office", "worker", "sandbox"):
        command += [f"--{name}-port", "0"]
    with log_path.open("wb") as log:
        env = os.environ | dict(environment or {})
        up = subprocess.Popen(
            command, cwd=CHECKOUT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + START_WITHIN_S
        while not urls.exists():
            if up.poll() is not None or time.monotonic() > deadline:
                words = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise CannotStart(f"`fairdrop up` did not start: {words[-1] if words else 'it said nothing'}")
            time.sleep(0.05)
        yield urls
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGTERM)
            try:
                up.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()


def run_locust(urls: Path, options: argparse.Namespace) -> int:
    """Run the suite headless; its exit status is the verdict."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(CHECKOUT / "loadtest" / "locustfile.py"),
        "--headless",
    ]
    command += [
        "--only-summary",
        "-u",
        str(options.users),
        "-r",
        str(options.spawn_rate),
        "-t",
        f"{options.run_time_s}s",
    ]
    command += ["--urls", str(urls), "--units", str(options.units), "--opens-in-s", str(options.opens_in_s)]
    command += ["--open-for-s", str(options.open_for_s), "--pay-within-s", str(options.pay_within_s)]
    if options.history is not None:
        command += ["--history", str(options.history.absolute())]
    status = subprocess.run(
        command, cwd=CHECKOUT, env=os.environ | {"LOCUST_SKIP_UPDATE_CHECK": "1"}
    ).returncode
    if options.history is None:
        return status
    judge = [
        sys.executable,
        "-m",
        "app.cli",
        "check-history",
        str(options.history.absolute()),
        "--urls",
        str(urls),
    ]
    if ledger := os.environ.get("FAIRDROP_SANDBOX_LEDGER"):
        judge += ["--supplier", ledger]
    return subprocess.run(judge, cwd=CHECKOUT).returncode or status


def main(args: Sequence[str] | None = None) -> int:
    """The command. args: without the program's name; None: those of this process."""
    parser = argparse.ArgumentParser(
        prog="fairdrop rehearse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=500, help="people: shoppers, bots, refreshers")
    parser.add_argument(
        "--spawn-rate", type=int, default=100, help="people who arrive per second before the minute"
    )
    parser.add_argument("--units", type=int, default=50, help="units on sale")
    parser.add_argument("--opens-in-s", type=float, default=8.0, help="seconds from the start to the opening")
    parser.add_argument(
        "--open-for-s", type=float, default=15.0, help="seconds from the opening to the close"
    )
    parser.add_argument(
        "--pay-within-s", type=int, default=5, help="seconds to pay; below 60 in development only"
    )
    parser.add_argument(
        "--run-time-s", type=int, default=90, help="seconds after which the test ends in any case"
    )
    parser.add_argument(
        "--urls", type=Path, help="urls.json of servers that run already; default: start some"
    )
    parser.add_argument(
        "--history", type=Path, help="write and judge the history of the run (docs/history.md)"
    )
    options = parser.parse_args(args)
    if options.urls is not None:
        if not options.urls.is_file():
            print(f"fairdrop rehearse: there is no file {options.urls}", file=sys.stderr)
            return 2
        return run_locust(options.urls.absolute(), options)  # Locust runs in the checkout
    with tempfile.TemporaryDirectory(prefix="fairdrop-load-") as folder:
        if os.geteuid() == 0:
            Path(folder).chmod(0o711)  # the stores run as another account and must pass through
        os.environ.setdefault(
            "FAIRDROP_POLL_MAX_MS", "2500"
        )  # winners of returned units must hear of it in time to pay
        os.environ.setdefault("FAIRDROP_SANDBOX_LEDGER", str(Path(folder) / "supplier.jsonl"))
        try:
            with servers(Path(folder)) as urls:
                return run_locust(urls, options)
        except CannotStart as error:
            print(f"loadtest: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
