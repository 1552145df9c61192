"""The draw: a bijection, the same in Lua and Python, uniform, committed to in advance."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis as redis_sync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import draw
from app.resources import lua_dir

KEYS = st.integers(0, 2**160 - 1).map("{:040x}".format)


def ranks(key: str, n: int) -> list[int]:
    keys = draw.round_keys(key, n)
    return [draw.rank_of(seq, n, keys) for seq in range(1, n + 1)]


def key_of(number: int) -> str:
    return hashlib.sha1(b"test %d" % number).hexdigest()


def chi_square_limit(freedom: int) -> float:
    """The 99.99 % point (Wilson-Hilferty): a fair draw passes 9,999 times of 10,000, and the keys here are fixed."""
    z = 3.719
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: Sequence[int], cells: int) -> float:
    expected = sum(counts) / cells
    return sum((count - expected) ** 2 for count in counts) / expected + (cells - len(counts)) * expected


@given(key=KEYS, n=st.integers(1, 2_000))
@settings(max_examples=60, deadline=None)
def test_everybody_has_a_rank_and_no_two_the_same(key: str, n: int) -> None:
    found = ranks(key, n)
    assert sorted(found) == list(range(1, n + 1))
    keys = draw.round_keys(key, n)
    assert [draw.seq_of(rank, n, keys) for rank in found] == list(range(1, n + 1))


@given(key=KEYS, n=st.integers(1, 10**7), data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_inverse_finds_the_ticket_in_draws_of_any_size(key: str, n: int, data: st.DataObject) -> None:
    seq = data.draw(st.integers(1, n))
    keys = draw.round_keys(key, n)
    rank = draw.rank_of(seq, n, keys)
    assert 1 <= rank <= n
    assert draw.seq_of(rank, n, keys) == seq


@pytest.mark.parametrize("n", [0, 1, 5])
def test_only_the_tickets_of_the_draw_have_ranks(n: int) -> None:
    keys = draw.round_keys("00" * 20, n)
    for outside in (0, -1, n + 1):
        with pytest.raises(ValueError, match="not in a draw"):
            draw.rank_of(outside, n, keys)
        with pytest.raises(ValueError, match="not in a draw"):
            draw.seq_of(outside, n, keys)


class Lua:
    """lua/parts/draw.lua alone, through EVAL."""

    def __init__(self, url: str) -> None:
        self.client = redis_sync.Redis.from_url(url)
        self.part = "#!lua\n" + (lua_dir() / "parts" / "draw.lua").read_text(encoding="utf-8")

    def __call__(self, function: str, key: str, n: int, values: Sequence[int]) -> list[int]:
        text = (
            f"{self.part}\nlocal D, found = draw_keys(ARGV[1], tonumber(ARGV[2])), {{}}\n"
            f"for i = 3, #ARGV do found[i - 2] = {function}(D, tonumber(ARGV[i])) end\nreturn found"
        )
        reply: Any = self.client.eval(text, 0, key, n, *values)
        return list(reply)


@pytest.fixture
def lua(redis_url: str) -> Iterator[Lua]:
    lua = Lua(redis_url)
    yield lua
    lua.client.close()


@pytest.mark.stores_matrix
@given(key=KEYS, n=st.one_of(st.integers(1, 50), st.integers(1, 10**8)), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lua_and_python_compute_the_same_ranks(lua: Lua, key: str, n: int, data: st.DataObject) -> None:
    seqs = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=20))
    keys = draw.round_keys(key, n)
    expected = [draw.rank_of(seq, n, keys) for seq in seqs]
    assert lua("rank_of", key, n, seqs) == expected
    assert lua("seq_of", key, n, expected) == seqs


@pytest.mark.parametrize("n", [2, 3, 4])
def test_in_small_draws_every_order_is_equally_likely(n: int) -> None:
    tries = 3_000 * math.factorial(n) // math.factorial(2)
    counts = Counter(tuple(ranks(key_of(number), n)) for number in range(tries))
    orders = math.factorial(n)
    assert len(counts) == orders
    assert chi_square(list(counts.values()), orders) < chi_square_limit(orders - 1)


@pytest.mark.parametrize("n", [5, 7, 10, 30])
def test_every_ticket_gets_every_rank_equally_often(n: int) -> None:
    tries = 20_000 // n * 5
    counts: Counter[tuple[int, int]] = Counter()
    for number in range(tries):
        counts.update(enumerate(ranks(key_of(number), n)))
    assert chi_square(list(counts.values()), n * n) < chi_square_limit((n - 1) ** 2)


def test_first_and_last_of_ten_thousand_are_spread_evenly_over_the_ranks() -> None:
    n, tries, cells = 10_000, 4_000, 50
    for seq in (1, 2, 5_000, 9_999, 10_000):
        counts = Counter(
            draw.rank_of(seq, n, draw.round_keys(key_of(number), n)) * cells // (n + 1)
            for number in range(tries)
        )
        assert chi_square(list(counts.values()), cells) < chi_square_limit(cells - 1)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (1, 101), (1, 100), (4_321, 4_322), (1, 10_000)])
def test_two_who_joined_together_are_not_drawn_together(one: int, other: int) -> None:
    """Neighbours, and seqs that share a row or a column of the rectangle: the weak spot of a Feistel network."""
    n, tries, cells = 10_000, 5_000, 10
    counts: Counter[tuple[int, int]] = Counter()
    for number in range(tries):
        keys = draw.round_keys(key_of(number), n)
        counts[
            draw.rank_of(one, n, keys) * cells // (n + 1), draw.rank_of(other, n, keys) * cells // (n + 1)
        ] += 1
    assert chi_square(list(counts.values()), cells * cells) < chi_square_limit(cells * cells - 1)


def test_one_draw_of_ten_thousand_looks_like_a_shuffle() -> None:
    """Fixed points, ascents and cycles of many draws are as often as in random permutations."""
    n, tries = 1_000, 300
    fixed = ascents = cycles = 0
    for number in range(tries):
        found = ranks(key_of(number), n)
        fixed += sum(rank == seq for seq, rank in enumerate(found, 1))
        ascents += sum(a < b for a, b in itertools.pairwise(found))
        seen: set[int] = set()
        for seq in range(1, n + 1):
            if seq not in seen:
                cycles += 1
                while seq not in seen:
                    seen.add(seq)
                    seq = found[seq - 1]
    harmonic = sum(1 / k for k in range(1, n + 1))
    assert abs(fixed / tries - 1) < 4 / math.sqrt(tries)
    assert abs(ascents / tries - (n - 1) / 2) < 4 * math.sqrt((n + 1) / 12 / tries)
    assert abs(cycles / tries - harmonic) < 4 * math.sqrt(harmonic / tries)


def test_a_walk_is_short() -> None:
    """The rectangle is hardly larger than the draw, so nearly every rank takes one pass of the rounds."""
    for n in (2, 3, 5, 17, 1_000, 12_345, 10**6 + 1, 10**7):
        keys = draw.round_keys("00" * 20, n)
        assert n <= keys.a * keys.b < n + keys.a
        assert max(keys.a, keys.b) ** 2 < 2**27  # halves stay far below the prime


def test_products_stay_exact_in_a_double() -> None:
    assert (draw.PRIME - 1) ** 2 + 2 * draw.PRIME < 2**51
    assert all(draw.PRIME % divisor for divisor in range(2, math.isqrt(draw.PRIME) + 1))


def test_the_chain_binds_sale_item_epoch_seed_and_every_ticket_in_order() -> None:
    start = draw.chain_start("x", "A", 1, "00" * 32)
    hashes = [random.Random(n).randbytes(10) for n in range(5)]
    head = draw.chain_head(start, hashes)
    others = [
        draw.chain_head(draw.chain_start("y", "A", 1, "00" * 32), hashes),
        draw.chain_head(draw.chain_start("x", "B", 1, "00" * 32), hashes),
        draw.chain_head(draw.chain_start("x", "A", 2, "00" * 32), hashes),
        draw.chain_head(draw.chain_start("x", "A", 1, "01" * 32), hashes),
        draw.chain_head(start, hashes[:-1]),
        draw.chain_head(start, [*hashes[1:], hashes[0]]),
        draw.chain_head(start, [*hashes[:2], bytes(10), *hashes[3:]]),
    ]
    assert len({head, *others}) == len(others) + 1


FACTS = {
    "epoch": "1",
    "freeze_ms": "50",
    "opens_ms": "60",
    "seed": "ab" * 32,
    "seed_hash": "cd",
    "beacon_source": "drand",
}
ITEM = {"early": "2", "chain": "ch", "drawn": "0", "drawn_key": "", "beacon_used": ""}


def test_nothing_is_published_that_would_help_to_choose() -> None:
    before = draw.document("x", FACTS, {"A": ITEM}, now_ms=49)
    assert before["seed_hash"] == "cd"
    assert (before["seed"], before["entries"], before["items"][0]["n"], before["items"][0]["chain"]) == (
        None,
    ) * 4
    frozen = draw.document("x", FACTS | {"beacon_value": "b"}, {"A": ITEM}, now_ms=50)
    assert (frozen["items"][0]["n"], frozen["items"][0]["chain"], frozen["beacon"]["value"]) == (2, "ch", "b")
    assert (frozen["seed"], frozen["entries"]) == (None, None)
    waits = draw.document("x", FACTS, {"A": ITEM, "B": ITEM | {"drawn": "1"}}, now_ms=60)
    assert waits["seed"] is None  # A waits for its beacon
    drawn = ITEM | {"drawn": "1", "drawn_key": "k", "beacon_used": "b"}
    opened = draw.document("x", FACTS, {"A": drawn, "B": ITEM | {"early": "0"}}, now_ms=60)
    assert (opened["seed"], opened["entries"]) == ("ab" * 32, "/v1/sales/x/draw/entries")
    assert (opened["items"][0]["key"], opened["items"][0]["beacon_used"]) == ("k", "b")
    assert (
        draw.document("x", FACTS | {"beacon_source": "none"}, {"A": drawn}, now_ms=60)["trust"] == "operator"
    )


def test_entries_name_every_ticket_hash_with_its_seq() -> None:
    lines = list(draw.entry_lines("A", b"0123456789abcdefghij", first_seq=5))
    assert lines == [
        b'{"sku":"A","seq":5,"ticket_hash":"30313233343536373839"}\n',
        b'{"sku":"A","seq":6,"ticket_hash":"6162636465666768696a"}\n',
    ]


def test_the_published_algorithm_can_be_followed_without_our_code() -> None:
    """Written from the text of `algorithm()` alone, and held to its test vectors."""

    def rank(key: str, n: int, seq: int) -> int:
        p = 33554393
        a = math.isqrt(n - 1) + 1 if n > 1 else 1
        b = math.ceil(n / a)
        x = seq - 1
        while True:
            left, right = x % a, x // a
            for i in range(1, 9):
                digits = hashlib.sha1(f"{key}:{i}".encode()).hexdigest()
                k1, k2, k3 = (int(digits[at : at + 12], 16) % p for at in (0, 12, 24))
                v = right if i % 2 else left
                f = ((((v + k1) % p) ** 2 + k2) % p) ** 2 + k3
                if i % 2:
                    left = (left + f % p) % a
                else:
                    right = (right + f % p) % b
            x = right * a + left
            if x < n:
                return x + 1

    vectors = draw.algorithm()["test_vectors"]
    assert len(vectors) == 6
    for vector in vectors:
        for seq, expected in vector["ranks"].items():
            assert rank(vector["key"], vector["n"], int(seq)) == expected


def test_the_vectors_never_change() -> None:
    """A release that drew differently would contradict what was committed to before it."""
    known = {vector["n"]: vector["ranks"] for vector in draw.algorithm()["test_vectors"]}
    assert known[10] == KNOWN_10
    assert known[1_000_000] == KNOWN_1000000


KNOWN_10 = {"1": 1, "2": 4, "5": 9, "9": 6, "10": 7}
KNOWN_1000000 = {"1": 268344, "2": 57837, "500000": 754649, "999999": 179101, "1000000": 251741}
