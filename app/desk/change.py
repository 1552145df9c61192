"""One operator's change: made once under its Idempotency-Key, tried without effect with dry_run, always in the journal.

A POST with the same key and body answers what the first was answered; with another body it is refused. The answer is
kept in the transaction that makes the change. A change of several steps (Postgres, Redis, Postgres) may stop half-way:
the same request again goes on where it stopped, because everything it tells Redis carries `Change.id`.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, StringConstraints
from sqlalchemy.ext.asyncio import AsyncConnection

from app import sealing
from app.desk.auth import needs
from app.desk.wiring import Desk, TheDesk
from app.ledger import idempotency, journal
from app.ledger.operators import Operator, Role
from app.problems import refuse
from app.sale.document import Line

REASON_MAX = 500  # characters
KEY_PATTERN = r"^[\x21-\x7e]{1,128}$"  # visible ASCII

Reason = Annotated[Line, StringConstraints(max_length=REASON_MAX)]


class Body(BaseModel):
    """What every POST may say besides its own fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Reason | None = None


@dataclass(frozen=True)
class Answer:
    """What a change answers. `secret` members are shown, and kept only sealed."""

    status: int
    body: dict[str, Any] | None
    etag: int | None = None
    secret: Mapping[str, str] = field(default_factory=dict)


class _Tried(Exception):
    """A dry run came to its answer: roll back."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class Change:
    """The connection and the name of one change under way."""

    def __init__(
        self, post: Posting, conn: AsyncConnection, name: str | None, request_hash: bytes, reason: str | None
    ) -> None:
        self._post = post
        self._name = name
        self._request_hash = request_hash
        self.conn = conn
        self.operator = post.operator
        self.dry_run = post.dry_run
        self.reason = reason
        who = (
            f"{post.operator.id}\0{name}" if name else f"{post.operator.id}\0{id(self)}\0{request_hash.hex()}"
        )
        # Long enough never to meet another; what Redis and suppliers are told once is told under it.
        self.id = hashlib.blake2b(who.encode(), digest_size=16, person=b"fairdrop-change").hexdigest()

    @asynccontextmanager
    async def step(self) -> AsyncIterator[AsyncConnection]:
        """One transaction of the change."""
        async with self.conn.begin():
            yield self.conn

    async def intend(self) -> None:
        """From this step's commit on, the same key with another body is refused, even if no answer ever comes."""
        if self._name is not None:
            await idempotency.begin(self.conn, self.operator.id, self._name, self._request_hash)

    async def done(
        self,
        answer: Answer,
        action: str,
        *,
        sale: str | None = None,
        detail: Mapping[str, Any] | None = None,
        journalled: bool = False,
    ) -> Answer:
        """Put the change into the journal and keep its answer, in the step that makes it. A dry run ends here."""
        if self.dry_run:
            raise _Tried(answer)
        if self._name is not None:
            await idempotency.keep(
                self.conn, self.operator.id, self._name, self._request_hash, answer.status, self._kept(answer)
            )
        if journalled:
            return answer
        await journal.append(
            self.conn,
            actor=f"{self.operator.name} ({self.operator.id})",
            role=self.operator.role,
            action=action,
            sale=sale,
            reason=self.reason,
            detail=detail,
        )
        return answer

    def _kept(self, answer: Answer) -> dict[str, Any]:
        kept: dict[str, Any] = {"body": answer.body, "etag": answer.etag}
        if answer.secret:
            plain = json.dumps(dict(answer.secret)).encode()
            sealed = sealing.seal(
                self._post.desk.seal_keys, plain, sealing.answer_aad(self.operator.id, self._name)
            )
            kept["sealed"] = b64encode(sealed).decode()
        return kept


Effect = Callable[[Change], Awaitable[Answer]]


