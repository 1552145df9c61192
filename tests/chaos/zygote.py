"""A fork server: it has imported everything, so that a process of ours starts in milliseconds instead of seconds.

    python -m tests.chaos.zygote FD

FD is one end of a socket pair (SEQPACKET). Each message is JSON: {"role", "arguments", "environment", "plants",
"dresses", "log"}; sockets go along with it and become the `--fd` of the process. Answer: {"pid": …}. A planted bug
(tests/chaos/plants.py), a crash point (points.py) or a dress (dresses.py) is put in after the fork, in that one
process. When the other end is closed, the server ends, and the kernel ends its children with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
MESSAGE_MAX = 64 * 1024


def main(fd: int) -> None:
    wire = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    import tests.chaos.dresses
    import tests.chaos.plants
    import tests.chaos.points  # noqa: F401 - the imports are what this server is for

    wire.send(b"{}")
    while True:
        message, fds, _, _ = socket.recv_fds(wire, MESSAGE_MAX, 4)
        if not message:
            return
        order = json.loads(message)
        pid = os.fork()
        if pid == 0:
            wire.close()
            _become(order, fds)
        for given in fds:
            os.close(given)
        wire.send(json.dumps({"pid": pid}).encode())


def _become(order: dict[str, Any], fds: list[int]) -> None:
    """In the child: run one of our processes; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["environment"])
        random.seed()
        from tests.chaos import dresses, plants, points

        for name in order["dresses"]:
            dresses.DRESSES[name]()
        for name in order["plants"]:
            plants.PLANTS[name]()
        if point := order["environment"].get(points.VARIABLE):
            points.arm(point)
        sys.argv = ["fairdrop", order["role"], *order["arguments"]]
        for given in fds:
            os.set_inheritable(given, True)
            sys.argv += ["--fd", str(given)]
        from app.cli import main as fairdrop

        fairdrop()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must never return into the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
