"""An installed `fairdrop` works in an empty folder: scripts and migrations are inside the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("fairdrop-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel installed, and this environment's packages without our checkout."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Plain lines of a .pth file extend sys.path; .pth files *in* that folder (an editable install) are not read.
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_holds_every_script_and_migration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("lua", "app/_lua"), ("migrations", "app/_migrations")):
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert files
        for path in files:
            assert f"{inside}/{path.relative_to(ROOT / folder)}" in names
    assert not [name for name in names if name.startswith(("tests/", "loadtest/", "docs/"))]
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "app").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= names


def test_the_command_works_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(python.with_name("fairdrop")), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    wanted = [
        "up",
        "demo",
        "front",
        "office",
        "worker",
        "sandbox",
        "sale",
        "token",
        "audit",
        "verify-draw",
        "migrate",
    ]
    for command in wanted:
        assert command in done.stdout


@pytest.mark.parametrize("command", ["bench", "rehearse"])
def test_commands_of_the_checkout_say_so(python: Path, tmp_path: Path, command: str) -> None:
    done = run(python, tmp_path, "-m", "app.cli", command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("fairdrop: this command is part of the checkout")


def test_scripts_and_migrations_are_found_from_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import app.resources as r; from app.ledger.migrate import _scripts; from app.scripts import all_scripts;"
        "print(r.__file__, r.lua_dir(), r.migrations_dir(), _scripts().get_current_head(), len(all_scripts()))"
    )
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    file, lua, migrations, head, count = done.stdout.split()
    assert str(ROOT / "app") not in file
    assert Path(lua) == Path(file).parent / "_lua"
    assert Path(migrations) == Path(file).parent / "_migrations"
    assert head != "None"
    assert int(count) >= 10


def test_an_installed_command_migrates_a_database(
    python: Path, tmp_path: Path, empty_database_url: str
) -> None:
    env = {"PATH": os.environ["PATH"], "FAIRDROP_DATABASE_URL": empty_database_url}
    command = [str(python.with_name("fairdrop")), "migrate"]
    for arguments, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
