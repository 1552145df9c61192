"""Settings come from the environment, secrets also from files, and what is wrong is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import CannotStart
from app.settings import SECRETS, Settings


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_be_the_content_of_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    file.write_text("  from the file\n")
    monkeypatch.setenv(f"FAIRDROP_{name.upper()}_FILE", str(file))
    value = getattr(Settings(), name)
    assert (value if isinstance(value, str) else value.get_secret_value()) == "from the file"


def test_a_secret_file_that_cannot_be_read_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAIRDROP_JWT_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(
        CannotStart, match=r"^FAIRDROP_JWT_SECRET_FILE: cannot read .*: No such file or directory$"
    ):
        Settings()


def test_an_empty_value_is_the_same_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x")
    monkeypatch.setenv("FAIRDROP_FRONT_PORT", "")
    monkeypatch.setenv("FAIRDROP_JWT_SECRET", "")
    monkeypatch.setenv("FAIRDROP_JWT_SECRET_FILE", str(file))
    settings = Settings()
    assert settings.front_port == 8080
    assert settings.jwt_secret.get_secret_value() == "x"


def test_no_secret_is_in_a_printed_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRDROP_SIGNING_KEYS", "hush-hush")
    assert "hush-hush" not in repr(Settings())


def test_production_is_the_default() -> None:
    assert not Settings().development


def test_a_misspelt_name_is_said_with_the_one_that_may_be_meant() -> None:
    given = [
        "PATH",
        "FAIRDROP_REDIS_URL",
        "FAIRDROP_JWT_SECRET_FILE",
        "FAIRDROP_ORDER_BACKLOG_MAX",
        "FAIRDROP_XYZZY",
    ]
    assert Settings.misspelt(given) == [
        "FAIRDROP_ORDER_BACKLOG_MAX is no setting; FAIRDROP_ORDERS_BACKLOG_MAX?",
        "FAIRDROP_XYZZY is no setting",
    ]
