"""What `fairdrop up` keeps in its data directory for others: secrets that it makes once, and where it answers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path

from app.errors import CannotStart

# Secrets that `up` makes once (development), and how: FAIRDROP_<NAME>_FILE points children to them.
MADE_SECRETS: dict[str, Callable[[], str]] = {
    "signing_keys": lambda: secrets.token_urlsafe(48),
    "pii_keys": lambda: secrets.token_hex(32),
    "jwt_secret": lambda: secrets.token_urlsafe(48),
    "operator_key": lambda: secrets.token_urlsafe(32),
    "sandbox_secret": lambda: secrets.token_urlsafe(32),
}


def secrets_dir(data_dir: Path) -> Path:
    return data_dir / "secrets"


def made_secrets(data_dir: Path) -> dict[str, Path]:
    """The files with the development secrets of this data directory, as far as they exist."""
    files = {name: secrets_dir(data_dir) / name for name in MADE_SECRETS}
    return {name: file for name, file in files.items() if file.is_file()}


def read_urls(data_dir: Path) -> dict[str, object]:
    """What a running `up` wrote. CannotStart: there is none."""
    path = data_dir / "urls.json"
    try:
        found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CannotStart(
            f"no {path}: start `fairdrop up` first, or name the office with FAIRDROP_OFFICE_URL"
        ) from None
    except (OSError, ValueError) as error:
        raise CannotStart(f"{path} cannot be read: {error}") from error
    return found
