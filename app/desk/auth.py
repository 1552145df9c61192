"""Who is at the desk: `Authorization: Bearer <key>`, looked up at every request, so that a revoked key ends at once.

viewer reads; operator also runs sales, orders and breakers; admin also makes keys and webhooks.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.desk.wiring import TheDesk
from app.ledger import operators
from app.ledger.operators import Operator, Role
from app.problems import refuse

KEY_MAX = 200  # characters; a longer one cannot be ours and is not worth hashing

_bearer = HTTPBearer(
    auto_error=False, scheme_name="OperatorKey", description="an operator's key (`fairdrop key`)"
)


def needs(role: Role) -> Callable[..., Coroutine[Any, Any, Operator]]:
    """A dependency: the operator whose key this is. 401 without a working key, 403 if the role does not reach."""

    async def operator(
        desk: TheDesk, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Operator:
        if given is None:
            raise refuse("auth_missing", "Send Authorization: Bearer <operator's key>.")
        found = None
        if 0 < len(given.credentials) <= KEY_MAX:
            async with desk.engine.connect() as conn:
                found = await operators.find(conn, given.credentials)
        if found is None:
            raise refuse("auth_invalid", "This key is unknown or has been revoked.")
        if not found.may(role):
            raise refuse("forbidden", f"This needs the role {role}; the key's role is {found.role}.")
        return found

    return operator


Viewer = Annotated[Operator, Depends(needs("viewer"))]
Admin = Annotated[Operator, Depends(needs("admin"))]
