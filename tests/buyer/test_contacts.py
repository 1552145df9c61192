"""A number is found by its keyed hash only, sealed again under a new key, and gone when it has served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app import sealing
from app.buyer import contacts
from app.sealing import (
    SealingKey,
    address_aad,
    contact_aad,
    key_id_of,
    payer_aad,
    phone_index,
    seal,
    sealing_keys,
    unseal,
    webhook_aad,
)
from tests.ledger.shop import SALE, Shop, open_shop
from tests.office.conftest import FIRST_KEY, Office, open_office, settings_for, write_order

OLD, NEW, OTHER = "11" * 32, "22" * 32, "33" * 32
PHONE = "+8613912345678"


def contact_of(keys: list[SealingKey], buyer: str, phone: str | None = PHONE, sale: str = SALE) -> bytes:
    plain = json.dumps({"phone": phone, "language": "zh"} if phone else {"language": "zh"})
    return seal(keys, plain.encode(), contact_aad(sale, buyer))


@pytest.fixture
async def shop(redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    async with open_shop(redis_url, database_url, pii_keys=OLD) as shop:
        yield shop


async def sql(shop: Shop, statement: str, **values: Any) -> list[Any]:
    async with shop.engine.begin() as conn:
        found = await conn.execute(text(statement), values)
        return list(found.all()) if found.returns_rows else []


async def winners(shop: Shop, *buyers: str) -> None:
    """Reserved orders whose buyers left a number before they joined."""
    await shop.publish(len(buyers))
    for buyer in buyers:
        await shop.link.call("HSET", shop.keys.contact, buyer, contact_of(sealing_keys(OLD), buyer))
    await shop.join(*buyers)
    await shop.confirm()


def test_an_index_depends_on_key_sale_and_number_and_holds_none_of_them() -> None:
    key, other = sealing_keys(f"{OLD},{NEW}")
    index = phone_index(key, "drop", PHONE)
    assert index == phone_index(key, "drop", PHONE) and len(index) == sealing.INDEX_BYTES
    others = [
        phone_index(other, "drop", PHONE),
        phone_index(key, "drip", PHONE),
        phone_index(key, "drop", PHONE + "0"),
    ]
    assert len({index, *others}) == 4


async def test_a_confirmed_order_is_found_by_its_number(shop: Shop) -> None:
    await winners(shop, "ann")
    ((index, contact),) = await sql(shop, "SELECT phone_index, contact FROM purchase_order")
    assert bytes(index) == phone_index(sealing_keys(OLD)[0], SALE, PHONE)
    assert PHONE.encode() not in bytes(contact)


async def test_keys_are_rotated_in_batches_that_may_be_killed_anywhere(shop: Shop) -> None:
    buyers = [f"buyer-{n}" for n in range(7)]
    await winners(shop, *buyers)
    await sql(
        shop, "UPDATE purchase_order SET phone_index = NULL WHERE buyer_id = 'buyer-3'"
    )  # of release N-1
    silent = contact_of(sealing_keys(NEW), "buyer-6", None)
    await sql(
        shop,
        "UPDATE purchase_order SET contact = :c, phone_index = NULL WHERE buyer_id = 'buyer-6'",
        c=silent,
    )
    aad, old = webhook_aad("wh_1"), sealing_keys(OLD)
    await sql(
        shop,
        "INSERT INTO webhook_endpoint (id, url, events, secret, secret_before)"
        " VALUES ('wh_1', 'https://x', '[]', :a, :b)",
        a=seal(old, b"now", aad),
        b=seal(old, b"before", aad),
    )
    keys = sealing_keys(f"{NEW},{OLD}")

    class Killed(Exception):
        pass

    def die(done: contacts.Resealed) -> None:
        if done.contacts >= 4:
            raise Killed

    with pytest.raises(Killed):
        await contacts.reseal(shop.engine, keys, batch=2, progress=die)
    left = await contacts.reseal(shop.engine, keys, batch=2)
    assert (left.contacts, left.secrets, left.cannot_open) == (2, 0, 0)
    again = await contacts.reseal(shop.engine, keys, batch=2)
    assert (again.contacts, again.secrets, again.cannot_open) == (0, 0, 0)
    newest = sealing_keys(NEW)
    for row in await sql(shop, "SELECT buyer_id, contact, phone_index, version FROM purchase_order"):
        plain = json.loads(unseal(newest, bytes(row.contact), contact_aad(SALE, row.buyer_id)))
        if row.buyer_id == "buyer-6":
            assert row.phone_index is None
        else:
            assert plain == {"phone": PHONE, "language": "zh"}
            assert bytes(row.phone_index) == phone_index(newest[0], SALE, PHONE)
        assert row.version == 1
    ((secret, before),) = await sql(shop, "SELECT secret, secret_before FROM webhook_endpoint")
    assert [unseal(newest, bytes(one), aad) for one in (secret, before)] == [b"now", b"before"]


async def test_who_pays_and_from_where_is_sealed_again_also_what_release_n_1_kept_plain(shop: Shop) -> None:
    """Bug: an address that waited for its link was sealed with a key that could then not be retired; WeChat's openid
    lay plain in payment_attempt."""
    await winners(shop, "ann", "bob", "cat")
    old = sealing_keys(OLD)

    def payer(buyer: str) -> dict[str, str]:
        plain = {"sealed": (b'{"openid":"o1"}', payer_aad), "address": (b"203.0.113.7", address_aad)}
        return {
            name: b64encode(seal(old, text, aad(SALE, buyer))).decode() for name, (text, aad) in plain.items()
        }

    for buyer, told in (("ann", payer("ann")), ("bob", {"openid": "o2"}), ("cat", payer("ann"))):
        await sql(
            shop,
            "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, payer, amount_minor,"
            " currency) SELECT order_no || '-9', order_no, 9, 'wechat-pay', 'wechat-h5', 'failed',"
            " CAST(:payer AS jsonb), 1, 'CNY' FROM purchase_order WHERE buyer_id = :buyer",
            buyer=buyer,
            payer=json.dumps(told),
        )
    done = await contacts.reseal(shop.engine, sealing_keys(f"{NEW},{OLD}"), batch=2)
    assert (done.payers, done.cannot_open) == (2, 2)  # what was bound to somebody else stays as it was
    newest = sealing_keys(NEW)
    rows = await sql(
        shop,
        "SELECT o.buyer_id, a.payer FROM payment_attempt a JOIN purchase_order o USING (order_no) WHERE attempt_no = 9",
    )
    found = {row.buyer_id: row.payer for row in rows}
    assert set(found["bob"]) == {"sealed"}
    for buyer, openid in (("ann", "o1"), ("bob", "o2")):
        sealed = b64decode(found[buyer]["sealed"])
        assert json.loads(unseal(newest, sealed, payer_aad(SALE, buyer))) == {"openid": openid}
    assert unseal(newest, b64decode(found["ann"]["address"]), address_aad(SALE, "ann")) == b"203.0.113.7"
    assert key_id_of(b64decode(found["cat"]["address"])) == old[0].id
    assert (await contacts.reseal(shop.engine, sealing_keys(f"{NEW},{OLD}"), batch=2)).payers == 0

    # It goes with the contact, when the sale has been settled for long enough.
    await sql(shop, "UPDATE sale SET state = 'settled', settled_at = now() - interval '30 days'")
    assert await contacts.remove_old(shop.engine, 30)
    assert (await sql(shop, "SELECT count(*) FROM payment_attempt WHERE payer IS NOT NULL"))[0][0] == 0


async def test_what_no_key_opens_is_counted_and_left_as_it_is(shop: Shop) -> None:
    await winners(shop, "ann", "bob")
    foreign = contact_of(sealing_keys(OTHER), "ann")
    await sql(shop, "UPDATE purchase_order SET contact = :c WHERE buyer_id = 'ann'", c=foreign)
    done = await contacts.reseal(shop.engine, sealing_keys(f"{NEW},{OLD}"), batch=10)
    assert (done.contacts, done.cannot_open) == (1, 1)
    ((kept,),) = await sql(shop, "SELECT contact FROM purchase_order WHERE buyer_id = 'ann'")
    assert bytes(kept) == foreign


async def test_the_command_rotates_and_says_what_it_did(shop: Shop, tmp_path: Path) -> None:
    await winners(shop, "ann")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "FAIRDROP_DATABASE_URL": shop.settings.database_url,
        "FAIRDROP_PII_KEYS": f"{NEW},{OLD}",
    }
    command = [sys.executable, "-m", "app.cli", "rotate-keys", "--json"]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    newest = sealing_keys(NEW)[0]
    assert json.loads(ran.stdout) == {
        "key": newest.id.hex(),
        "contacts": 1,
        "payers": 0,
        "secrets": 0,
        "answers": 0,
        "cannot_open": 0,
    }
    ((sealed,),) = await sql(shop, "SELECT contact FROM purchase_order")
    assert key_id_of(bytes(sealed)) == newest.id


async def test_contacts_go_when_the_sale_has_been_settled_long_enough_and_not_before(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contacts, "REMOVE_MAX", 2)
    await winners(shop, "ann", "bob", "cat")
    kept = "SELECT count(*) FROM purchase_order WHERE contact IS NOT NULL AND phone_index IS NOT NULL"
    assert not await contacts.remove_old(shop.engine, 30)
    await sql(shop, "UPDATE sale SET state = 'settled', settled_at = now() - interval '29 days'")
    assert not await contacts.remove_old(shop.engine, 30)
    assert (await sql(shop, kept))[0][0] == 3
    await sql(shop, "UPDATE sale SET settled_at = now() - interval '30 days'")
    turns = 0
    while await contacts.remove_old(shop.engine, 30):
        turns += 1
    assert turns == 2  # two and one; then the sale is looked at no more
    assert (await sql(shop, "SELECT count(*) FROM purchase_order WHERE contact IS NULL"))[0][0] == 3
    assert (await sql(shop, "SELECT count(*) FROM purchase_order WHERE phone_index IS NULL"))[0][0] == 3
    assert (await sql(shop, "SELECT contacts_removed_at IS NOT NULL FROM sale"))[0][0]


@pytest.fixture
async def office(redis_url: str, database_url: str) -> AsyncIterator[Office]:
    running = await open_office(settings_for(redis_url, database_url, pii_keys=f"{NEW},{OLD}"))
    try:
        yield running
    finally:
        await running.close()


async def test_a_kept_answer_is_sealed_again_and_still_answers_when_the_old_key_is_gone(
    redis_url: str, database_url: str
) -> None:
    """Bug: answers kept for their Idempotency-Key stayed sealed with the old key; after it was retired, a repeated
    request could not be answered any more."""
    body = {"url": "https://shop.example/hook", "events": ["order.paid"]}
    path = "/v1/admin/webhooks"

    async def asked(keys: str) -> tuple[int, dict[str, Any]]:
        running = await open_office(settings_for(redis_url, database_url, pii_keys=keys))
        try:
            answer = await running.post(path, body, idem="one")
            return answer.status_code, answer.json()
        finally:
            await running.close()

    first = await asked(OLD)
    assert first[0] == 201 and first[1]["secret"]
    running = await open_office(settings_for(redis_url, database_url, pii_keys=f"{NEW},{OLD}"))
    try:
        keys = sealing_keys(f"{NEW},{OLD}")
        done = await contacts.reseal(running.desk.engine, keys, batch=1)
        assert (done.answers, done.secrets, done.cannot_open) == (1, 1, 0)
        assert (await contacts.reseal(running.desk.engine, keys, batch=1)).answers == 0
    finally:
        await running.close()
    assert await asked(NEW) == first


async def test_the_office_finds_orders_by_number_under_any_key_and_echoes_no_number(office: Office) -> None:
    await office.open_sale()
    numbers = [await write_order(office, seq=n, buyer=f"b{n}") for n in (1, 2, 3)]
    new, old = sealing_keys(f"{NEW},{OLD}")
    for number, key, phone in zip(numbers, (new, old, new), (PHONE, PHONE, PHONE + "9"), strict=True):
        await office.sql(
            "UPDATE purchase_order SET phone_index = :i WHERE order_no = :no",
            i=phone_index(key, "drop", phone), no=number,
        )  # fmt: skip
    path = "/v1/admin/sales/drop/orders"
    found = await office.get(path, phone=PHONE)
    assert [one["order_no"] for one in found.json()["data"]] == numbers[:2]
    assert PHONE not in found.text
    spaced = await office.http.get(f"{path}?phone={PHONE}", headers={"Authorization": f"Bearer {FIRST_KEY}"})
    assert len(spaced.json()["data"]) == 2  # the plus was not written as %2B
    first = await office.get(path, phone=PHONE, limit=1)
    second = await office.get(path, phone=PHONE, limit=1, cursor=first.json()["next_cursor"])
    assert [one.json()["data"][0]["order_no"] for one in (first, second)] == numbers[:2]
    assert (await office.get(path, phone="+4915100000000")).json()["data"] == []
    assert (await office.get(path, phone=PHONE, state="paid")).json()["data"] == []
    viewer = await office.key_of("viewer")
    assert (await office.get(path, phone=PHONE, key=viewer)).status_code == 403
    assert (await office.get(path, key=viewer)).status_code == 200
    for bad in ("13912345678", "+139123456789012345", "+1391234567x"):
        refused = await office.get(path, phone=bad)
        assert refused.status_code == 422 and bad.strip("+") not in refused.text