@dataclass(frozen=True)
class Posting:
    """A changing request, before its effect."""

    desk: Desk
    operator: Operator
    request: Request
    name: (
        str | None
    )  # Idempotency-Key; None: PATCH and DELETE, which If-Match and their nature make repeatable
    reason: str | None
    dry_run: bool

    async def once(self, effect: Effect, body: BaseModel | None = None) -> Response:
        """Run the effect, or answer as the first time. Refusal 409 `key_reused`: the key belongs to another request."""
        reason = getattr(body, "reason", None) or self.reason
        if self.name is None or self.dry_run:
            async with self.desk.engine.connect() as conn:
                return await self._run(conn, effect, b"", reason)
        request_hash = await self._request_hash()
        async with self.desk.turns.turn(f"{self.operator.id}\0{self.name}"):
            async with self.desk.engine.connect() as conn:
                await idempotency.lock(conn, self.operator.id, self.name)
                await conn.commit()
                try:
                    kept = await idempotency.find(conn, self.operator.id, self.name)
                    await conn.commit()
                    if kept is not None and kept.request_hash != request_hash:
                        raise refuse("key_reused")
                    if kept is not None and kept.status is not None:
                        return self._replay(kept.status, kept.response or {})
                    return await self._run(conn, effect, request_hash, reason)
                finally:
                    await self._unlock(conn)

    async def _unlock(self, conn: AsyncConnection) -> None:
        assert self.name is not None
        try:
            await conn.rollback()
            await idempotency.unlock(conn, self.operator.id, self.name)
            await conn.commit()
        except BaseException:
            await conn.invalidate()  # the session goes, and its locks with it
            raise

    async def _run(
        self, conn: AsyncConnection, effect: Effect, request_hash: bytes, reason: str | None
    ) -> Response:
        try:
            return shown(await effect(Change(self, conn, self.name, request_hash, reason)))
        except _Tried as tried:
            response = shown(Answer(tried.answer.status, tried.answer.body, tried.answer.etag))
            response.headers["Dry-Run"] = "true"
            return response

    async def _request_hash(self) -> bytes:
        """Of method, path and body; a body is the same however its JSON is spaced or ordered."""
        raw = await self.request.body()
        body = json.dumps(json.loads(raw), sort_keys=True) if raw.strip() else "{}"
        return hashlib.sha256(f"{self.request.method}\0{self.request.url.path}\0{body}".encode()).digest()

    def _replay(self, status: int, kept: Mapping[str, Any]) -> Response:
        secret: dict[str, str] = {}
        if kept.get("sealed"):
            plain = sealing.unseal(
                self.desk.seal_keys,
                b64decode(kept["sealed"]),
                sealing.answer_aad(self.operator.id, self.name),
            )
            secret = json.loads(plain)
        response = shown(Answer(status, kept.get("body"), kept.get("etag"), secret))
        response.headers["Idempotency-Replayed"] = "true"
        return response


def shown(answer: Answer) -> Response:
    """The answer as a response; nobody on the way may keep it."""
    headers = {"Cache-Control": "no-store"}
    if answer.etag is not None:
        headers["ETag"] = etag_of(answer.etag)
    if answer.body is None:
        return Response(status_code=answer.status, headers=headers)
    content = json.dumps({**answer.body, **answer.secret}, ensure_ascii=False, allow_nan=False)
    return Response(content, answer.status, headers, media_type="application/json")


def etag_of(version: int) -> str:
    return f'"{version}"'


ReasonQuery = Annotated[Reason | None, Query(description="why; kept in the journal")]
DryRun = Annotated[bool, Query(description="say what would happen, and change nothing")]
KeyHeader = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=KEY_PATTERN,
        description="one for each intended change; the same key and body again is answered as before, for 7 days",
        examples=["3f0c9a5e-publish"],
    ),
]


def posting(role: Role) -> Callable[..., Coroutine[Any, Any, Posting]]:
    """A dependency of POST routes: who, under which key, why, and whether only to try."""
    who = Depends(
        needs(role)
    )  # a default, not Annotated: local names are not known where annotations are read

    async def post(
        request: Request,
        desk: TheDesk,
        idempotency_key: KeyHeader,
        reason: ReasonQuery = None,
        dry_run: DryRun = False,
        operator: Operator = who,
    ) -> Posting:
        return Posting(desk, operator, request, idempotency_key, reason, dry_run)

    return post


def editing(role: Role) -> Callable[..., Coroutine[Any, Any, Posting]]:
    """The same for PATCH and DELETE, which need no key."""
    who = Depends(needs(role))

    async def edit(
        request: Request,
        desk: TheDesk,
        reason: ReasonQuery = None,
        dry_run: DryRun = False,
        operator: Operator = who,
    ) -> Posting:
        return Posting(desk, operator, request, None, reason, dry_run)

    return edit


OperatorPosts = Annotated[Posting, Depends(posting("operator"))]
AdminPosts = Annotated[Posting, Depends(posting("admin"))]
OperatorEdits = Annotated[Posting, Depends(editing("operator"))]
AdminEdits = Annotated[Posting, Depends(editing("admin"))]
