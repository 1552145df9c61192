"""Approved SMS templates of suppliers that send no free text (Aliyun, Tencent Cloud), by event and language.

A setting is JSON: {"reserved.zh-CN": ["SMS_154950909", "order_no", "minutes"], "paid": ["SMS_2"], "expired": null}: the
supplier's code, then the names of `Text.params` that go into it, in the template's order. A key without a language
serves all others. null: this supplier is not to send it; another may. Every event and language has to be named one way
or the other: what is forgotten is found when a process starts, not when the first buyer waits for a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from app import texts
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
        """CannotStart: not such a JSON object, a value that no text has, or an event without a template."""
        try:
            found = msgspec.json.decode(text or "{}", type=dict[str, list[str] | None])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CannotStart(
                f'{setting} must be JSON such as {{"reserved.zh-CN": ["CODE", "order_no"]}}'
            ) from error
        for key, words in found.items():
            event, _, language = key.partition(".")
            if event not in texts.KINDS:
                raise CannotStart(
                    f"{setting}: there is no text {event!r}; there are: {', '.join(texts.KINDS)}"
                )
            if language not in ("", "zh", *texts.LANGUAGES):
                raise CannotStart(
                    f"{setting}: texts are written in {', '.join(texts.LANGUAGES)}, not in {language!r}"
                )
            if words is not None and not (words and words[0]):
                raise CannotStart(f"{setting}: every template needs its supplier's code; null sends nothing")
            for name in words[1:] if words else ():
                if name not in texts.VALUES:
                    raise CannotStart(
                        f"{setting}: no text has a value {name!r}; there are: {', '.join(texts.VALUES)}"
                    )
        self._found = {
            key: Template(words[0], tuple(words[1:])) if words else None for key, words in found.items()
        }
        missing = [
            f"{event}.{language}"
            for event in texts.KINDS
            for language in texts.LANGUAGES
            if self._key(event, language) is None
        ]
        if missing:
            raise CannotStart(f"{setting}: no template for {', '.join(missing)}; null sends nothing")

    def _key(self, event: str, language: str) -> str | None:
        keys = (f"{event}.{language}", f"{event}.{language.partition('-')[0]}", event)
        return next((key for key in keys if key in self._found), None)

    def named(self, event: str, language: str) -> Template | None:
        """The template of an event in a language. None: this supplier is not to send it."""
        key = self._key(event, language)
        return None if key is None else self._found[key]

    def of(self, text: Text) -> tuple[str, dict[str, str]] | Refused:
        """The code and the values in order. Refused: not to be sent here, or a value is missing."""
        template = self.named(text.template, text.language)
        if template is None:
            return Refused("template_missing", other_may=True)
        if any(name not in text.params for name in template.params):
            return Refused("template_value_missing", other_may=True)
        return template.code, {name: text.params[name] for name in template.params}
