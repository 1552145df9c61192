"""Approved SMS templates of suppliers that send no free text (Aliyun, Tencent Cloud), by event and language.

A setting is JSON: {"reserved.zh-CN": ["SMS_154950909", "order_no", "pay_by"], "paid": ["SMS_2"]}: the supplier's code,
then the names of `Text.params` that go into it, in the template's order. A key without a language serves all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from app.errors import CannotStart
from app.providers.answer import Refused
from app.providers.sms import Text


@dataclass(frozen=True, slots=True)
class Template:
    code: str
    params: tuple[str, ...]


class Templates:
    """What to send for an event in a language."""

    def __init__(self, text: str, setting: str) -> None:
        """CannotStart: not such a JSON object."""
        try:
            found = msgspec.json.decode(text or "{}", type=dict[str, list[str]])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CannotStart(
                f'{setting} must be JSON such as {{"reserved.zh-CN": ["CODE", "order_no"]}}'
            ) from error
        if not all(found.values()):
            raise CannotStart(f"{setting}: every template needs its supplier's code")
        self._found = {key: Template(words[0], tuple(words[1:])) for key, words in found.items()}

    def of(self, text: Text) -> tuple[str, dict[str, str]] | Refused:
        """The code and the values in order. Refused: none for this event and language, or a value is missing."""
        primary = text.language.partition("-")[0]
        for key in (f"{text.template}.{text.language}", f"{text.template}.{primary}", text.template):
            template = self._found.get(key)
            if template is not None:
                if any(name not in text.params for name in template.params):
                    return Refused("template_value_missing", other_may=True)
                return template.code, {name: text.params[name] for name in template.params}
        return Refused("template_missing", other_may=True)
