"""A supplier does not forget money: the sandbox that was killed knows its books again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.providers.sandbox_ledger import Ledger
from app.providers.sandbox_state import PayWanted, RefundWanted, Reply, Sandbox
from app.providers.sandbox_wire import MERCHANT
from app.settings import Settings


def wanted(number: int) -> PayWanted:
    return PayWanted(
        attempt_id=f"O{number}-1",
        order_no=f"O{number}",
        amount_minor=500,
        currency="CNY",
        title="x",
        channel="sandbox",
        merchant=MERCHANT,
        expires_at=datetime.now(UTC) + timedelta(minutes=5),
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(sandbox_secret="s" * 32, sandbox_ledger=str(tmp_path / "ledger.jsonl"))


def test_money_links_and_refunds_outlive_the_process(settings: Settings) -> None:
    before = Sandbox(settings)
    paid = before.pay(before.create(wanted(1), "http://x"))
    closed = before.close(before.create(wanted(2), "http://x").attempt_id)
    waits = before.create(wanted(3), "http://x")
    assert paid.capture_ref
    refund = before.refund(
        RefundWanted(refund_id="R1", capture_ref=paid.capture_ref, amount_minor=200, currency="CNY")
    )
    with pytest.raises(Reply):
        before.close("never-seen")

    before.ledger.close()  # each line was with the kernel before: kill -9 would lose nothing
    after = Sandbox(settings)

    assert after.pays == before.pays
    assert after.refunds == {"R1": refund}
    assert after.by_capture[paid.capture_ref].refunded_minor == 200
    assert after.counts["captured_minor"] == 500
    assert after.counts["refunded_minor"] == 200
    assert after.pays[closed.attempt_id].state == "closed"
    assert after.create(wanted(3), "http://x").ref == waits.ref
    with pytest.raises(Reply, match="closed"):
        after.create(PayWanted(**{**_as_dict(wanted(4)), "attempt_id": "never-seen"}), "http://x")
    after.ledger.close()
    assert [pay.attempt_id for pay in after.untold] == [paid.attempt_id]


def _as_dict(struct: PayWanted) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_a_line_that_was_cut_off_is_none(settings: Settings) -> None:
    before = Sandbox(settings)
    before.create(wanted(1), "http://x")
    before.ledger.close()
    path = Path(settings.sandbox_ledger)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    after = Sandbox(settings)
    assert list(after.pays) == ["O1-1"]
    after.create(wanted(2), "http://x")
    after.ledger.close()
    assert list(Sandbox(settings).pays) == ["O1-1", "O2-1"]


def test_without_a_name_nothing_is_written(tmp_path: Path) -> None:
    sandbox = Sandbox(Settings(sandbox_secret="s" * 32))
    sandbox.create(wanted(1), "http://x")
    assert list(tmp_path.iterdir()) == []
    assert Ledger(None).read() == []
