"""The draw: who joined before the minute gets a rank that was committed to beforehand and that anyone can recompute.

rank = P(seq), P a permutation of 1..n: a generalised Feistel network on a x b >= n (a = ceil(sqrt n)), walked until
it falls inside 1..n. One round adds a keyed quartic of one half, mod the prime 2^25 - 39, to the other half. All
products stay below 2^51, so the doubles of Lua give the same integers (lua/parts/draw.lua). Nothing here is a secret
cipher; what nobody must know beforehand is the key:

    key   = SHA-1(seed bytes .. chain head .. beacon), hex
    seed    32 random bytes; their SHA-256 is public from publish, they themselves after the opening
    chain   chain = SHA-1(chain .. ticket hash (10 raw bytes) .. seq in decimal), hex, for each early ticket, by seq;
            the first link is SHA-1("fairdrop:1:<sale>:<sku>:<epoch>:<seed hash>")
    beacon  '' for source `none` (operator-trusted) or with nobody in the draw; 'missing' if it never came
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

ROUNDS = 8  # 4 for each half; the tests show ranks of 3 and of 10,000 buyers to be uniform, also pairwise
PRIME = 33_554_393  # 2^25 - 39: squares stay below 2^50
HASH_BYTES = 10  # of a ticket hash: 80 bits; two tickets of one sale never meet, and 10^6 of them are 10 MB


class RoundKeys(NamedTuple):
    """The sides of the rectangle and 3 constants for each round."""

    n: int
    a: int
    b: int
    constants: tuple[int, ...]


@lru_cache(maxsize=256)  # one for each drawn item that a process serves
def round_keys(key_hex: str, n: int) -> RoundKeys:
    """Expand the key of a draw over n tickets. n >= 0; with n = 0 nothing has a rank."""
    a = math.isqrt(max(n - 1, 0)) + 1
    b = -(-max(n, 1) // a)
    constants = []
    for number in range(1, ROUNDS + 1):
        digest = hashlib.sha1(f"{key_hex}:{number}".encode(), usedforsecurity=False).hexdigest()
        constants += [int(digest[part * 12 : part * 12 + 12], 16) % PRIME for part in range(3)]
    return RoundKeys(n, a, b, tuple(constants))


def rank_of(seq: int, n: int, keys: RoundKeys) -> int:
    """The rank of an early ticket, 1..n."""
    if not 1 <= seq <= n:
        raise ValueError(f"seq {seq} is not in a draw of {n}")
    a, b, p = keys.a, keys.b, PRIME
    (k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12,
     k13, k14, k15, k16, k17, k18, k19, k20, k21, k22, k23, k24) = keys.constants  # fmt: skip
    x = seq - 1
    while True:
        right, left = divmod(x, a)
        # unrolled, and squares by *: three times as fast as a loop in CPython; a front door does this once a poll
        t = right + k1
        t = (t * t + k2) % p
        left = (left + (t * t + k3) % p) % a
        t = left + k4
        t = (t * t + k5) % p
        right = (right + (t * t + k6) % p) % b
        t = right + k7
        t = (t * t + k8) % p
        left = (left + (t * t + k9) % p) % a
        t = left + k10
        t = (t * t + k11) % p
        right = (right + (t * t + k12) % p) % b
        t = right + k13
        t = (t * t + k14) % p
        left = (left + (t * t + k15) % p) % a
        t = left + k16
        t = (t * t + k17) % p
        right = (right + (t * t + k18) % p) % b
        t = right + k19
        t = (t * t + k20) % p
        left = (left + (t * t + k21) % p) % a
        t = left + k22
        t = (t * t + k23) % p
        right = (right + (t * t + k24) % p) % b
        x = right * a + left
        if x < n:
            return x + 1


def seq_of(rank: int, n: int, keys: RoundKeys) -> int:
    """The early ticket that has this rank: the inverse of `rank_of`."""
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} is not in a draw of {n}")
    a, b, p, k = keys.a, keys.b, PRIME, keys.constants
    x = rank - 1
    while True:
        right, left = divmod(x, a)
        for at in range(3 * ROUNDS - 6, -1, -6):
            t = ((left + k[at + 3]) % p) ** 2 + k[at + 4]
            right = (right - ((t % p) ** 2 + k[at + 5]) % p) % b
            t = ((right + k[at]) % p) ** 2 + k[at + 1]
            left = (left - ((t % p) ** 2 + k[at + 2]) % p) % a
        x = right * a + left
        if x < n:
            return x + 1


def seed_hash(seed: bytes) -> str:
    """What is public from publish on."""
    return hashlib.sha256(seed).hexdigest()


def chain_start(sale: str, sku: str, epoch: int, seed_hash_hex: str) -> str:
    return hashlib.sha1(
        f"fairdrop:1:{sale}:{sku}:{epoch}:{seed_hash_hex}".encode(), usedforsecurity=False
    ).hexdigest()


def chain_step(chain: str, seq: int, ticket_hash: bytes) -> str:
    return hashlib.sha1(b"%b%b%d" % (chain.encode(), ticket_hash, seq), usedforsecurity=False).hexdigest()


def chain_head(start: str, ticket_hashes: Iterable[bytes]) -> str:
    """The chain over the early tickets in seq order, from seq 1."""
    chain = start
    for seq, ticket_hash in enumerate(ticket_hashes, 1):
        chain = chain_step(chain, seq, ticket_hash)
    return chain


def draw_key(seed: bytes, chain: str, beacon: str) -> str:
    return hashlib.sha1(seed + chain.encode() + beacon.encode(), usedforsecurity=False).hexdigest()


def hashes_in(drawn: bytes) -> Iterator[bytes]:
    """The ticket hashes in `drawn:<sku>`, in seq order."""
    for at in range(0, len(drawn) - HASH_BYTES + 1, HASH_BYTES):
        yield drawn[at : at + HASH_BYTES]


# --- what is published


def algorithm() -> dict[str, Any]:
    """The algorithm in words, with test vectors, for `GET …/draw`."""
    key = hashlib.sha1(b"fairdrop test vector", usedforsecurity=False).hexdigest()
    vectors = []
    for n in (1, 2, 3, 10, 1000, 1_000_000):
        keys = round_keys(key, n)
        seqs = sorted({1, 2, n // 2, n - 1, n} & set(range(1, n + 1)))
        vectors.append({"key": key, "n": n, "ranks": {str(seq): rank_of(seq, n, keys) for seq in seqs}})
    return {
        "name": "fairdrop-draw-1",
        "text": (
            "chain(0) = sha1hex('fairdrop:1:' sale ':' sku ':' epoch ':' seed_hash); "
            "chain(seq) = sha1hex(chain(seq-1) + ticket_hash as 10 bytes + decimal seq), for each entry in seq order. "
            "key = sha1hex(seed as 32 bytes + chain(n) + beacon_used). "
            "Constants of round i = 1..8: the first 36 hex digits of sha1hex(key ':' i) as three numbers mod p, "
            "p = 33554393. a = ceil(sqrt(n)), b = ceil(n / a), x = seq - 1. Repeat until x < n: "
            "l = x mod a, r = x div a; odd rounds l = (l + f(r)) mod a, even rounds r = (r + f(l)) mod b, with "
            "f(v) = (((((v + k1) mod p)^2 + k2) mod p)^2 + k3) mod p; x = r * a + l. Then rank = x + 1."
        ),
        "test_vectors": vectors,
    }


def document(
    sale: str, facts: Mapping[str, str], items: Mapping[str, Mapping[str, str]], *, now_ms: int
) -> dict[str, Any]:
    """The body of `GET /v1/sales/{sale}/draw`, from the fields of `sale` and of each `item:<sku>` in Redis.

    Nothing that would help to choose is told early: n and the chain head after the freeze; the seed once the sale has
    opened and every item that has a draw is drawn.
    """
    frozen = now_ms >= int(facts["freeze_ms"])
    drawn = {sku: item.get("drawn") == "1" for sku, item in items.items()}
    opened = now_ms >= int(facts["opens_ms"])
    told = opened and all(drawn[sku] or item.get("early", "0") == "0" for sku, item in items.items())
    source = facts.get("beacon_source", "") or "none"
    return {
        "sale": sale,
        "epoch": int(facts["epoch"]),
        "seed_hash": facts["seed_hash"],
        "seed": facts["seed"] if told else None,
        "trust": "operator" if source == "none" else "beacon",
        "beacon": {"source": source, "value": (facts.get("beacon_value") or None) if frozen else None},
        "items": [
            {
                "sku": sku,
                "n": int(item.get("early", "0")) if frozen else None,
                "chain": item.get("chain") if frozen else None,
                "drawn": drawn[sku],
                "key": item.get("drawn_key") if drawn[sku] and told else None,
                "beacon_used": item.get("beacon_used", "") if drawn[sku] else None,
            }
            for sku, item in items.items()
        ],
        "entries": f"/v1/sales/{sale}/draw/entries" if told else None,
        "algorithm": algorithm(),
    }


def entry_lines(sku: str, drawn: bytes, first_seq: int = 1) -> Iterator[bytes]:
    """Lines of `GET …/draw/entries` (NDJSON), from a part of `drawn:<sku>` that begins at first_seq."""
    for seq, ticket_hash in enumerate(hashes_in(drawn), first_seq):
        yield b'{"sku":"%b","seq":%d,"ticket_hash":"%b"}\n' % (sku.encode(), seq, ticket_hash.hex().encode())
