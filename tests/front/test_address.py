"""The buyer's address is the nearest hop that is no proxy of ours, whatever anybody wrote before it."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.door.address import address_of, networks
from app.errors import CannotStart

OURS = networks("10.0.0.0/8, 127.0.0.1, 2001:db8::/32")
IPS = st.ip_addresses().map(str)


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # not a proxy of ours: its header is anybody's word
        ("10.0.0.1", [], "10.0.0.1"),  # the proxy tells nothing
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.7"], "203.0.113.7"),  # a buyer's own header before the proxy's word
        ("10.0.0.1", ["6.6.6.6", "203.0.113.7, 10.9.9.9"], "203.0.113.7"),  # two proxies, two headers
        ("10.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
        ("10.0.0.1", ["[2001:db9::1]:443"], "2001:db9::1"),
        ("10.0.0.1", ["2001:0db9:0::0001"], "2001:db9::1"),
        ("::ffff:10.0.0.1", ["::ffff:203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["unknown"], None),
        (
            "10.0.0.1",
            ["203.0.113.7, _hidden"],
            None,
        ),  # what our proxy said is no address: nothing before it counts
        ("10.0.0.1", ["203.0.113.7,"], None),
        ("testclient", [], None),
        (None, ["203.0.113.7"], None),
        ("fe80::1%eth0", [], "fe80::1"),
    ],
)
def test_whose_word_counts(peer: str | None, forwarded: list[str], found: str | None) -> None:
    assert address_of(peer, forwarded, OURS) == found


@given(IPS, st.lists(st.text(max_size=60), max_size=4))
def test_whoever_is_no_proxy_of_ours_cannot_change_their_address(peer: str, written: list[str]) -> None:
    outside = ipaddress.ip_address(peer)
    if not any(outside in network for network in OURS):
        assert address_of(peer, written, OURS) == address_of(peer, [], OURS)


@given(st.lists(st.text(max_size=60), max_size=4), IPS)
def test_what_a_buyer_writes_before_our_proxys_word_changes_nothing(written: list[str], buyer: str) -> None:
    hop = ipaddress.ip_address(buyer)
    if not any(hop in network for network in OURS):
        assert address_of("10.0.0.1", [*written, buyer], OURS) == address_of("10.0.0.1", [buyer], OURS)


def test_a_header_of_any_length_is_cut() -> None:
    assert address_of("10.0.0.1", [", ".join(["10.0.0.2"] * 100_000)], OURS) == "10.0.0.2"


def test_a_setting_that_is_no_network_is_refused() -> None:
    assert networks("") == ()
    with pytest.raises(CannotStart, match="FAIRDROP_TRUSTED_PROXIES"):
        networks("10.0.0.0/8, my-proxy")
