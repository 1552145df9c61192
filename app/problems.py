"""Every "no" as one document: RFC 9457 problems, the same from the hot path, from FastAPI and from an unmatched path.

`CODES` is the list of words that a client may rely on; a Refusal with another code is a bug that a test finds.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from app.errors import DidNotHappen, Refusal, Unknown

BODY_MAX_BYTES = 16_384  # api.md; settings.body_max_bytes may lower or raise it for one process
PROBLEM_TYPE = b"application/problem+json"
URN = "urn:fairdrop:problem:"


class Code(NamedTuple):
    """A documented refusal: its HTTP status, a title that never varies, and what the caller should do."""

    status: int
    title: str
    do: str


CODES: dict[str, Code] = {
    "malformed": Code(400, "Malformed", "Send one JSON document in UTF-8."),
    "auth_missing": Code(
        401, "No identity", "Send Authorization: Bearer <JWT> or Authorization: Pass <pass>."
    ),
    "auth_invalid": Code(
        401, "Identity not accepted", "Get a new JWT or pass; this one is bad or has ended."
    ),
    "hook_refused": Code(
        401, "Call-back refused", "`why` says what does not hold: signature, time, merchant."
    ),
    "forbidden": Code(403, "Not allowed", "This caller may not do this."),
    "audience": Code(403, "Not in the audience", "This sale is for other buyers."),
    "challenge_required": Code(
        403, "Challenge required", "Solve `challenge` and ask again with the solution."
    ),
    "pass_required": Code(403, "Pass required", "Get a pass for this sale first."),
    "not_open_yet": Code(403, "Not open yet", "Come back at `line_opens_at`."),
    "not_drawn_yet": Code(403, "Not drawn yet", "The entries are published after the opening."),
    "not_found": Code(404, "Not found", "There is nothing at this address."),
    "no_such_sale": Code(404, "No such sale", "Check the sale's id."),
    "no_such_item": Code(404, "No such item", "Check the sku against the sale's items."),
    "no_such_ticket": Code(404, "No such ticket", "Ask for your newest ticket of the sale."),
    "no_ticket": Code(404, "No ticket", "Join first."),
    "no_such_order": Code(404, "No such order", "Check the order number."),
    "no_such_key": Code(404, "No such key", "Check the key's id."),
    "no_such_webhook": Code(404, "No such webhook", "Check the endpoint's id."),
    "no_such_provider": Code(404, "No such provider", "Check the name against the list of providers."),
    "method_not_allowed": Code(405, "Method not allowed", "See the Allow header."),
    "ticket_exists": Code(
        409, "A live ticket exists", "Use `ticket`, or leave it before joining with another body."
    ),
    "limit_reached": Code(409, "Above the limit", "Ask for no more units than the sale's limit."),
    "already_paid": Code(409, "Already paid", "A paid order is refunded by the shop, not left."),
    "payment_unknown": Code(409, "Payment unknown", "The supplier is being asked; poll the ticket."),
    "not_payable": Code(409, "Not payable", "Only a reserved ticket can be paid."),
    "payment_in_progress": Code(409, "Payment in progress", "Poll the ticket for the link or the result."),
    "key_reused": Code(409, "Idempotency-Key used before", "Use a new key for another request."),
    "sale_exists": Code(409, "Sale exists", "A sale's id is never used again: choose another."),
    "not_published": Code(409, "Not published", "Publish the sale first; a draft is changed with PATCH."),
    "published": Code(409, "Published", "This can be done to a draft only."),
    "fixed_after_publish": Code(
        409, "Too late to change", "See `errors`: what has passed or is public stays."
    ),
    "not_paused": Code(409, "Not paused", "Pause or close the sale first."),
    "wrong_state": Code(409, "Wrong state", "The sale or order is not in a state that allows this."),
    "not_unsold": Code(409, "Not unsold", "No more than `units_left` units can be taken out."),
    "not_cancellable": Code(
        409, "Not cancellable", "Only a reserved order is cancelled; a paid one is refunded."
    ),
    "not_refundable": Code(409, "Not refundable", "Only a paid order is refunded, by no more than was paid."),
    "too_many": Code(409, "Too many", "Remove one first."),
    "last_admin": Code(409, "Last admin", "Make another admin key before this one ends."),
    "changed": Code(412, "Changed meanwhile", "Read the sale again and repeat with its ETag."),
    "if_match_required": Code(428, "If-Match required", "Send If-Match with the ETag of what you have read."),
    "time_without_zone": Code(
        422, "Time without zone", "Give each time an offset, or the document a time_zone."
    ),
    "sale_closed": Code(410, "Sale closed", "The sale is over."),
    "too_large": Code(413, "Body too large", "Send at most 16 KiB."),
    "not_json": Code(415, "Not JSON", "Send Content-Type: application/json."),
    "invalid": Code(422, "Invalid request", "See `errors`."),
    "unknown_channel": Code(
        422, "Unknown channel", "Use one of the sale's channels, and in a sale those that lead to a supplier."
    ),
    "no_captcha": Code(
        422,
        "No captcha verifier",
        "Nobody could get a pass: set FAIRDROP_CAPTCHA_VERIFY_URL and _SECRET for front and office, or choose another "
        "challenge.",
    ),
    "return_url": Code(422, "Return address not allowed", "Use one of the sale's return addresses."),
    "slow_down": Code(429, "Slow down", "Repeat after Retry-After seconds."),
    "line_full": Code(429, "Line full", "Repeat after Retry-After seconds; places may become free."),
    "internal": Code(500, "Our mistake", "Repeat later; tell the operator the request id."),
    "busy": Code(503, "Busy", "Repeat the same request after Retry-After seconds."),
    "draining": Code(503, "Draining", "This process is about to stop; use another."),
}

_BY_STATUS = {
    400: "malformed",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}


class FieldError(BaseModel):
    path: str = Field(description="dotted path of the field", examples=["units"])
    code: str = Field(description="what is wrong with it", examples=["missing"])


class Problem(BaseModel):
    """RFC 9457 problem document."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=[URN + "busy"])
    title: str = Field(examples=["Busy"])
    status: int = Field(examples=[503])
    code: str = Field(description="stable word; the one thing to switch on", examples=["busy"])
    detail: str = Field(examples=["The line is not reachable just now."])
    request_id: str = Field(examples=["9f2c11d0-1a"])
    errors: list[FieldError] = Field(default_factory=list)


