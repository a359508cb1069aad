"""The queries of a loaded benchmark, from which the index is built."""

from __future__ import annotations

from dataclasses import dataclass

#: Texts of one instance that are looked for, one a field.
Query = tuple[str, ...]


@dataclass
class LoadedBenchmark:
    """Queries of one benchmark. None for an instance with a field of None: the rule leaves it out."""

    name: str
    queries: list[Query | None]
    not_checked: str | None = None
