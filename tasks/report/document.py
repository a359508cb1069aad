"""The frame of a self-contained page: its policy forbids it to load anything, values come in escaped."""

from __future__ import annotations

from smoltulu.tasks.report.markup import e
from smoltulu.tasks.report.style import STYLE


def document(title: str, body: str) -> str:
    """A whole HTML page; `body` is finished HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
