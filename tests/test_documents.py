"""What a document names is there: files, headings, commands, settings, metrics. Each moves sooner or later."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from app.cli import FAMILIES, command_line
from app.settings import SECRETS, Settings

ROOT = Path(__file__).parents[1]
A_FILE = re.compile(
    r"(?:[\w-][\w.-]*/)+[\w.-]+\.(?:conf|css|html|js|json|lock|lua|md|png|py|svg|toml|txt|yaml)"
)
PLACEHOLDER = re.compile(r"(?:^|/)[A-Z]+[/.]")  # DIR/urls.json, parts/NAME.lua


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def _documents() -> Iterator[tuple[Path, str]]:
    """All but what happened in the past."""
    for path in _tracked("*.md"):
        if path.name != "CHANGELOG.md":
            yield path, path.read_text(encoding="utf-8")


def _headings(text: str) -> set[str]:
    """As a web page of the repository makes anchors of them."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_links_lead_somewhere() -> None:
    """Prevents a link to a file that has moved, or to a heading that has another name now."""
    dead = []
    for path, text in _documents():
        for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
            to, _, anchor = "".join(link).partition("#")
            if re.match(r"\w+:", to):
                continue
            target = path.parent / to if to else path
            if not target.exists() or (
                anchor and anchor not in _headings(target.read_text(encoding="utf-8"))
            ):
                dead.append(f"{path.relative_to(ROOT)}: {''.join(link)}")
    assert not dead, "\n".join(dead)


def test_files_that_documents_name_exist() -> None:
    """Prevents a reader who looks for a file where it was before."""
    gone = [
        f"{path.relative_to(ROOT)}: {named}"
        for path, text in _documents()
        for words in re.findall(r"`([^`\n]+)`", text)
        for named in (word.strip(",;:()") for word in words.split())
        if A_FILE.fullmatch(named)
        and not PLACEHOLDER.search(named)
        and not any((base / named).exists() for base in (ROOT, path.parent, ROOT / "app"))
    ]
    assert not gone, "\n".join(gone)


def test_commands_that_documents_name_exist() -> None:
    """Prevents `fairdrop` and `make` lines that answer "no such command"."""
    groups = {
        group.name: {
            one.name or (one.callback.__name__ if one.callback else "") for one in inner.registered_commands
        }
        for family in command_line().registered_groups
        if isinstance(family.typer_instance, typer.Typer)
        for group in family.typer_instance.registered_groups
        if isinstance(inner := group.typer_instance, typer.Typer)
    }
    known = {name for families in FAMILIES.values() for names in families.values() for name in names}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for path, text in _documents():
        spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        code = "\n".join(spans + re.findall(r"^ {4}(.*)$", text, re.MULTILINE))
        for command, second in re.findall(r"(?<![\w-])fairdrop ([a-z][a-z-]*)(?: ([a-z][a-z|-]*))?", code):
            inside = {word for word in second.split("|") if word} if command in groups else set()
            if command not in known or not inside <= groups.get(command, set()):
                wrong.append(f"{path.relative_to(ROOT)}: fairdrop {command} {second}")
        for target in re.findall(r"(?<![\w-])make ([a-z-]+)", code):
            if target not in targets:
                wrong.append(f"{path.relative_to(ROOT)}: make {target}")
    assert not wrong, "\n".join(wrong)


def test_settings_and_metrics_that_documents_name_exist() -> None:
    """Prevents an operator who sets what nobody reads, or waits for a figure that nobody counts."""
    settings = {f"FAIRDROP_{name.upper()}" for name in Settings.model_fields}
    settings |= {f"FAIRDROP_{name.upper()}_FILE" for name in SECRETS}
    files = {path.stem for path in _tracked("*.py")}
    of_tests = "\n".join(path.read_text(encoding="utf-8") for path in _tracked("tests/*.py"))
    code = "\n".join(path.read_text(encoding="utf-8") for path in _tracked("app/*.py", "clients"))
    wrong = []
    for path, text in _documents():
        for name in re.findall(r"FAIRDROP_[A-Z0-9_]+", text):
            begins = name.endswith("_") and any(
                one.startswith(name) for one in settings
            )  # FAIRDROP_BREAKER_…
            if name not in settings and not begins and name not in of_tests:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
        for name in re.findall(r"\bfairdrop_[a-z0-9_]+", text):
            bare = re.sub(r"_(total|bucket|count|sum)$", "", name)
            if bare not in code and name not in files:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong, "\n".join(wrong)
