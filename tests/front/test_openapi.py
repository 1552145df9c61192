"""The OpenAPI document is the truth: complete, with examples; no input breaks it or makes the front answer 5xx."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.front import create_app
from app.problems import CODES, headers_of, refuse
from tests.front.conftest import Front, Open, Shop, settings_for, token, until

ROUTES = {
    ("get", "/v1/time"), ("get", "/v1/sales"), ("get", "/v1/sales/{sale}"), ("get", "/v1/sales/{sale}/board"),
    ("post", "/v1/sales/{sale}/pass"), ("post", "/v1/sales/{sale}/tickets"), ("get", "/v1/sales/{sale}/ticket"),
    ("get", "/v1/tickets/{ticket}"), ("get", "/v1/tickets/{ticket}/events"), ("delete", "/v1/tickets/{ticket}"),
    ("post", "/v1/tickets/{ticket}/payment"), ("get", "/v1/sales/{sale}/draw"),
    ("get", "/v1/sales/{sale}/draw/entries"),
    ("get", "/healthz"), ("get", "/readyz"), ("get", "/metrics"),
}  # fmt: skip


def document() -> dict[str, Any]:
    made: dict[str, Any] = create_app(settings_for("redis://127.0.0.1:1/0")).typed.openapi()
    return made


def test_every_429_and_503_says_when_to_come_again() -> None:
    told = {code for code in CODES if b"retry-after" in dict(headers_of(refuse(code)))}
    assert told == {code for code, known in CODES.items() if known.status in (429, 503)}


def test_every_route_is_documented_with_examples_and_refusals() -> None:
    told = document()
    found = {(method, path) for path, methods in told["paths"].items() for method in methods}
    assert found == ROUTES
    assert "HTTPValidationError" not in json.dumps(told)
    join = told["paths"]["/v1/sales/{sale}/tickets"]["post"]["responses"]
    assert {
        "200",
        "202",
        "400",
        "401",
        "403",
        "404",
        "409",
        "410",
        "413",
        "415",
        "422",
        "429",
        "503",
    } <= join.keys()
    example = join["409"]["content"]["application/problem+json"]["examples"]["ticket_exists"]["value"]
    assert example["code"] == "ticket_exists" and example["status"] == 409
    assert told["components"]["schemas"]["JoinIn"]["examples"]
    assert told["components"]["schemas"]["Problem"]["properties"]["code"]


def test_every_code_that_the_front_refuses_with_is_documented() -> None:
    root = Path(__file__).parents[2] / "app"
    files = [*(root / "buyer").glob("*.py"), *(root / "door").glob("*.py")]
    files += [root / "purchase" / name for name in ("accept.py", "claim.py", "track.py")]
    used = {code for path in files for code in re.findall(r'refuse\(\s*"([a-z_]+)"', path.read_text())}
    assert used <= CODES.keys()
    documented = set(re.findall(r'"code": "([a-z_]+)"', json.dumps(document())))
    undocumented = used - documented - {"not_found"}
    assert not undocumented, undocumented


async def test_the_document_is_served(front: Front) -> None:
    answer = await front.http.get("/openapi.json")
    assert answer.status_code == 200 and answer.json()["openapi"].startswith("3.")


async def test_no_input_breaks_the_document(open_door: Open, shop: Shop) -> None:
    """Schemathesis, in its short form: some dozens of requests a route, valid and not, in a thread of their own."""
    import asyncio

    front = await open_door(pass_rate_per_min=100_000, change_rate_per_min=100_000)
    await shop.publish(units=100_000)
    await shop.publish("soon", opens_in_s=600)
    await until(lambda: front.app.door.snapshots.get("soon"))
    joined = [(await front.join(sale, "fuzz")).json()["ticket"] for sale in ("x", "soon")]
    await shop.mark("x", 1, b"r", version=2)
    trouble: list[str] = []
    calls = 0

    def fuzz() -> None:
        nonlocal calls
        schema = schemathesis.openapi.from_dict(front.app.typed.openapi())
        for result in schema.get_all_operations():
            assert isinstance(result, Ok)
            operation = result.ok()
            if operation.path == "/v1/tickets/{ticket}/events":
                continue  # a stream has no end; tests/front/test_stream.py

            def send(case: Any, operation: Any = operation) -> None:
                nonlocal calls
                calls += 1
                parameters = case.path_parameters or {}
                if "sale" in parameters and calls % 2:
                    parameters["sale"] = ("x", "soon")[calls // 2 % 2]
                if "ticket" in parameters and calls % 2:
                    parameters["ticket"] = joined[calls // 2 % 2]
                if calls % 5:
                    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {token('fuzz')}"}
                response = case.call(base_url=front.url, timeout=180)
                case.validate_response(
                    response,
                    checks=[
                        not_a_server_error,
                        status_code_conformance,
                        content_type_conformance,
                        response_schema_conformance,
                    ],
                )

            for generation in ("positive", "negative"):
                mode = schemathesis.GenerationMode(generation)
                strategy = operation.as_strategy(generation_mode=mode)
                try:
                    run(strategy, send)
                except Exception as error:  # noqa: BLE001 - whatever schemathesis finds is reported below
                    if "Unsatisfiable" not in type(error).__name__:
                        trouble.append(f"{operation.method} {operation.path}: {error}")

    def run(strategy: Any, send: Any) -> None:
        from hypothesis import given

        @hypothesis_settings(
            max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=strategy)
        def cases(case: Any) -> None:
            send(case)

        cases()

    await asyncio.to_thread(fuzz)
    assert not trouble, "\n\n".join(trouble)
    assert calls > 150
