"""Who is asking: a JWT of the shop, a pass of ours, or (in development only) the header X-Buyer-Id.

The front door believes nobody else. A bad identity is always 401, whatever the route would have said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Literal

import jwt
import msgspec

from app.errors import CannotStart, DidNotHappen, Refusal
from app.problems import refuse
from app.settings import Settings
from app.tokens import Keyring

BUYER_ID_MAX_BYTES = 128  # api.md
JWT_MAX_BYTES = 8_192  # longer tokens are refused before any parsing
LEEWAY_S = 10  # clocks of shop and front door may differ by this much
JWKS_ALGORITHMS = ["RS256", "ES256", "EdDSA"]
JWKS_KEEP_S = 300.0  # the shop's key set is fetched again after this long
JWKS_COOLDOWN_S = 5.0  # an unknown key id makes at most one fetch in this time
JWKS_DEADLINE_S = 3.0
VERIFIED_MAX = 4_096  # verified JWTs remembered by a process (a public-key check costs 50 µs)

NOBODY: Mapping[str, Any] = {}


class Caller(msgspec.Struct, frozen=True, gc=False):
    """A buyer whose identity holds. claims: those of the JWT, empty otherwise."""

    buyer_id: bytes
    how: Literal["jwt", "pass", "dev"]
    claims: Mapping[str, Any]


class KeysNeeded(Exception):
    """The JWT names a key that is not known here: fetch the key set, then look again."""


def buyer_id_of(text: str | bytes) -> bytes | None:
    """A buyer id as bytes if it is one: 1–128 bytes of UTF-8 without control characters."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    if not 1 <= len(raw) <= BUYER_ID_MAX_BYTES:
        return None
    if raw.isascii():
        return raw if raw.decode("ascii").isprintable() else None
    try:
        return raw if raw.decode("utf-8").isprintable() else None
    except UnicodeDecodeError:
        return None


def _invalid(detail: str) -> Refusal:
    return refuse("auth_invalid", detail)


