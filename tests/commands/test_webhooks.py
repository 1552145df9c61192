"""`fairdrop webhooks`, run as a person runs it, against a running office."""

from __future__ import annotations

from tests.commands.test_operators import fairdrop
from tests.office.conftest import Office


async def test_an_endpoint_is_made_rotated_replayed_listed_and_deleted(office: Office) -> None:
    await office.publish()
    words = ("--event", "sale.published", "--event", "order.paid", "--json")
    made = await fairdrop("webhooks", "create", "https://shop.example/hook", *words, office=office)
    assert made.status == 0, made.err
    assert made.json["secret"].startswith("whsec_") and made.json["events"] == [
        "sale.published",
        "order.paid",
    ]
    name = made.json["id"]
    rotated = await fairdrop("webhooks", "rotate", name, "--overlap-s", "60", "--json", office=office)
    assert rotated.status == 0 and rotated.json["secret"] != made.json["secret"], rotated.err
    await office.get("/v1/admin/events")  # numbers what has happened
    replayed = await fairdrop(
        "webhooks", "replay", name, "--after", "2020-01-01T00:00:00Z", "--json", office=office
    )
    assert (replayed.status, replayed.json) == (0, {"id": name, "replayed": 1}), replayed.err
    assert (await fairdrop("webhooks", "replay", name, "--after", "yesterday", office=office)).status == 1
    listed = await fairdrop("webhooks", "list", office=office)
    assert listed.status == 0 and "https://shop.example/hook" in listed.out and "whsec_" not in listed.out
    assert (await fairdrop("webhooks", "enable", name, office=office)).status == 1  # it is not disabled
    await office.sql("UPDATE webhook_endpoint SET disabled_at = now(), disabled_why = 'gone'")
    enabled = await fairdrop("webhooks", "enable", name, "--json", office=office)
    assert (enabled.status, enabled.json) == (0, {"id": name, "due": 1}), enabled.err
    assert (await fairdrop("webhooks", "delete", name, office=office)).status == 0
    assert (await fairdrop("webhooks", "delete", name, office=office)).status == 1
