"""Something that costs a bot: proof of work or a captcha, asked for with the pass, before the minute.

Proof of work is stateless: the riddle is a signed token bound to sale and buyer; the answer is a nonce such that
SHA-256(token ":" nonce) starts with `bits` zero bits. A captcha is checked at the supplier's siteverify address.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from app.errors import CannotStart, DidNotHappen, Refusal
from app.problems import refuse
from app.settings import Settings
from app.tokens import Keyring

if TYPE_CHECKING:
    import httpx

RIDDLE_MS = 600_000  # ms a riddle may be answered; a phone needs seconds
NONCE_MAX = 64  # characters
CAPTCHA_DEADLINE_S = 4.0
KIND = "pow"  # of the signed token


def zero_bits(digest: bytes) -> int:
    """Leading zero bits of a digest."""
    return len(digest) * 8 - int.from_bytes(digest, "big").bit_length()


class Challenges:
    """Sets riddles and weighs answers. One for a process; `close` ends its HTTP client."""

    def __init__(self, settings: Settings, ring: Keyring) -> None:
        self._ring = ring
        self._bits = settings.pass_pow_bits
        self._verify_url = settings.captcha_verify_url
        self._site_key = settings.captcha_site_key
        self._script = settings.captcha_script_url or None
        self._secret = settings.captcha_secret.get_secret_value()
        if self._verify_url and not self._secret:
            raise CannotStart("FAIRDROP_CAPTCHA_SECRET is missing, but FAIRDROP_CAPTCHA_VERIFY_URL is set")
        self._client: httpx.AsyncClient | None = None
        if self._verify_url:
            import httpx  # noqa: F401 - slow to import: only where it is used, and not in the middle of a request

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def required(self, kind: str, sale: str, buyer_id: bytes, now_ms: int, why: str) -> Refusal:
        """403 `challenge_required` with what is to be solved."""
        params: dict[str, Any]
        if kind == "pow":
            token = self._ring.cursor_sign(KIND, [sale, self._who(sale, buyer_id), now_ms + RIDDLE_MS])
            params = {"token": token, "bits": self._bits, "hash": "sha256", "input": "token:nonce"}
        else:
            params = {"site_key": self._site_key, "script": self._script}
        return refuse("challenge_required", why, extra={"challenge": {"kind": kind, "params": params}})

    def _who(self, sale: str, buyer_id: bytes) -> str:
        return hashlib.blake2b(buyer_id, key=sale.encode(), digest_size=12).hexdigest()

    async def weigh(
        self,
        kind: str,
        sale: str,
        buyer_id: bytes,
        answer: dict[str, str] | None,
        now_ms: int,
        remote_ip: str | None,
    ) -> None:
        """Return if the challenge is met.

        Refusal 403 `challenge_required`: nothing, or nothing valid, was given; the document holds a new one.
        DidNotHappen: the captcha supplier does not answer; repeat.
        """
        if kind == "none":
            return
        if answer is None:
            raise self.required(kind, sale, buyer_id, now_ms, "Solve the challenge and ask again.")
        if kind == "pow":
            met = self._pow_met(sale, buyer_id, answer.get("token", ""), answer.get("nonce", ""), now_ms)
        elif kind == "captcha":
            met = await self._captcha_met(answer.get("response", ""), remote_ip)
        else:
            raise DidNotHappen(f"this release does not know the challenge {kind}")
        if not met:
            raise self.required(
                kind, sale, buyer_id, now_ms, "The answer does not hold; here is a new challenge."
            )

    def _pow_met(self, sale: str, buyer_id: bytes, token: str, nonce: str, now_ms: int) -> bool:
        if not token or not 1 <= len(nonce) <= NONCE_MAX:
            return False
        riddle = self._ring.cursor_read(KIND, token)
        if riddle is None or len(riddle) != 3:
            return False
        if riddle[0] != sale or riddle[1] != self._who(sale, buyer_id) or int(riddle[2]) < now_ms:
            return False
        return zero_bits(hashlib.sha256(f"{token}:{nonce}".encode()).digest()) >= self._bits

    async def _captcha_met(self, response: str, remote_ip: str | None) -> bool:
        if not response:
            return False
        if not self._verify_url:
            raise DidNotHappen("FAIRDROP_CAPTCHA_VERIFY_URL is not set")
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(timeout=CAPTCHA_DEADLINE_S, trust_env=False)
        form = {"secret": self._secret, "response": response}
        if remote_ip:
            form["remoteip"] = remote_ip
        try:
            answer = await self._client.post(self._verify_url, data=form)
            answer.raise_for_status()
            told = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise DidNotHappen("the captcha supplier does not answer") from error
        return isinstance(told, dict) and told.get("success") is True
