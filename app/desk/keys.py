"""Operators' keys: made by an admin, shown once, kept as a hash, ended at once."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import Field, StringConstraints

from app.desk.auth import Admin
from app.desk.change import AdminEdits, AdminPosts, Answer, Body, Change
from app.desk.shapes import (
    LIMIT_DEFAULT,
    Cursor,
    KeyOut,
    Limit,
    NewKeyOut,
    Page,
    exact,
    key_out,
    listed,
    read_cursor,
)
from app.desk.wiring import TheDesk, reading
from app.ledger import operators
from app.problems import JsonRoute, refusals, refuse
from app.sale.document import Line

router = APIRouter(tags=["keys"], route_class=JsonRoute)
KEYS = "/v1/admin/keys"
NAME_MAX = 64  # characters
KEYS_MAX = 1_000  # keys that work at once


class KeyIn(Body):
    name: Annotated[Line, StringConstraints(min_length=1, max_length=NAME_MAX)] = Field(
        examples=["Mei, night shift"]
    )
    role: Literal["viewer", "operator", "admin"]


@router.post(
    KEYS,
    status_code=201,
    response_model=NewKeyOut,
    responses=refusals(
        "malformed",
        "auth_missing",
        "forbidden",
        "key_reused",
        "too_many",
        "too_large",
        "not_json",
        "invalid",
        "busy",
    ),
    summary="Make an operator's key",
)
async def create(body: KeyIn, post: AdminPosts) -> Response:
    async def effect(change: Change) -> Answer:
        key, key_id = f"fdk_{secrets.token_urlsafe(32)}", f"key_{secrets.token_hex(8)}"
        async with change.step() as conn:
            if len(await operators.keys(conn, limit=KEYS_MAX)) >= KEYS_MAX:
                raise refuse("too_many", f"There are {KEYS_MAX} keys; revoke one first.")
            made = await operators.insert_key(conn, key_id, body.name, body.role, key)
            detail = {"id": key_id, "name": body.name, "role": body.role}
            return await change.done(
                Answer(201, key_out(made), secret={"key": key}), "key.create", detail=detail
            )

    return await post.once(effect, body)


@router.get(
    KEYS,
    response_model=Page[KeyOut],
    responses=refusals("auth_missing", "forbidden", "invalid", "busy"),
    summary="Keys that work",
)
async def list_keys(
    desk: TheDesk, operator: Admin, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, "keys", cursor)
    after = None if behind is None else (datetime.fromisoformat(behind[0]), str(behind[1]))
    async with reading(desk) as conn:
        rows = await operators.keys(conn, limit=limit, after=after)
    return listed(desk.ring, "keys", limit, rows, key_out, lambda row: [exact(row.created_at), row.id])


@router.delete(
    KEYS + "/{key_id}",
    status_code=204,
    response_class=Response,
    responses=refusals("auth_missing", "forbidden", "no_such_key", "last_admin", "invalid", "busy"),
    summary="Revoke a key, at once",
)
async def revoke(key_id: Annotated[str, Path(pattern=r"^[a-z0-9_]{1,64}$")], edit: AdminEdits) -> Response:
    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            match await operators.revoke(conn, key_id):
                case "no_such_key":
                    raise refuse("no_such_key")
                case "last_admin":
                    raise refuse("last_admin")
                case ended:
                    detail = {"id": key_id, "name": ended.name, "role": ended.role}
                    return await change.done(Answer(204, None), "key.revoke", detail=detail)

    return await edit.once(effect)
