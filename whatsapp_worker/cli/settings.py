"""`whatsapp-worker settings`: what is in force, and where it comes from."""

import os

from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.terminal import columns, emit, paint, talk
from whatsapp_worker.settings import Settings, misspelt


def show(options: Options, settings: Settings) -> int:
    """Serve `settings`."""
    for name, near in misspelt(os.environ).items():
        talk(f"{name} is not read; is {near} meant?")
    rows = settings.table(os.environ)
    if options.json:
        for row in rows:
            emit(row)
        return 0
    shown = [
        [
            row["variable"],
            paint(f"{row['value']} {row['unit']}".strip(), *_style(row["origin"])),
            row["origin"],
            row["sentence"],
        ]
        for row in rows
    ]
    print("\n".join(columns(shown, head=["VARIABLE", "VALUE", "FROM", "MEANING"])))
    return 0


def _style(origin: str) -> tuple[str, ...]:
    return ("bold",) if origin == "environment" else ()
