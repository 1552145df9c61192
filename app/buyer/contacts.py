"""What buyers left of themselves: found by a keyed hash, sealed with the newest key, removed when it has served.

A contact (phone, language) is sealed at the front door (app/sealing.py), moves into the order's row sealed, and is
opened in two places only: for the SMS itself (purchase/tell.py), and here, to index the number and to seal it again.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import contacts as rows
from app.sealing import (
    CannotOpen,
    SealingKey,
    address_aad,
    answer_aad,
    contact_aad,
    key_id_of,
    payer_aad,
    phone_index,
    seal,
    unseal,
    webhook_aad,
)

REMOVE_MAX = 1_000  # contacts removed in one transaction
REMOVED = Counter("fairdrop_contacts_removed", "Contacts removed from orders of sales that settled long ago")
log = structlog.get_logger()


class _Phone(msgspec.Struct, frozen=True):
    phone: str | None = None


class Resealed(msgspec.Struct):
    """What `rotate-keys` has done."""

    contacts: int = 0  # sealed again, or indexed for the first time
    secrets: int = 0
    payers: int = 0  # attempts: who pays, and from where
    answers: int = 0  # kept for their Idempotency-Key, with a secret in them
    cannot_open: int = 0  # sealed with a key that is not given, or changed: left as they are


def index_of(keys: Sequence[SealingKey], sealed: bytes, sale: str, buyer_id: str) -> bytes | None:
    """The blind index of the number in a sealed contact. None: no number, or nobody can open it."""
    try:
        return _index(keys, sale, unseal(keys, sealed, contact_aad(sale, buyer_id)))
    except CannotOpen:
        return None  # tell.py says so in the log


def _index(keys: Sequence[SealingKey], sale: str, plain: bytes) -> bytes | None:
    try:
        phone = msgspec.json.decode(plain, type=_Phone).phone
    except msgspec.MsgspecError:
        return None
    return phone_index(keys[0], sale, phone) if phone else None


def indexes_of(keys: Sequence[SealingKey], sale: str, phone: str) -> list[bytes]:
    """What to look a number up by: under every key, for some rows may not have been sealed again yet."""
    return [phone_index(key, sale, phone) for key in keys]


async def remove_old(engine: AsyncEngine, keep_days: int) -> bool:
    """Remove contacts of one sale that settled long enough ago. Whether there may be more."""
    async with engine.begin() as conn:
        removed = await rows.remove_old(conn, keep_days, REMOVE_MAX)
    if removed is None:
        return False
    sale, count = removed
    REMOVED.inc(count)
    if count:
        log.info("contacts_removed", sale=sale, orders=count)
    return True


async def reseal(
    engine: AsyncEngine,
    keys: Sequence[SealingKey],
    *,
    batch: int,
    progress: Callable[[Resealed], None] = lambda done: None,
) -> Resealed:
    """Seal contacts, payers, webhook secrets and kept answers with the first key; each batch is its own transaction.

    It may be killed anywhere and run again: what is sealed with the first key is passed over. It may run while the
    sale does: a row is locked for the moment in which it is sealed again.
    """
    done = Resealed()
    await _reseal_secrets(engine, keys, done)
    await _reseal_payers(engine, keys, done, batch)
    await _reseal_answers(engine, keys, done, batch)
    after, newest = "", keys[0].id
    while True:
        async with engine.begin() as conn:
            found = await rows.with_old_keys(conn, newest, after, batch)
            fresh: list[tuple[str, bytes, bytes | None]] = []
            for row in found:
                sealed, aad = bytes(row["contact"]), contact_aad(row["sale"], row["buyer_id"])
                try:
                    plain = unseal(keys, sealed, aad)
                except CannotOpen:
                    done.cannot_open += 1
                    continue
                index = _index(keys, row["sale"], plain)
                if index is None and key_id_of(sealed) == newest:
                    continue  # a contact without a number has no index
                fresh.append((row["order_no"], seal(keys, plain, aad), index))
            if fresh:
                await rows.put(conn, fresh)
        done.contacts += len(fresh)
        progress(done)
        if len(found) < batch:
            return done
        after = found[-1]["order_no"]


async def _reseal_secrets(engine: AsyncEngine, keys: Sequence[SealingKey], done: Resealed) -> None:
    async with engine.begin() as conn:
        for row in await rows.secrets(conn):
            aad = webhook_aad(row["id"])
            given = [bytes(one) if one is not None else None for one in (row["secret"], row["secret_before"])]
            fresh: list[bytes | None] = []
            for sealed in given:
                if sealed is not None and key_id_of(sealed) != keys[0].id:
                    try:
                        sealed = seal(keys, unseal(keys, sealed, aad), aad)
                    except CannotOpen:
                        done.cannot_open += 1
                fresh.append(sealed)
            if fresh != given:
                assert fresh[0] is not None
                await rows.put_secrets(conn, row["id"], fresh[0], fresh[1])
                done.secrets += sum(new != old for new, old in zip(fresh, given, strict=True))


async def _reseal_payers(engine: AsyncEngine, keys: Sequence[SealingKey], done: Resealed, batch: int) -> None:
    """Who pays, and the addresses of links that are still to be made. What release N−1 kept plain is sealed."""
    after = ""
    while True:
        async with engine.begin() as conn:
            found = await rows.payers(conn, after, batch)
            for row in found:
                before = row["payer"]
                payer, known = dict(before), (row["sale"], row["buyer_id"])
                if (openid := payer.pop("openid", None)) is not None:
                    plain = msgspec.json.encode({"openid": openid})
                    payer["sealed"] = b64encode(seal(keys, plain, payer_aad(*known))).decode()
                for name, aad in (("sealed", payer_aad(*known)), ("address", address_aad(*known))):
                    if name in payer:
                        payer[name] = _again(keys, payer[name], aad, done)
                if payer != before:
                    await rows.put_payer(conn, row["id"], payer)
                    done.payers += 1
        if len(found) < batch:
            return
        after = found[-1]["id"]


def _again(keys: Sequence[SealingKey], coded: str, aad: bytes, done: Resealed) -> str:
    """Base64 of a seal with the newest key; as it was if it is one, or if nobody can open it."""
    try:
        sealed = b64decode(coded, validate=True)
        if key_id_of(sealed) == keys[0].id:
            return coded
        return b64encode(seal(keys, unseal(keys, sealed, aad), aad)).decode()
    except (CannotOpen, ValueError):
        done.cannot_open += 1
        return coded


async def _reseal_answers(
    engine: AsyncEngine, keys: Sequence[SealingKey], done: Resealed, batch: int
) -> None:
    """Answers kept for their Idempotency-Key: a repeated request is still answered once the old key is retired."""
    after = ("", "")
    while True:
        async with engine.begin() as conn:
            found = await rows.sealed_answers(conn, after, batch)
            for row in found:
                sealed, aad = b64decode(row["sealed"]), answer_aad(row["actor"], row["key"])
                if key_id_of(sealed) == keys[0].id:
                    continue
                try:
                    fresh = seal(keys, unseal(keys, sealed, aad), aad)
                except CannotOpen:
                    done.cannot_open += 1
                    continue
                await rows.put_answer(conn, row["actor"], row["key"], b64encode(fresh).decode())
                done.answers += 1
        if len(found) < batch:
            return
        after = (found[-1]["actor"], found[-1]["key"])
