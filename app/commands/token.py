"""`fairdrop token BUYER`: be a buyer, for trying things out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.commands.installation import DataDir, settings_of
from app.errors import CannotStart

commands = typer.Typer()


@commands.command()
def token(
    buyer: Annotated[str, typer.Argument(help="The shop's own id of the buyer.")],
    data_dir: DataDir = None,
    valid_s: Annotated[int, typer.Option(min=1, help="s the token stays valid.")] = 3600,
    phone: Annotated[str | None, typer.Option(help="E.164, for example +8613800138000.")] = None,
    language: Annotated[str | None, typer.Option(help="For example zh-CN.")] = None,
) -> None:
    """Print a buyer's JWT, signed with the JWT secret of this installation (for trying things out)."""
    import time

    import jwt

    settings = settings_of(data_dir=data_dir)
    secret = settings.jwt_secret.get_secret_value()
    if not secret:
        from app.data_dir import made_secrets

        file = made_secrets(settings.data_dir).get("jwt_secret")
        if file is None:
            raise CannotStart(
                f"no JWT secret: set FAIRDROP_JWT_SECRET, or start `fairdrop up` in {settings.data_dir} once"
            )
        secret = file.read_text(encoding="ascii").strip()
    now_s = int(time.time())
    optional = {
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
        "phone_number": phone,  # OpenID Connect's names
        "locale": language,
    }
    claims: dict[str, Any] = {"sub": buyer, "iat": now_s, "exp": now_s + valid_s}
    claims |= {name: value for name, value in optional.items() if value}
    print(jwt.encode(claims, secret, algorithm="HS256"))
