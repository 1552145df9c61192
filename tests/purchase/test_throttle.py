"""How much slower: what begins a slowdown, how far it goes, and that it ends by itself. Pure; no clock, no store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.purchase.degrade.throttle import Limits, Signs, Slow, Throttle, good, worst

CALM = Signs()
DOWN = Signs(payment_out=True)
LIMITS = Limits()


def play(
    throttle: Throttle, *looks: tuple[int, Signs], served: int = 40_000, wanted: int = -1
) -> list[Slow | None]:
    return [throttle.look(now, signs, served, wanted) for now, signs in looks]


@pytest.mark.parametrize(
    ("signs", "reason", "well"),
    [
        (Signs(), None, True),
        (Signs(payment_out=True, link_wait_s=99, confirm_lag_s=99), "payment_down", False),
        (Signs(link_wait_s=20.0), None, False),
        (Signs(link_wait_s=20.1, confirm_lag_s=99), "payment_slow", False),
        (Signs(link_wait_s=10.0), None, True),
        (Signs(confirm_lag_s=5.0), None, False),
        (Signs(confirm_lag_s=5.01), "confirm_lag", False),
        (Signs(confirm_lag_s=2.5), None, True),
    ],
)
def test_what_is_bad_what_is_good_and_what_is_neither(signs: Signs, reason: str | None, well: bool) -> None:
    assert (worst(signs, LIMITS), good(signs, LIMITS)) == (reason, well)


def test_a_slowdown_begins_after_a_second_at_half_of_what_was_served() -> None:
    said = play(Throttle(LIMITS), (0, DOWN), (999, DOWN), (1_000, DOWN))
    assert said == [None, None, Slow(20_000, 40_000, "payment_down")]


def test_a_short_trouble_begins_nothing() -> None:
    assert play(Throttle(LIMITS), (0, DOWN), (900, CALM), (1_500, DOWN), (2_400, DOWN)) == [None] * 4


def test_it_halves_each_step_down_to_the_least() -> None:
    said = play(Throttle(LIMITS), *((500 * n, DOWN) for n in range(30)))
    rates = [slow.rate_milli for slow in said if slow is not None]
    assert rates[:7] == [20_000, 20_000, 10_000, 10_000, 5_000, 5_000, 2_500]
    assert rates[-1] == 1_000


def test_between_good_and_bad_the_rate_stays() -> None:
    throttle = Throttle(LIMITS, Slow(5_000, 40_000, "confirm_lag"))
    said = play(throttle, *((500 * n, Signs(confirm_lag_s=3.0)) for n in range(60)))
    assert set(said) == {Slow(5_000, 40_000, "confirm_lag")}


def test_it_gives_back_a_tenth_a_step_once_all_has_been_good_and_then_it_is_over() -> None:
    throttle = Throttle(LIMITS, Slow(1_000, 40_000, "payment_down"))
    said = play(throttle, *((500 * n, CALM) for n in range(40)))
    rates = [slow.rate_milli if slow else None for slow in said]
    assert rates[:9] == [1_000, 1_000, 1_000, 1_000, 5_000, 5_000, 9_000, 9_000, 13_000]
    assert said[24] is None  # 12 s
    assert said[-1] is None


def test_the_operators_rate_is_where_it_starts_if_that_is_lower() -> None:
    (_, said) = play(Throttle(LIMITS), (0, DOWN), (1_000, DOWN), served=90_000, wanted=10_000)
    assert said == Slow(5_000, 10_000, "payment_down")


def test_a_sale_that_serves_nobody_starts_at_the_least() -> None:
    (_, said) = play(Throttle(LIMITS), (0, DOWN), (1_000, DOWN), served=0)
    assert said == Slow(1_000, 1_000, "payment_down")


def test_the_reason_is_the_one_of_now() -> None:
    throttle = Throttle(LIMITS, Slow(5_000, 40_000, "payment_down"))
    (said,) = play(throttle, (0, Signs(confirm_lag_s=60.0)))
    assert said is not None
    assert said.reason == "confirm_lag"


SIGNS = st.builds(
    Signs,
    payment_out=st.booleans(),
    link_wait_s=st.floats(0, 60),
    confirm_lag_s=st.floats(0, 20),
)
LOOKS = st.lists(
    st.tuples(st.integers(0, 3_000), SIGNS, st.integers(0, 200_000), st.sampled_from([-1, 1_000, 30_000])),
    max_size=60,
)


@given(LOOKS)
def test_whatever_it_sees_the_rate_is_bounded_falls_only_when_bad_and_rises_only_when_good(
    looks: list[tuple[int, Signs, int, int]],
) -> None:
    throttle, now = Throttle(LIMITS), 0
    for gap, signs, served, wanted in looks:
        before, now = throttle.slow, now + gap
        after = throttle.look(now, signs, served, wanted)
        reason = worst(signs, LIMITS)
        if after is not None:
            assert LIMITS.least_milli <= after.rate_milli <= after.base_milli
        if before is None and after is not None:
            assert reason == after.reason
        if before is not None and (after is None or after.rate_milli > before.rate_milli):
            assert good(signs, LIMITS)
        if before is not None and after is not None:
            assert after.base_milli == before.base_milli
            assert after.rate_milli >= int(before.rate_milli * LIMITS.cut)
            if after.rate_milli < before.rate_milli:
                assert reason is not None


@given(LOOKS)
def test_whatever_it_has_seen_it_ends_by_itself_within_fifteen_good_seconds(
    looks: list[tuple[int, Signs, int, int]],
) -> None:
    throttle, now = Throttle(LIMITS), 0
    for gap, signs, served, wanted in looks:
        now += gap
        throttle.look(now, signs, served, wanted)
    for _ in range(30):
        now += 500
        last = throttle.look(now, CALM, 0, -1)
    assert last is None
