"""Writes docs/settings.md from app/settings.py:  python -m docs.make_settings"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pydantic import SecretStr

from app.settings import SECRETS, Settings

HEAD = """# Settings

Made from `app/settings.py` by `python -m docs.make_settings`; do not edit. Every setting is an environment variable;
those marked *file* may also be given as `<NAME>_FILE`, the path of a file that holds the value. An empty value is the
same as none. `fairdrop up` and `fairdrop demo` are development and make the secrets that are missing.

| variable | default | what, and its unit |
|---|---|---|
"""


def document() -> str:
    """The whole text of docs/settings.md."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, list):
            default = ",".join(default)
        words = (field.description or "").replace("|", "\\|")
        choices = [str(value) for value in get_args(field.annotation) if isinstance(value, str)]
        if choices:
            words += f" ({', '.join(f'`{choice}`' for choice in choices)})"
        if name in SECRETS:
            words += " — *file*"
        shown = f"`{default}`" if str(default) else ""
        lines.append(f"| `FAIRDROP_{name.upper()}` | {shown} | {words} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(document(), encoding="utf-8")
