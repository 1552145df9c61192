"""The office's OpenAPI document is the truth: generated calls, good and hostile, get documented answers and no 5xx."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.office.conftest import FIRST_KEY, Office, document, open_office, settings_for, write_order

EXAMPLES = 12  # calls generated for each operation: the short form


class _Running:
    """An office on a loop of its own thread: schemathesis calls it from this one."""

    def __init__(self, redis_url: str, database_url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.office: Office = self.run(open_office(settings_for(redis_url, database_url)))
        self.order_no: str = self.run(self._fill())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(300)

    async def _fill(self) -> str:
        await self.office.open_sale("phone-2026")
        await self.office.draft("a-draft")
        return await write_order(self.office, "phone-2026", state="paid")

    def close(self) -> None:
        self.run(self.office.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def running(redis_url: str, database_url: str) -> Iterator[_Running]:
    office = _Running(redis_url, database_url)
    try:
        yield office
    finally:
        office.close()


@pytest.mark.slow
def test_generated_calls_get_documented_answers(running: _Running) -> None:
    schema = schemathesis.openapi.from_url(f"{running.office.url}/openapi.json")
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/live/events"):
            continue  # a stream without an end; tests/office/test_live.py reads it

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def call(case: schemathesis.Case) -> None:
            nonlocal checked
            case.headers = {**(case.headers or {}), "Authorization": f"Bearer {FIRST_KEY}"}
            # Half of the calls name what exists, so that they get beyond 404.
            if "sale" in (case.path_parameters or {}) and checked % 2:
                case.path_parameters["sale"] = "phone-2026"
            if "order_no" in (case.path_parameters or {}) and checked % 2:
                case.path_parameters["order_no"] = running.order_no
            checked += 1
            response = case.call(timeout=180)
            assert response.status_code < 500, (
                f"{case.operation.label}: {response.status_code} {response.text[:500]}"
            )
            case.validate_response(
                response,
                checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
            )

        given(case=operation.as_strategy())(call)()
    assert checked > 300


async def test_the_document_names_every_call_of_the_contract(office: Office) -> None:
    spec = (await office.get("/openapi.json", key=None)).json()
    calls = {f"{method.upper()} {path}" for path, ways in spec["paths"].items() for method in ways}
    sale, order = "/v1/admin/sales/{sale}", "/v1/admin/orders/{order_no}"
    assert {
        "POST /v1/admin/sales", "GET /v1/admin/sales", f"GET {sale}", f"PATCH {sale}", f"DELETE {sale}",
        *(f"POST {sale}/{what}" for what in ("publish", "pause", "resume", "close", "rate", "message", "top-up")),
        f"POST {sale}/cancel-all",
        f"GET {sale}/live", f"GET {sale}/live/events", f"GET {sale}/orders", f"GET {sale}/orders.csv", f"GET {order}",
        f"POST {order}/cancel", f"POST {order}/refund", f"GET {sale}/audit", "GET /v1/admin/providers",
        "POST /v1/admin/providers/{name}/breaker", "GET /v1/admin/providers/{name}/history",
        "GET /v1/admin/journal", "POST /v1/admin/keys", "GET /v1/admin/keys",
        "DELETE /v1/admin/keys/{key_id}", "GET /v1/admin/events", "POST /v1/admin/webhooks", "GET /v1/admin/webhooks",
        "DELETE /v1/admin/webhooks/{endpoint_id}", "POST /v1/hooks/{provider}", "GET /healthz",
        "GET /readyz", "GET /metrics",
    } <= calls  # fmt: skip
    for path, ways in spec["paths"].items():
        for method, operation in ways.items():
            assert operation.get("summary") or operation.get("description"), f"{method} {path}"
            if method == "post" and path.startswith("/v1/admin"):
                names = {parameter["name"] for parameter in operation["parameters"]}
                assert {"Idempotency-Key", "reason", "dry_run"} <= names, path
    assert document()["id"] and spec["components"]["schemas"]["SaleIn"]["examples"]
