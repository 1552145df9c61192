"""Routes: the same key goes the same way everywhere, weights hold, operators' changes arrive, nonsense is refused."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import keys
from app.errors import CannotStart, DidNotHappen
from app.providers import routes
from app.providers.registry import open_providers
from app.providers.routes import Routes, in_turn
from app.redis.link import Link
from app.settings import Settings
from tests.providers.server import until

NAMES = st.text("abcdefgh-", min_size=1, max_size=8)
WEIGHTED = st.dictionaries(
    NAMES, st.integers(0, routes.WEIGHT_MAX), min_size=1, max_size=routes.SUPPLIERS_MAX
)
KEYS = st.text(max_size=30)


@given(WEIGHTED, KEYS)
def test_every_supplier_is_tried_once_and_backups_last_in_their_order(
    route: dict[str, int], key: str
) -> None:
    found = in_turn(route, key)
    assert sorted(found) == sorted(route)
    backups = [name for name, weight in route.items() if weight == 0]
    assert found[len(found) - len(backups) :] == backups
    assert in_turn(dict(route), key) == found


@given(WEIGHTED, KEYS, st.data())
def test_taking_a_supplier_away_moves_nobody_elses_keys(
    route: dict[str, int], key: str, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(route)))
    left = {name: weight for name, weight in route.items() if name != gone}
    assert in_turn(left, key) == [name for name in in_turn(route, key) if name != gone]


@given(WEIGHTED, KEYS, st.data())
def test_more_weight_never_moves_a_supplier_back(
    route: dict[str, int], key: str, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(route)))
    more = {**route, name: data.draw(st.integers(route[name], routes.WEIGHT_MAX))}
    assert in_turn(more, key).index(name) <= in_turn(route, key).index(name)
    rest = [other for other in in_turn(route, key) if other != name]
    assert [other for other in in_turn(more, key) if other != name] == rest


def test_shares_are_as_the_weights_say() -> None:
    first = Counter(in_turn({"a": 3, "b": 1, "c": 0}, f"ORDER{number}")[0] for number in range(20_000))
    assert first["c"] == 0
    assert abs(first["a"] / 20_000 - 0.75) < 0.02  # 6.5 standard deviations, and the keys are fixed


def test_the_choice_never_changes_between_releases() -> None:
    """Held to by value: an order under way must find the same supplier after an upgrade."""
    shown = ["".join(in_turn({"a": 1, "b": 1, "c": 2}, f"ORDER{number}")) for number in range(6)]
    assert shown == ["cab", "cab", "cba", "cba", "bca", "cab"]


KNOWS = {
    "stripe": ("stripe-embedded",),
    "alipay": ("alipay-qr",),
    "sandbox": ("sandbox-qr",),
    "sandbox-2": ("sandbox-qr",),
}


@pytest.mark.parametrize(
    ("channel", "route"),
    [
        ("stripe", {"stripe": 1}),
        ("alipay-qr", {"alipay": 1}),
        ("sandbox-qr", {"sandbox": 1, "sandbox-2": 0}),
        ("sandbox-2", {"sandbox-2": 1}),
        ("card", {"alipay": 3, "stripe": 1}),
        ("of a sale published long ago", {"stripe": 1}),
    ],
)
def test_a_channel_is_served_by_its_route_or_by_those_who_know_it(
    channel: str, route: dict[str, int]
) -> None:
    found = Routes(KNOWS, ["twilio"], payment_routes='{"card": {"alipay": 3, "stripe": 1}}')
    assert found.route("payment", channel) == route
    assert (channel in found.channels()) == (" " not in channel)


def test_texts_go_to_the_preferred_supplier_first() -> None:
    assert Routes({}, ["b", "a"]).order("sms", None, "X") == ["b", "a"]
    assert Routes({}, []).order("sms", None, "X") == []
    assert Routes({}, ["b", "a"], sms_route='{"a": 1}').order("sms", None, "X") == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"card": ["stripe"]}', "not like"),
        ('{"card": {"stripe": -1}}', "not like"),
        ('{"card": {"stripe": 1.5}}', "not like"),
        ('{"card": {"paypal": 1}}', "'paypal' is no supplier in use; there are: stripe, alipay"),
        ('{"card": {}}', "1 to 16"),
        ("card", "not like"),
    ],
)
def test_a_setting_that_is_no_route_is_refused_with_a_sentence(text: str, said: str) -> None:
    with pytest.raises(CannotStart, match=said):
        Routes(KNOWS, [], payment_routes=text)
    with pytest.raises(CannotStart, match="FAIRDROP_SMS_ROUTE"):
        Routes(KNOWS, ["twilio"], sms_route=text)


def test_what_operators_set_goes_before_the_settings_and_nonsense_is_left_out() -> None:
    found = Routes(KNOWS, ["twilio"], payment_routes='{"card": {"alipay": 1}}')
    found.take(
        {
            b"payment:card": b'{"stripe": 2, "gone": 5}',
            b"payment:x": b"[]",
            b"payment:\xff": b"{}",
            b"sms": b'{"gone": 1}',
        }
    )
    assert found.route("payment", "card") == {"stripe": 2}
    assert found.route("sms", None) == {"twilio": 1}  # all of it unknown here: as if nothing was set
    assert found.is_live("payment", "card") and not found.is_live("payment", "x")
    found.take({})
    assert found.route("payment", "card") == {"alipay": 1}


async def test_a_change_is_live_within_a_second_and_stays_while_redis_is_away(redis_url: str) -> None:
    providers = open_providers(
        Settings(env="development", payment_also="sandbox-2", sandbox_2_url="http://127.0.0.1:1")
    )
    link, stopping = Link(redis_url, name="test", deadline_s=20.0), asyncio.Event()
    await link.start()
    following = asyncio.create_task(routes.run(link, providers.routes, stopping))
    try:
        assert providers.payment_for("sandbox", "X") == "sandbox"
        await link.call("HSET", keys.PROVIDER_ROUTES, "payment:sandbox", '{"sandbox-2": 1}')
        assert routes.EVERY_S < 1.0  # on a busy machine a look may take longer, which is not its fault
        await until(lambda: providers.payment_for("sandbox", "X") == "sandbox-2")
        await link.close()
        await asyncio.sleep(0)
        with pytest.raises(DidNotHappen):
            await providers.routes.refresh(link)
        assert providers.payment_for("sandbox", "X") == "sandbox-2"
    finally:
        stopping.set()
        await following
        await link.close()
        await providers.aclose()


async def test_a_payment_goes_to_the_first_whose_breaker_is_not_open() -> None:
    providers = open_providers(
        Settings(env="development", payment_also="sandbox-2", sandbox_2_url="http://127.0.0.1:1")
    )
    assert providers.payment_for("sandbox", "X", but=["sandbox"]) == "sandbox-2"
    providers.payment["sandbox"].guard.breaker.set_mode("forced_open")
    assert providers.payment_for("sandbox", "X") == providers.payment_now("sandbox", "X") == "sandbox-2"
    providers.payment["sandbox-2"].guard.breaker.set_mode("forced_open")
    assert providers.payment_for("sandbox", "X") is None
    assert providers.payment_now("sandbox", "X") == "sandbox"  # nobody is well: it waits for its first
    await providers.aclose()