class Identity:
    """Reads the identity headers of a request. One for a process."""

    def __init__(self, settings: Settings, ring: Keyring) -> None:
        self._ring = ring
        self._development = settings.development
        self._secret = settings.jwt_secret.get_secret_value()
        self._jwks_url = settings.jwt_jwks_url
        self._issuer = settings.jwt_issuer or None
        self._audience = settings.jwt_audience or None
        if self._jwks_url:
            # A quarter of a front door's start: only for those who fetch keys, and not in the middle of a request.
            import httpx  # noqa: F401
        if not self._development and not self._secret and not self._jwks_url:
            raise CannotStart("FAIRDROP_JWT_SECRET or FAIRDROP_JWT_JWKS_URL is missing: who are the buyers?")
        if self._secret and len(self._secret.encode()) < 32:
            raise CannotStart("FAIRDROP_JWT_SECRET is shorter than 32 bytes, the least for HS256")
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = -1e9
        self._asked_at = -1e9
        self._fetching = asyncio.Lock()
        self._verified: dict[str, tuple[float, Caller]] = {}

    def caller(self, headers: Mapping[bytes, bytes], sale: str, now_ms: int) -> Caller | None:
        """The caller, or None without an identity. No network: KeysNeeded says that `fetch_keys` must come first.

        Refusal 401 `auth_invalid`: the identity is bad or has ended, or a pass is for another sale.
        """
        authorization = headers.get(b"authorization")
        if authorization is None:
            if self._development:
                given = headers.get(b"x-buyer-id")
                if given is not None:
                    buyer = buyer_id_of(given)
                    if buyer is None:
                        raise _invalid("X-Buyer-Id is not a buyer id.")
                    return Caller(buyer, "dev", NOBODY)
            return None
        if authorization.startswith(b"Pass "):  # as clients spell it: most of those who join
            return self._pass(authorization[5:].strip(), sale, now_ms)
        scheme, _, credentials = authorization.partition(b" ")
        kind = scheme.lower()
        if kind == b"pass":
            return self._pass(credentials.strip(), sale, now_ms)
        if kind == b"bearer":
            return self._jwt(credentials.strip())
        raise _invalid("Authorization is neither Bearer nor Pass.")

    def _pass(self, given: bytes, sale: str, now_ms: int) -> Caller:
        if not sale:
            raise _invalid("A pass is good for one sale only.")
        buyer = self._ring.pass_read(given, sale, now_ms)
        if buyer is None:
            raise _invalid("The pass is not one of ours, has ended, or is for another sale.")
        return Caller(buyer, "pass", NOBODY)

    def _jwt(self, given: bytes) -> Caller:
        if len(given) > JWT_MAX_BYTES:
            raise _invalid("The token is too long.")
        try:
            text = given.decode("ascii")
        except UnicodeDecodeError:
            raise _invalid("The token is not a JWT.") from None
        known = self._verified.get(text)
        if known is not None:
            if known[0] > time.time():
                return known[1]
            del self._verified[text]
        claims = self._claims(text)
        subject = claims.get("sub")
        buyer = buyer_id_of(subject) if isinstance(subject, str) else None
        if buyer is None:
            raise _invalid("The token's `sub` is not a buyer id.")
        caller = Caller(buyer, "jwt", claims)
        if len(self._verified) >= VERIFIED_MAX:
            self._verified.pop(next(iter(self._verified)))
        # Looked at again after a minute at the latest, so that a key taken out of the set stops working soon.
        self._verified[text] = (min(float(claims["exp"]) + LEEWAY_S, time.time() + 60), caller)
        return caller

    def _claims(self, text: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(text)
            key: Any
            if self._jwks_url and (not self._secret or header.get("alg") != "HS256"):
                algorithms = JWKS_ALGORITHMS
                kid = header.get("kid")
                if not isinstance(kid, str | None):
                    raise _invalid("The token's key id is not text.")
                now = time.monotonic()
                wanting = kid not in self._keys or now - self._fetched_at > JWKS_KEEP_S
                if wanting and now - self._asked_at > JWKS_COOLDOWN_S:
                    raise KeysNeeded
                if kid not in self._keys:
                    raise _invalid("The token's key is not in the shop's key set.")
                key = self._keys[kid]
            elif self._secret:
                algorithms, key = ["HS256"], self._secret
            else:
                raise _invalid("This front door takes no JWT.")
            return jwt.decode(
                text,
                key,
                algorithms=algorithms,
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY_S,
                options={
                    "require": ["sub", "exp"],
                    "verify_aud": self._audience is not None,
                    "verify_iss": self._issuer is not None,
                },
            )
        except jwt.PyJWTError as error:
            raise _invalid("The token is not valid.") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _invalid("The token is not a JWT.") from error

    async def fetch_keys(self) -> None:
        """Read the shop's key set again. Old keys stay if it does not answer.

        DidNotHappen: there are no keys yet and the shop does not answer; repeat later.
        """
        asked = self._asked_at
        async with self._fetching:
            if self._asked_at != asked:
                return  # another request has just fetched them
            import httpx

            try:
                async with httpx.AsyncClient(timeout=JWKS_DEADLINE_S, trust_env=False) as client:
                    response = await client.get(self._jwks_url)
                    response.raise_for_status()
                    keys = jwt.PyJWKSet.from_dict(response.json()).keys
            except (httpx.HTTPError, jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
                if not self._keys:
                    raise DidNotHappen(f"the shop's key set is not available: {error}") from error
            else:
                self._keys = {key.key_id: key for key in keys}
                self._fetched_at = time.monotonic()
            finally:
                self._asked_at = time.monotonic()

    async def whoever(self, headers: Mapping[bytes, bytes], sale: str, now_ms: int) -> Caller | None:
        """`caller`, fetching the shop's keys first if they are needed."""
        try:
            return self.caller(headers, sale, now_ms)
        except KeysNeeded:
            await self.fetch_keys()
        try:
            return self.caller(headers, sale, now_ms)
        except KeysNeeded:
            raise _invalid("The token's key is not in the shop's key set.") from None

    async def buyer(self, headers: Mapping[bytes, bytes], sale: str, now_ms: int) -> Caller:
        """The caller; Refusal 401 `auth_missing` without one."""
        caller = await self.whoever(headers, sale, now_ms)
        if caller is None:
            raise missing()
        return caller


def missing() -> Refusal:
    return refuse("auth_missing")
