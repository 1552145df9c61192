"""Who may say who they are: JWT by secret or key set, passes, nothing else in production; challenges before a pass."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from app.errors import CannotStart
from app.front import create_app
from app.keys import SaleKeys
from app.sealing import contact_aad, sealing_keys, unseal
from tests.front.conftest import JWT_SECRET, PII_KEY, Front, Open, Shop, settings_for, token, until
from tests.front.wire import crowd, join_bytes

Seen = Callable[..., Awaitable[Any]]


@asynccontextmanager
async def supplier(
    answer: Callable[[str, bytes], tuple[int, dict[str, Any]]],
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A small HTTP server in this loop: key sets, siteverify. Yields its address and the bodies it got."""
    import asyncio

    from app.serving.server import listen
    from tests.front.conftest import _Quiet

    bodies: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        bodies.append(body)
        status, told = answer(scope["path"], body)
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    wire = listen("127.0.0.1", 0, 64, what="supplier")
    server = _Quiet(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none"))
    task = asyncio.create_task(server.serve(sockets=[wire]))
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{wire.getsockname()[1]}", bodies
    finally:
        server.should_exit = True
        await task


async def test_only_good_tokens_of_the_shop_are_believed(open_door: Open, shop: Shop, seen: Seen) -> None:
    front = await open_door(env="production", jwt_issuer="shop", jwt_audience="drop")
    await shop.publish(units=50)
    await seen(door=front)
    good = {"iss": "shop", "aud": "drop"}
    answer = await front.join("x", "", Authorization=f"Bearer {token('ann', **good)}")
    assert answer.status_code == 202
    answer = await front.join("x", "", Authorization=f"bearer   {token('ann', **good)}")
    assert answer.status_code == 200  # scheme in any case
    none = jwt.encode({"sub": "eve", "exp": time.time() + 60, **good}, "", algorithm="none")
    other = jwt.encode({"sub": "eve", "exp": int(time.time()) + 60, **good}, "y" * 40, algorithm="HS256")
    long_hash = jwt.encode(
        {"sub": "eve", "exp": int(time.time()) + 60, **good}, JWT_SECRET * 2, algorithm="HS512"
    )
    bad = [
        none,
        other,
        long_hash,
        token("eve", iss="else", aud="drop"),
        token("eve", iss="shop", aud="else"),
        token("eve"),
        token("eve", **good, exp=int(time.time()) - 60),
        token("eve", **good, nbf=int(time.time()) + 600),
        token("", **good),
        token("e" * 129, **good),
        token("e\nve", **good),
        jwt.encode({"sub": "eve", **good}, JWT_SECRET, algorithm="HS256"),
        jwt.encode({"sub": 7, "exp": int(time.time()) + 60, **good}, JWT_SECRET, algorithm="HS256"),
        "a.b.c",
        "e30.e30.",
        "x" * 9000,
    ]
    for one in bad:
        answer = await front.join("x", "", Authorization=f"Bearer {one}")
        assert answer.status_code in (401, 431) and (
            answer.status_code == 431 or answer.json()["code"] == "auth_invalid"
        ), one[:50]
    answer = await front.join("x", "eve")
    assert (
        answer.status_code == 401 and answer.json()["code"] == "auth_missing"
    )  # X-Buyer-Id is for development


async def test_any_changed_character_of_a_token_is_refused(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    given = (await front.http.post("/v1/sales/x/pass", headers={"X-Buyer-Id": "ann"})).json()["pass"]
    raw = base64.urlsafe_b64decode(given + "=" * (-len(given) % 4))
    plain = join_bytes("x", "ann")
    sent = []
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        bent = base64.urlsafe_b64encode(bytes(changed)).rstrip(b"=")
        sent.append(plain.replace(b"x-buyer-id: ann", b"authorization: Pass " + bent))
    replies = await crowd(front.url, sent, 16)
    assert {reply.status for reply in replies} == {401}
    await shop.publish("y")
    await seen("y")
    answer = await front.join("y", "", Authorization=f"Pass {given}")
    assert answer.status_code == 401 and answer.json()["code"] == "auth_invalid"


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
async def test_a_key_set_is_read_and_rotated(
    kind: str, open_door: Open, shop: Shop, seen: Seen, monkeypatch: Any
) -> None:
    monkeypatch.setattr("app.buyer.identity.JWKS_COOLDOWN_S", 0.0)
    make: dict[str, Callable[[], Any]] = {
        "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }
    algorithm: Any = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[kind]
    keys: dict[str, Any] = {"one": make[kind]()}

    def key_set(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        told = []
        for kid, key in keys.items():
            told.append(
                {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "alg": kind, "use": "sig"}
            )
        return 200, {"keys": told}

    def signed(kid: str, key: Any) -> str:
        body = {"sub": f"buyer-{kid}", "exp": int(time.time()) + 60}
        return jwt.encode(body, key, algorithm=kind, headers={"kid": kid})

    async with supplier(key_set) as (url, bodies):
        front = await open_door(env="production", jwt_secret="", jwt_jwks_url=url)
        await shop.publish()
        await seen(door=front)
        assert (
            await front.join("x", "", Authorization=f"Bearer {signed('one', keys['one'])}")
        ).status_code == 202
        keys["two"] = make[kind]()
        assert (
            await front.join("x", "", Authorization=f"Bearer {signed('two', keys['two'])}")
        ).status_code == 202
        assert len(bodies) == 2
        for bad in (signed("one", keys["two"]), signed("three", keys["two"]), token("eve")):
            answer = await front.join("x", "", Authorization=f"Bearer {bad}")
            assert answer.status_code == 401 and answer.json()["code"] == "auth_invalid"


async def test_a_key_set_that_does_not_answer_is_503(open_door: Open, shop: Shop, seen: Seen) -> None:
    async with supplier(lambda path, body: (500, {})) as (url, _):
        front = await open_door(env="production", jwt_secret="", jwt_jwks_url=url)
        await shop.publish()
        await seen(door=front)
        key = ed25519.Ed25519PrivateKey.generate()
        text = jwt.encode(
            {"sub": "a", "exp": int(time.time()) + 60}, key, algorithm="EdDSA", headers={"kid": "k"}
        )
        answer = await front.join("x", "", Authorization=f"Bearer {text}")
        assert answer.status_code == 503 and answer.headers["retry-after"]


async def test_a_pass_keeps_the_sealed_contact(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    contact = {"phone": "+8613800000000", "language": "zh-CN"}
    answer = await front.http.post(
        "/v1/sales/x/pass", json={"contact": contact, "source": "app"}, headers={"X-Buyer-Id": "ann"}
    )
    assert answer.status_code == 201 and answer.json()["expires_at"].endswith("Z")
    sealed = await shop.link.call("HGET", SaleKeys("x").contact, "ann")
    assert b"138" not in sealed
    opened = unseal(sealing_keys(PII_KEY), sealed, contact_aad("x", b"ann"))
    assert json.loads(opened) == {**contact, "source": "app"}
    claims = token("bob", phone_number="+4915112345678", locale="de")
    await front.http.post("/v1/sales/x/pass", headers={"Authorization": f"Bearer {claims}"})
    sealed = await shop.link.call("HGET", SaleKeys("x").contact, "bob")
    assert (
        json.loads(unseal(sealing_keys(PII_KEY), sealed, contact_aad("x", b"bob")))["phone"]
        == "+4915112345678"
    )
    again = await front.http.post(
        "/v1/sales/x/pass", headers={"Authorization": f"Pass {answer.json()['pass']}"}
    )
    assert again.status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        {"contact": {"phone": "12345"}}, {"contact": {"phone": "+0123456789"}}, {"contact": {}}, {"source": "s" * 65},
        {"extra": 1}, {"contact": {"phone": "+8613800000000", "name": "x"}}, {"challenge": []}, [], 7, "x",
    ],
)  # fmt: skip
async def test_a_bad_wish_for_a_pass_is_422(body: Any, front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.http.post("/v1/sales/x/pass", json=body, headers={"X-Buyer-Id": "ann"})
    assert answer.status_code == 422 and answer.json()["code"] == "invalid" and answer.json()["errors"]


async def test_passes_are_limited_for_each_buyer(open_door: Open, shop: Shop, seen: Seen) -> None:
    front = await open_door(pass_rate_per_min=3)
    await shop.publish()
    await seen(door=front)
    answers = [await front.http.post("/v1/sales/x/pass", headers={"X-Buyer-Id": "ann"}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [201, 201, 201, 429, 429]
    assert answers[-1].json()["code"] == "slow_down" and int(answers[-1].headers["retry-after"]) >= 1
    assert (await front.http.post("/v1/sales/x/pass", headers={"X-Buyer-Id": "bob"})).status_code == 201


async def test_proof_of_work(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(doc={"pass": "required", "challenge": "pow"})
    await seen()

    async def ask(buyer: str, **challenge: str) -> Any:
        body = {"challenge": challenge} if challenge else None
        return await front.http.post("/v1/sales/x/pass", json=body or {}, headers={"X-Buyer-Id": buyer})

    answer = await ask("ann")
    assert answer.status_code == 403 and answer.json()["code"] == "challenge_required"
    assert answer.json()["challenge"]["kind"] == "pow"
    params = answer.json()["challenge"]["params"]

    def solve(riddle: str, met: bool = True) -> str:
        for nonce in range(100_000):
            digest = hashlib.sha256(f"{riddle}:{nonce}".encode()).digest()
            if (int.from_bytes(digest, "big") >> (256 - params["bits"]) == 0) == met:
                return str(nonce)
        raise AssertionError

    solved = solve(params["token"])
    assert (await ask("ann", token=params["token"], nonce=solve(params["token"], False))).status_code == 403
    assert (await ask("ann", token=params["token"][:-2] + "AA", nonce=solved)).status_code == 403
    assert (
        await ask("bob", token=params["token"], nonce=solved)
    ).status_code == 403  # another buyer's riddle
    assert (await ask("ann", token=params["token"], nonce="")).status_code == 403
    assert (await ask("ann", token=params["token"], nonce=solved)).status_code == 201


async def test_a_captcha_is_checked_at_its_supplier(open_door: Open, shop: Shop, seen: Seen) -> None:
    told: dict[str, Any] = {"status": 200, "success": True}
    async with supplier(lambda path, body: (told["status"], {"success": told["success"]})) as (url, bodies):
        front = await open_door(captcha_verify_url=url, captcha_secret="hush", captcha_site_key="site")
        await shop.publish(doc={"challenge": "captcha"})
        await seen(door=front)

        async def ask(**challenge: str) -> Any:
            body = {"challenge": challenge} if challenge else {}
            return await front.http.post("/v1/sales/x/pass", json=body, headers={"X-Buyer-Id": "ann"})

        asked = await ask()
        assert asked.status_code == 403 and asked.json()["challenge"] == {
            "kind": "captcha",
            "params": {"site_key": "site", "script": None},
        }
        assert (await ask(response="r")).status_code == 201
        assert b"secret=hush" in bodies[-1] and b"response=r" in bodies[-1]
        told["success"] = False
        assert (await ask(response="r")).status_code == 403
        told["status"] = 500
        answer = await ask(response="r")
        assert answer.status_code == 503 and answer.headers["retry-after"]


@pytest.mark.parametrize(
    "changed",
    [
        {"signing_keys": ""}, {"signing_keys": "short"}, {"pii_keys": ""}, {"pii_keys": "zz"}, {"redis_url": ""},
        {"env": "production", "jwt_secret": ""}, {"jwt_secret": "short"}, {"redis_url": "http://nope"},
        {"captcha_verify_url": "http://127.0.0.1:1/"}, {"captcha_script_url": "captcha.js"},
        {"captcha_script_url": "https://c.example/a.js", "captcha_origins": ["https://d.example; script-src *"]},
    ],
)  # fmt: skip
def test_a_door_without_its_secrets_does_not_start(changed: dict[str, str]) -> None:
    with pytest.raises(CannotStart):
        create_app(settings_for(**{"redis_url": "redis://127.0.0.1:1/0", **changed}))
