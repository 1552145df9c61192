"""Operators see suppliers' breakers as all processes know them, what happened to them, and override them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from msgspec import structs

from app.breaker import Result, Rules
from app.providers.registry import guard_rules
from app.providers.shared_breaker import SharedBreaker
from app.redis.link import Link
from app.scripts import Scripts
from tests.office.conftest import Office

PROVIDERS = "/v1/admin/providers"


def worker(office: Office, link: Link) -> SharedBreaker:
    """The breaker of a worker."""
    rules = structs.replace(
        guard_rules(office.desk.settings, "payment").breaker, open_ms=30_000, open_max_ms=30_000
    )
    return SharedBreaker("sandbox", rules, Scripts(link), who="w1")


async def fail(breaker: SharedBreaker, times: int) -> None:
    for _ in range(times):
        permit = await breaker.take()
        breaker.settle(permit, Result.FAILURE, "create: http_500")  # type: ignore[arg-type]
        await breaker.idle()


async def shown(office: Office, name: str = "sandbox") -> dict[str, Any]:
    listed = (await office.get(PROVIDERS)).json()["data"]
    return next(one for one in listed if one["name"] == name)


async def test_a_shared_breaker_is_shown_as_it_is_now_with_its_last_transitions(office: Office) -> None:
    report = {
        "kind": "payment",
        "state": "closed",
        "shared": True,
        "calls": 3,
        "in_flight": 2,
        "worker": "w9",
    }
    await office.redis("HSET", "fairdrop:providers", "sandbox", json.dumps(report))
    breaker = worker(office, office.desk.link)
    await fail(breaker, 9)
    found = await shown(office)
    assert (found["state"], found["calls"], found["failures"], found["failure_rate"], found["in_flight"]) == (
        "closed", 9, 9, 100.0, 2,
    )  # fmt: skip
    assert found["history"] == []
    await fail(breaker, 1)
    found = await shown(office)
    assert (found["state"], found["last_error"], found["calls"]) == ("open", "create: http_500", 0)
    assert 0 < found["retry_in_ms"] <= 36_000
    assert abs(found["since_ms"] - time.time() * 1000) < 30_000
    (told,) = found["history"]
    told_of_it = {name: told[name] for name in told if name not in ("at", "at_ms", "open_for_ms")}
    assert told_of_it == {
        "before": "closed", "after": "open", "why": "failure_rate", "calls": 10, "failures": 10, "slow": 0,
        "last_error": "create: http_500", "by": "w1",
    }  # fmt: skip
    assert told["open_for_ms"] >= 24_000
    assert told["at"].endswith("Z") and abs(told["at_ms"] - time.time() * 1000) < 30_000


async def test_an_override_is_told_with_its_operator_and_reaches_a_worker(office: Office) -> None:
    key = await office.key_of("operator")
    answer = await office.post(f"{PROVIDERS}/sandbox/breaker", {"mode": "forced_open"}, key=key)
    assert (answer.status_code, answer.json()["mode"]) == (200, "forced_open")
    again = await office.post(f"{PROVIDERS}/sandbox/breaker", {"mode": "forced_open"}, key=key)
    assert again.status_code == 200
    dry = await office.post(f"{PROVIDERS}/sandbox/breaker", {"mode": "auto"}, key=key, dry_run=True)
    assert dry.status_code == 200
    found = await shown(office)
    assert found["mode"] == "forced_open"
    (told,) = found["history"]
    assert (told["before"], told["after"], told["why"]) == ("closed", "forced_open", "operator")
    assert told["by"].startswith("a operator (key_")
    breaker = worker(office, office.desk.link)
    await breaker.beat()
    assert (breaker.mode, breaker.state.value) == ("forced_open", "forced_open")


async def test_the_history_is_paged_newest_first(office: Office) -> None:
    for mode in ("forced_open", "auto", "disabled", "auto", "metrics_only"):
        await office.post(f"{PROVIDERS}/sandbox/breaker", {"mode": mode})
    seen: list[str] = []
    cursor = None
    for left in (3, 1, 0):
        page = (
            await office.get(
                f"{PROVIDERS}/sandbox/history", limit="2", **({"cursor": cursor} if cursor else {})
            )
        ).json()
        seen += [told["after"] for told in page["data"]]
        cursor = page["next_cursor"]
        assert (cursor is None) is (left == 0)
    assert seen == ["metrics_only", "closed", "disabled", "closed", "forced_open"]
    refused = await office.get(f"{PROVIDERS}/sandbox/history", cursor="made-up")
    assert refused.status_code == 422
    missing = await office.get(f"{PROVIDERS}/nobody/history")
    assert (missing.status_code, missing.json()["code"]) == (404, "no_such_provider")
    assert (await office.get(f"{PROVIDERS}/sandbox-sms/history")).status_code in (200, 404)


@pytest.mark.parametrize(("alone", "state"), [(True, "half_open"), (False, "closed")])
async def test_a_worker_without_redis_a_moment_ago_is_shown_as_it_sees_itself(
    office: Office, alone: bool, state: str
) -> None:
    report = {"kind": "payment", "state": "half_open", "shared": True, "alone": alone}
    await office.redis("HSET", "fairdrop:providers", "sandbox", json.dumps(report))
    await worker(office, office.desk.link).look()
    assert (await shown(office))["state"] == state


def test_the_office_and_the_worker_have_the_same_rules(office: Office) -> None:
    assert guard_rules(office.desk.settings, "sms").breaker == Rules(slow_ms=2_500, lease_ms=11_000)
    assert guard_rules(office.desk.settings, "payment").breaker.open_max_ms == 10_000
