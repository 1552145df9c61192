"""Rules of this house that no linter knows; each test says which mistake it prevents."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import SECRETS, Settings
from docs.make_settings import document

ROOT = Path(__file__).parents[1]


def _files(*suffixes: str) -> list[Path]:
    """What git tracks or would track (so that a new file is checked before its first commit)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def _texts(*suffixes: str) -> Iterator[tuple[Path, str]]:
    for path in _files(*suffixes):
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Spelled in pieces: this file is checked too.
REGISTRIES = (
    "pypi" + r"\.(org|python)",
    "files" + r"\.pythonhosted",
    "index" + "-url [^-]",
    "extra-index" + "-url",
)
IMAGES = (r"(docker|ghcr|quay|gcr)" + r"\.io/",)
MACHINES = (r"(?<![\w.])/" + r"work/", r"(?<![\w.])/" + r"root/(?!\.\.\.)", "/" + r"home/\w+/")
ELSEWHERE = re.compile("|".join([*REGISTRIES, *IMAGES, *MACHINES]))


def test_no_file_names_a_registry_or_a_directory_of_one_machine() -> None:
    """Prevents a lock file or script that works only where it was written."""
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in _texts()
        for number, line in enumerate(text.splitlines(), 1)
        if ELSEWHERE.search(line) and not (path.suffix == ".lock" and "uv pip compile" in line)
    ]
    assert not found, "\n".join(found)


def test_no_module_is_a_drawer_for_everything() -> None:
    """Prevents `utils`: a module is named after what it is about, so that a reader finds it."""
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base"}
    found = [
        path for path in _files(".py") if path.stem in drawers or drawers & set(path.parts[len(ROOT.parts) :])
    ]
    assert not found


def test_an_init_holds_no_code() -> None:
    """Prevents re-exports: a name has one home, and importing a package runs nothing."""
    for path in _files(".py"):
        if path.name == "__init__.py" and ROOT / "app" in path.parents:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            code = [
                node
                for node in body
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            ]
            assert not code, f"{path}: {ast.unparse(code[0])}"


def test_every_module_and_public_function_of_the_path_says_what_it_does() -> None:
    """Prevents a module whose purpose only its author knows."""
    found = [
        str(path)
        for path, text in _texts(".py")
        if path.parts[0] == "app" and path.name != "__init__.py" and not ast.get_docstring(ast.parse(text))
    ]
    assert not found


def test_tests_do_not_sleep_a_fixed_time() -> None:
    """Prevents tests that are slow on a fast machine and fail on a slow one: poll a condition (a sleep in a loop)."""
    found = []
    for path, text in _texts(".py"):
        if path.parts[0] != "tests":
            continue
        tree = ast.parse(text)
        in_loops = {
            id(node)
            for loop in ast.walk(tree)
            if isinstance(loop, ast.While | ast.For | ast.AsyncFor)
            for node in ast.walk(loop)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "time.sleep",
                "asyncio.sleep",
                "sleep",
            ):
                zero = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
                in_argument = "# not a wait" in text.splitlines()[node.lineno - 1]
                if id(node) not in in_loops and not zero and not in_argument:
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_every_script_begins_as_a_script_and_says_its_contract() -> None:
    """Prevents a script without its flags (undeclared keys, old-style writes) or without a header to test against."""
    scripts = [path for path in _files(".lua") if path.parent == ROOT / "lua"]
    assert scripts
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!lua"), path
        for word in ("KEYS[1]", "Returns", "Law:", "Cost:"):
            assert f"-- {word}" in text, f"{path} does not say {word}"


def test_migrations_and_decisions_are_numbered_one_by_one() -> None:
    """Prevents two that landed with one number: a database with two heads is not migrated at all."""
    for folder, name in (("migrations/versions", "*.py"), ("docs/adr", "*.md")):
        numbers = sorted(path.name[:4] for path in (ROOT / folder).glob(name))
        assert numbers == [f"{n:04d}" for n in range(1, len(numbers) + 1)], folder
    for path in (ROOT / "migrations" / "versions").glob("*.py"):
        said = dict(
            re.findall(
                r'^(revision|down_revision) = "(\d+)"$', path.read_text(encoding="utf-8"), re.MULTILINE
            )
        )
        before = f"{int(path.name[:4]) - 1:04d}"
        assert said == {"revision": path.name[:4]} | (
            {"down_revision": before} if before != "0000" else {}
        ), path


def test_every_setting_says_what_it_is() -> None:
    """Prevents limits without name, unit or default."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if name.endswith("_ms"):
            assert "ms" in field.description, f"{name}: the unit is missing"
        assert not field.is_required(), f"{name} has no default"
    assert set(SECRETS) <= set(Settings.model_fields)


def test_the_list_of_settings_is_up_to_date() -> None:
    """Prevents a list that lies. Make it anew: python -m docs.make_settings"""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == document()


def test_make_help_names_every_target() -> None:
    """Prevents targets that nobody finds."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE))
    explained = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
    assert phony == explained
