"""`fairdrop sms preview`: the texts that buyers get, before they get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from app.commands.asking import Json, Office, quoted, show, table
from app.commands.installation import DataDir, settings_of

commands = typer.Typer()
sms = typer.Typer(help="Look at the texts that buyers get.", no_args_is_help=True)
commands.add_typer(sms, name="sms")


@sms.command("preview")
def sms_preview(
    event: Annotated[
        str | None,
        typer.Option("--event", help="reserved, paid, expired, cancelled, refunded. [default: all]"),
    ] = None,
    language: Annotated[str | None, typer.Option("--language", help="zh-CN or en. [default: both]")] = None,
    sale_id: Annotated[
        str | None,
        typer.Option("--sale", help="Titles, price and deadline of this sale's first item, from the office."),
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Each text as buyers get it, what it costs, and the template that each supplier in use sends it with.

    Suppliers and templates are those of this shell's FAIRDROP_* settings. Exit status 2: a template is missing.
    """
    from app import texts
    from app.providers.registry import sms_templates

    for given, known in ((event, tuple(texts.KINDS)), (language, texts.LANGUAGES)):
        if given is not None and given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}")
    row: dict[str, Any] = {
        "sale_title": "Phone, first batch", "item_title": "Phone, 128 GB", "units": 1, "amount_minor": 499900,
        "currency": "CNY", "pay_within_s": 900, "order_no": "0123456789ABCDEFGHIJKLMN",
    }  # fmt: skip
    if sale_id is not None:
        found = Office(data_dir).ask("GET", f"/v1/admin/sales/{quoted(sale_id)}")
        item = found["items"][0]
        row |= {
            "sale_title": found["title"], "item_title": item["title"], "amount_minor": item["price_minor"],
            "currency": item["currency"], "pay_within_s": found["pay_within_s"],
        }  # fmt: skip
    suppliers = sms_templates(settings_of(data_dir=data_dir))
    previews: list[dict[str, Any]] = []
    for kind in texts.KINDS if event is None else (event,):
        for spoken in texts.LANGUAGES if language is None else (language,):
            body = texts.render(kind, spoken, row)
            size = texts.size_of(body)
            sent: dict[str, dict[str, Any]] = {}
            for name, templates in suppliers.items():
                template = templates.named(kind, spoken) if templates is not None else None
                way = "text" if templates is None else "none" if template is None else "template"
                sent[name] = {"way": way}
                if template is not None:
                    values = texts.values(row)
                    sent[name] |= {
                        "template": template.code,
                        "params": {name: values[name] for name in template.params},
                    }
            previews.append(
                {
                    "event": kind, "language": spoken, "text": body, "length": len(body), "encoding": size.encoding,
                    "units": size.units, "segments": size.segments, "suppliers": sent,
                }
            )  # fmt: skip

    def way_of(sent: Mapping[str, Any]) -> str:
        words = {"text": "as it is", "none": "not sent"}
        return words.get(sent["way"]) or f"{sent['template']} ({', '.join(sent['params'])})"

    show(
        {"data": previews},
        as_json,
        lambda: table(
            "",
            ("event", "language", "text", "length", "encoding", "segments", *suppliers),
            [
                [one[name] for name in ("event", "language", "text", "length", "encoding", "segments")]
                + [way_of(sent) for sent in one["suppliers"].values()]
                for one in previews
            ],
        ),
    )
