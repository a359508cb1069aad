"""Reads published scores. The file is data that a person edits: a wrong one is refused with the row that is wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from pydantic import ValidationError

from smoltulu.recipes import PUBLISHED
from smoltulu.schemas.common import problems_of
from smoltulu.schemas.published import PublishedTables


@cache
def load_published() -> PublishedTables:
    """The shipped figures."""
    return parse_published(yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")), PUBLISHED.name)


def parse_published(values: Any, name: str) -> PublishedTables:
    """Published figures from plain values. ValueError names the file, and every row that is wrong."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{name}: published figures are a mapping with format, sources, rows, models and tables, got "
            f"{type(values).__name__}; recipes/published/smoltulu.yaml shows the form"
        )
    try:
        return PublishedTables.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{name}: {'; '.join(problems_of(error))}") from None