def refusals(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may answer these codes: they become part of the OpenAPI document."""
    by_status: dict[int | str, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code].status, []).append(code)
    responses: dict[int | str, dict[str, Any]] = {}
    for status, names in by_status.items():
        response: dict[str, Any] = {
            "description": " · ".join(f"`{name}`: {CODES[name].title}. {CODES[name].do}" for name in names),
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {name: {"value": example(name)} for name in names},
                }
            },
        }
        if status in (429, 503):
            response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
        responses[status] = response
    return responses


def example(code: str) -> dict[str, Any]:
    known = CODES[code]
    errors = [{"path": "units", "code": "missing"}] if code == "invalid" else []
    return {
        "type": URN + code,
        "title": known.title,
        "status": known.status,
        "code": code,
        "detail": known.do,
        "request_id": "9f2c11d0-1a",
        "errors": errors,
    }


def refuse(
    code: str,
    detail: str = "",
    *,
    retry_after_s: int | None = None,
    errors: Sequence[Mapping[str, str]] = (),
    extra: Mapping[str, Any] | None = None,
) -> Refusal:
    """A Refusal with the documented status of its code. Detail defaults to what the caller should do.

    429 and 503 always carry Retry-After: a second, where nobody knows better.
    """
    known = CODES[code]
    if retry_after_s is None and known.status in (429, 503):
        retry_after_s = 1
    return Refusal(
        known.status, code, detail or known.do, retry_after_s=retry_after_s, errors=errors, extra=extra
    )


# --- request ids -----------------------------------------------------------------------------------------------------

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_request_ids = itertools.count(1)
_request_prefix = os.urandom(5).hex().encode()


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The caller's X-Request-Id if it is fit for logs, else one of ours: unique among processes and restarts."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return new_request_id()


def new_request_id() -> bytes:
    return b"%b-%x" % (_request_prefix, next(_request_ids))


def _after_fork() -> None:
    global _request_prefix
    _request_prefix = os.urandom(5).hex().encode()


os.register_at_fork(after_in_child=_after_fork)  # cheaper than a look at the process id on every request


# --- building the document -------------------------------------------------------------------------------------------


def body_of(refusal: Refusal, request_id: bytes) -> bytes:
    """The problem document as bytes."""
    known = CODES.get(refusal.code)
    return msgspec.json.encode(
        {
            "type": URN + refusal.code,
            "title": known.title if known else refusal.code.replace("_", " ").capitalize(),
            "status": refusal.status,
            "code": refusal.code,
            "detail": refusal.detail,
            "request_id": request_id.decode("ascii"),
            "errors": refusal.errors,
            **refusal.extra,
        }
    )


def headers_of(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    """The headers that belong to the refusal itself: type, no-store, Retry-After, WWW-Authenticate."""
    headers = [(b"content-type", PROBLEM_TYPE), (b"cache-control", b"no-store")]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after_s))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="fairdrop"'))
    return headers


def refusal_of(error: BaseException) -> Refusal:
    """What a caller is told about a failure that is no Refusal yet. Stores out of reach are 503, never 500."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, DidNotHappen | Unknown):
        return refuse("busy", "The line is not reachable just now; repeat the same request.", retry_after_s=2)
    return refuse("internal", "Something broke on our side.")


_WORDS = {"missing": "missing", "extra_forbidden": "unknown_field", "value_error": "invalid"}


def field_errors(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """pydantic's errors as [{"path", "code"}]; the same wherever the document was read."""
    told = []
    for error in errors:
        loc = [str(part) for part in error["loc"]]
        if loc and loc[0] == "body":
            loc = loc[1:]
        kind = str(error["type"])
        told.append(
            {
                "path": ".".join(loc),
                "code": _WORDS.get(kind, "wrong_type" if kind.endswith("_type") else kind),
            }
        )
    return told


_SAYS = {
    "missing": "is missing",
    "extra_forbidden": "is no field that is known here",
    "model_type": "should be a JSON object",
    "model_attributes_type": "should be a JSON object",
}


def _says(error: Mapping[str, Any]) -> str:
    """What to do about one of pydantic's errors, for people; never what was given."""
    kind = str(error["type"])
    said = str(error.get("msg") or kind).removeprefix("Value error, ")
    return _SAYS.get(kind) or said[:1].lower() + said[1:]


def invalid(errors: Iterable[Mapping[str, Any]]) -> Refusal:
    found = list(errors)
    told = field_errors(found)
    detail = f"{told[0]['path'] or 'body'}: {_says(found[0])}" if told else ""
    return refuse("invalid", detail, errors=told)


# --- bodies ----------------------------------------------------------------------------------------------------------

_decode_any = msgspec.json.Decoder().decode


def json_of(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no lone surrogates, bounded depth. Refusal 400 `malformed`."""
    try:
        return _decode_any(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise refuse("malformed", "The body is not a JSON document.") from error


def body_refusal(model: type[BaseModel], raw: bytes) -> Refusal:
    """Why the hot path could not read a body: what the typed twin of the route would have said."""
    try:
        if not raw:
            return invalid([{"loc": ("body",), "type": "missing"}])
        model.model_validate(json_of(raw))
    except Refusal as refusal:
        return refusal
    except ValidationError as error:
        return invalid(error.errors())
    return refuse("invalid", "The body cannot be read.")


def is_json(content_type: bytes | None) -> bool:
    """application/json, with or without parameters."""
    if content_type == b"application/json":
        return True
    if content_type is None:
        return False
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


class JsonRoute(APIRoute):
    """A FastAPI route that reads its body as the hot path does: bounded, JSON only, strict. Else 413, 415, 400."""

    body_max_bytes = BODY_MAX_BYTES

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None
        limit = self.body_max_bytes

        async def handler(request: Request) -> Response:
            if takes_body:
                raw = await bounded_body(request, limit)
                if raw:
                    if not is_json(dict(request.scope["headers"]).get(b"content-type")):
                        raise refuse("not_json")
                    # Starlette's own caches: FastAPI then validates exactly what was read here.
                    request._json = json_of(raw)
                request._body = raw
            return await handle(request)

        return handler


async def bounded_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read no further than the limit. Refusal 413 `too_large`."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit_bytes:
        raise refuse("too_large", f"The body is larger than {limit_bytes} bytes.")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise refuse("too_large", f"The body is larger than {limit_bytes} bytes.")
        chunks.append(chunk)
    return b"".join(chunks)


# --- FastAPI ---------------------------------------------------------------------------------------------------------


def answer(request: Request, refusal: Refusal) -> Response:
    """The refusal as a response, with the request's id (given by the outermost layer, or made here)."""
    request_id = request.scope.get("fairdrop.request_id")
    own = request_id is None
    if request_id is None:
        request_id = request_id_of(dict(request.scope["headers"]))
    response = Response(body_of(refusal, request_id), status_code=refusal.status)
    response.raw_headers.extend(headers_of(refusal))
    if own:
        response.raw_headers.append((b"x-request-id", request_id))
    return response


def install(app: FastAPI) -> None:
    """Make an application answer every refusal and failure with a problem document."""

    async def on_refusal(request: Request, error: Exception) -> Response:
        return answer(request, refusal_of(error))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, invalid(error.errors()))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _BY_STATUS.get(error.status_code)
        if code is None:
            code = "invalid" if error.status_code < 500 else "internal"
        refusal = refuse(code)
        refusal.status = error.status_code
        response = answer(request, refusal)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response

    describe = app.openapi

    def openapi() -> dict[str, Any]:
        """The document, with the schema that `refusals` points to."""
        known = app.openapi_schema is not None
        document = describe()
        if not known:
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas["Problem"] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(DidNotHappen, on_refusal)
    app.add_exception_handler(Unknown, on_refusal)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_refusal)
