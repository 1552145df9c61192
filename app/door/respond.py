"""An answer of the door as a Starlette response: for the typed twins, which may also run without the raw layer."""

from __future__ import annotations

from fastapi import Request, Response

from app.problems import request_id_of
from app.purchase.accept import Answer, Door


def headers_of(request: Request) -> dict[bytes, bytes]:
    """The request's headers as the raw layer sees them: of a repeated header the last one counts."""
    return dict(request.scope["headers"])


def respond(request: Request, answer: Answer) -> Response:
    response = Response(answer.body, status_code=answer.head.status)
    response.raw_headers = [*answer.head.headers]
    if answer.head.status not in (204, 304):  # neither has a body of its own (RFC 9110, 8.6)
        response.raw_headers.append((b"content-length", b"%d" % len(answer.body)))
    if request.scope.get("fairdrop.request_id") is None:
        response.raw_headers.append((b"x-request-id", request_id_of(headers_of(request))))
    return response


def door_of(request: Request) -> Door:
    door: Door = request.app.state.door
    return door
