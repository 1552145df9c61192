"""Replaces itself by a program that dies with its parent and, started by root, does not run as root.

    python -I -S launch.py --parent PID --death-signal N [--as UID:GID | --map UID:GID] -- PROGRAM ARG...

Run as a file of its own (standard library only, nothing imported from `app`), because the steps have an order that no
option of `subprocess` gives: first the account, then PR_SET_PDEATHSIG (a change of account clears it), then exec.

--as   become that account for good (setgroups, setgid, setuid).
--map  a user namespace in which the caller is seen as that account and has no privileges: for directories that only
       the caller can reach (a checkout under /root). Files stay the caller's.
Exit status 127: the sentence on standard error says what was refused.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CLONE_NEWUSER = 0x10000000  # <linux/sched.h>; os.unshare needs Python 3.12


def become(uid: int, gid: int) -> None:
    """Give up root for this account, for good."""
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def map_onto(uid: int, gid: int) -> None:
    """Be `uid` in a user namespace of our own; after exec no capability is left, as for any account but root."""
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"a user namespace was refused ({os.strerror(number)})")
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1", encoding="ascii")


def die_with(parent: int, death_signal: int) -> None:
    """Be sent `death_signal` when the parent dies, also when it dies before this call."""
    if not sys.platform.startswith("linux"):
        return  # no such call there; a survivor is found through its lock file at the next start
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"PR_SET_PDEATHSIG: {os.strerror(number)}")
    if os.getppid() != parent:
        sys.exit(127)


def main(argv: list[str]) -> None:
    at = argv.index("--")
    options = dict(zip(argv[0:at:2], argv[1:at:2], strict=True))
    command = argv[at + 1 :]
    try:
        for option, step in (("--as", become), ("--map", map_onto)):
            if option in options:
                uid, gid = options[option].split(":")
                step(int(uid), int(gid))
        die_with(int(options["--parent"]), int(options["--death-signal"]))
        os.execv(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror or error}\n")
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
