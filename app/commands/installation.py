"""The settings, stores and keys of this installation, for the commands that use them without an office.

What is not set is taken from the `fairdrop up` that runs in the data directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.errors import CannotStart

if TYPE_CHECKING:
    from app.settings import Settings

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Where `up` keeps stores, secrets, logs, urls.json. [default: .fairdrop]"
    ),
]


def settings_of(**given: Any) -> Settings:
    """The settings of this process: options over environment. CannotStart: one sentence for each that is wrong."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(
            f"FAIRDROP_{'_'.join(str(part) for part in one['loc']).upper()}: {one['msg']}"
            for one in error.errors()
        )
        raise CannotStart(wrong) from error


def log_as(settings: Settings, process: str) -> None:
    import structlog

    from app.telemetry import configure_logging

    configure_logging(settings, process)
    for sentence in settings.misspelt(os.environ):
        structlog.get_logger(__name__).warning("unknown_setting", why=sentence)


def with_stores(settings: Settings, *needed: Literal["database", "redis"]) -> Settings:
    """The addresses of these stores: as set, else those of the `fairdrop up` that runs in the data directory."""
    missing = [name for name in needed if not getattr(settings, f"{name}_url")]
    if not missing:
        return settings
    from app.data_dir import read_urls

    urls = read_urls(settings.data_dir)
    return settings.model_copy(update={f"{name}_url": str(urls[name]) for name in missing})


def with_sandbox(settings: Settings) -> Settings:
    """The database as set; else all of the `fairdrop up` that runs in the data directory, its sandbox included."""
    if settings.database_url:
        return settings
    from app.data_dir import made_secrets, read_urls

    urls = read_urls(settings.data_dir)
    found: dict[str, Any] = {"database_url": str(urls["database"]), "sandbox_url": str(urls["sandbox"])}
    if (file := made_secrets(settings.data_dir).get("sandbox_secret")) is not None:
        found["sandbox_secret"] = file.read_text(encoding="ascii").strip()
    return settings_of(data_dir=settings.data_dir, env="development", **found)


def with_pii_keys(settings: Settings) -> Settings:
    """The keys that seal contacts: as set, else those that `fairdrop up` made in the data directory."""
    if settings.pii_keys.get_secret_value():
        return settings
    from pydantic import SecretStr

    from app.data_dir import made_secrets

    file = made_secrets(settings.data_dir).get("pii_keys")
    if file is None:
        raise CannotStart("FAIRDROP_PII_KEYS is missing: contacts could be neither sealed nor found")
    return settings.model_copy(update={"pii_keys": SecretStr(file.read_text(encoding="ascii").strip())})
