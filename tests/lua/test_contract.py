"""The header of each script, its binding in app/scripts.py and its text say the same."""

from __future__ import annotations

import inspect
import re

import pytest

from app.keys import SaleKeys
from app.resources import lua_dir, scripts
from app.scripts import (
    Script,
    Scripts,
    all_scripts,
)

# Run when memory is full: units and statuses go back, and a restarted Redis is armed again, or nothing could go back.
GIVES_BACK = ("units_release", "ticket_mark", "claims_remove", "sale_pulse", "sale_rearm")
NAMES = sorted(script.name for script in all_scripts())


def header(name: str) -> str:
    lines = (lua_dir() / f"{name}.lua").read_text(encoding="utf-8").splitlines()[1:]
    taken = []
    for line in lines:
        if not line.startswith("--") or line.startswith("--@"):
            break
        taken.append(line[3:])
    return "\n".join(taken)


def names_in(text: str, what: str) -> tuple[str, ...]:
    found = re.findall(rf"^{what}\[(\d+)(\.\.\.)?\]\s+(\w+)", text, re.MULTILINE)
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1)), "numbered without gaps"
    return tuple(name + rest for _, rest, name in found)


def test_every_file_is_bound_and_every_binding_has_its_file() -> None:
    assert sorted(path.stem for path in lua_dir().glob("*.lua")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_header_and_binding_name_the_same_keys_arguments_and_words(name: str) -> None:
    script, text = Script.registry[name], header(name)
    assert text.startswith(f"{name}: ")
    assert names_in(text, "KEYS") == script.keys
    assert names_in(text, "ARGV") == script.args
    returns = text.split("\nReturns ")[1].split("\nLaw:")[0]
    assert {word.encode() for word in re.findall(r"\{'([A-Z_]+)'", returns)} == set(script.answers)
    assert "\nLaw: " in text
    assert "\nCost: " in text


@pytest.mark.parametrize("name", NAMES)
def test_the_words_in_the_text_are_those_of_the_header(name: str) -> None:
    body = "\n".join(line for line in scripts()[name].splitlines() if not line.startswith("--"))
    words = {word.encode() for word in re.findall(r"\{'([A-Z_]{3,})'", body)}
    assert words == set(Script.registry[name].answers)


@pytest.mark.parametrize("name", NAMES)
def test_the_method_takes_the_arguments_of_the_header(name: str) -> None:
    script = Script.registry[name]
    parameters = set(inspect.signature(getattr(Scripts, name)).parameters) - {"self", "sale", "sku"}
    made_here = {
        "home",
        "n",
        "again",
        "hashes",
        "units_each",
        "group",
        "sale_id",
        "sku",
        "numbers",
        "like",
        "form",
        "r",
    }  # by the binding, from other arguments
    plain = {arg for arg in script.args if not arg.endswith("...")} - made_here
    renamed = {"sale_publish": {"epoch"}, "sale_rebuild": {"epoch"}}.get(
        name, set()
    )  # the epoch is one of its `fields`
    assert plain - renamed <= parameters


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_declared_and_only_those_that_give_back_run_when_memory_is_full(name: str) -> None:
    first = scripts()[name].splitlines()[0]
    assert first == ("#!lua flags=allow-oom" if name in GIVES_BACK else "#!lua")
    assert "redis.pcall" not in scripts()[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_names_no_key_that_it_was_not_given(name: str) -> None:
    """A literal key would work here and fail on a Cluster."""
    for call in re.findall(r"redis\.call\(\s*'(?!TIME)\w+',\s*([^,)]+)", scripts()[name]):
        assert re.fullmatch(
            r"KEYS\[.+\]|ITEM|STOCK|OUTCOME|LINE|ORDERS|STATUS|'CREATE'|'DELCONSUMER'|'CONSUMERS'|'GROUPS'|unpack\(KEYS",
            call.strip(),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_script_fits_the_limits_of_lua(name: str) -> None:
    assert len(re.findall(r"^local ", scripts()[name], re.MULTILINE)) < 150  # 200 local variables at most


def test_the_key_map_names_every_script_that_writes_and_every_kind_of_key() -> None:
    text = (lua_dir() / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if name not in text] == []
    keys = SaleKeys("x")
    kinds = [name for name in SaleKeys.__slots__ if name != "prefix"] + ["item:<sku>", "line:<sku>"]
    kinds += [f"{kind}:<sku>" for kind in ("outcome", "drawn", "left")]
    assert [kind for kind in kinds if f"| `{kind}` |" not in text] == []
    assert keys.rate("a", "b") == "{sale:x}:rate:a:b"


def test_every_part_is_used_and_every_part_that_is_used_exists() -> None:
    used = {part for name in NAMES for part in re.findall(r"^--@ part (\w+)$", read(name), re.MULTILINE)}
    assert used == {path.stem for path in (lua_dir() / "parts").glob("*.lua")}
    assert not any("--@ part" in scripts()[name] for name in NAMES)


def read(name: str) -> str:
    return (lua_dir() / f"{name}.lua").read_text(encoding="utf-8")
