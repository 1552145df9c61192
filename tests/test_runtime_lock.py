"""requirements.lock is enough to run: nothing that only tests install is needed by a process or by the demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in a process of its own, in which every distribution that the lock does not name is hidden.
PROGRAM = """
import importlib.abc, importlib.metadata, re, sys

def name(text):
    return re.sub(r"[-_.]+", "-", text).lower()

locked = set(sys.argv[1].split(",")) | {"fairdrop"}
hidden = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not locked & {name(owner) for owner in owners}
}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{fullname} is not in requirements.lock", name=fullname)
        return None

sys.meta_path.insert(0, Hide())
assert "pytest" in hidden and "fastapi" not in hidden
import app.cli, app.demo.hold, app.front, app.office, app.providers.sandbox, app.supervisor
import app.worker
app.cli.command_line()  # every family of commands
from sqlalchemy.ext.asyncio import create_async_engine
create_async_engine("postgresql+asyncpg://nobody@127.0.0.1/none")
"""


def test_every_process_starts_with_what_the_runtime_lock_names() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    names = [
        re.sub(r"[-_.]+", "-", found).lower() for found in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.M)
    ]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
