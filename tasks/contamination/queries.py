"""What a benchmark asks, between its loading and the index."""

from __future__ import annotations

from dataclasses import dataclass

#: Texts of one instance that are looked for, one a field.
Query = tuple[str, ...]


@dataclass
class LoadedBenchmark:
    """Queries of one benchmark; None where a field is None: the rule leaves such instances out."""

    name: str
    queries: list[Query | None]
    not_checked: str | None = None
