"""`fairdrop sms preview`, run as a person runs it: text, size, each supplier's template; what is missing stops it."""

from __future__ import annotations

from tests.commands.test_operators import fairdrop
from tests.office.conftest import Office

TEMPLATES = (
    '{"reserved.zh-CN": ["SMS_1", "order_no", "minutes"], "reserved.en": ["SMS_2"], "paid": ["SMS_3"],'
    ' "expired": ["SMS_4"], "cancelled": ["SMS_5"], "refunded": null}'
)


async def test_a_preview_shows_text_size_and_the_template_of_each_supplier() -> None:
    environment = {
        "FAIRDROP_SMS_PROVIDER": "aliyun-sms", "FAIRDROP_SMS_ALSO": "twilio",
        "FAIRDROP_ALIYUN_SMS_TEMPLATES": TEMPLATES,
    }  # fmt: skip
    words = ("sms", "preview", "--event", "reserved", "--json")
    seen = await fairdrop(*words, **environment)
    assert seen.status == 0, seen.err
    chinese, english = seen.json["data"]
    assert (chinese["language"], english["language"]) == ("zh-CN", "en")
    assert (chinese["encoding"], english["encoding"]) == ("UCS-2", "GSM-7")
    assert chinese["length"] == len(chinese["text"]) and "恭喜" in chinese["text"]
    assert english["segments"] == (1 if english["units"] <= 160 else -(-english["units"] // 153))
    assert chinese["suppliers"] == {
        "aliyun-sms": {
            "way": "template",
            "template": "SMS_1",
            "params": {"order_no": "0123456789ABCDEFGHIJKLMN", "minutes": "15"},
        },
        "twilio": {"way": "text"},
    }
    drawn = await fairdrop("sms", "preview", "--language", "en", **environment)
    assert drawn.status == 0 and "SMS_3" in drawn.out and "not sent" in drawn.out and "as it is" in drawn.out
    assert "付款" not in drawn.out


async def test_a_missing_template_is_found_before_the_first_text() -> None:
    missing = await fairdrop(
        "sms",
        "preview",
        FAIRDROP_SMS_PROVIDER="aliyun-sms",
        FAIRDROP_ALIYUN_SMS_TEMPLATES='{"paid": ["SMS_3"]}',
    )
    assert missing.status == 2 and missing.out == ""
    assert "FAIRDROP_ALIYUN_SMS_TEMPLATES" in missing.err and "reserved.zh-CN" in missing.err


async def test_a_sales_own_words_are_shown(office: Office) -> None:
    drafted = await office.draft(title="Spring drop")
    seen = await fairdrop("sms", "preview", "--sale", "drop", "--event", "paid", "--json", office=office)
    assert seen.status == 0, seen.err
    for one in seen.json["data"]:
        assert "Spring drop" in one["text"] and drafted["items"][0]["title"] in one["text"]
        assert one["suppliers"] == {"sandbox-sms": {"way": "text"}}
    assert (await fairdrop("sms", "preview", "--sale", "nope", office=office)).status == 1


async def test_words_that_are_none_are_refused() -> None:
    for words in (("--event", "shipped"), ("--language", "fr")):
        refused = await fairdrop("sms", "preview", *words)
        assert refused.status == 2 and words[1] in refused.err
