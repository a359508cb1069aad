"""The compared texts, on disk: memory holds where each one lies, and the sets of the last ones that were asked for."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Literal

from smoltulu.tasks.near_duplicates.shingles import jaccard, shingles

#: Sets that are kept in memory: most comparisons are with the first of a cluster.
_NUM_SETS = 4096


class Texts:
    """Texts by number, written once, then read in any order."""

    def __init__(self, file: Path, unit: Literal["words", "characters"], size: int) -> None:
        """A new file; `unit` and `size` are those of the shingles."""
        self._file = file
        self._stream = file.open("wb")
        self._ends = array("q", [0])
        self._reader: FileIO | None = None
        self._unit: Literal["words", "characters"] = unit
        self._size = size
        self._set_of = lru_cache(_NUM_SETS)(self._read_set)

    def add(self, words: str) -> int:
        """Write the next text, as `plain_words` gave it. Its hash."""
        # Half a surrogate pair, which a test may bring and a Parquet file cannot, stays what it is.
        encoded = words.encode("utf-8", "surrogatepass")
        self._ends.append(self._ends[-1] + self._stream.write(encoded))
        return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")

    def finish(self) -> None:
        """All texts are written."""
        self._stream.close()
        self._reader = self._file.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def close(self) -> None:
        """Remove the file."""
        self._stream.close()
        self._set_of.cache_clear()
        if self._reader is not None:
            self._reader.close()
        self._file.unlink(missing_ok=True)

    def same(self, one: int, other: int) -> bool:
        """Whether two texts have the very same words."""
        return self._bytes(one) == self._bytes(other)

    def same_numbers(self, one: int, other: int) -> bool:
        """Whether two texts have the same numbers, in the same order."""
        first, second = (re.findall(rb"[0-9]+", self._bytes(number)) for number in (one, other))
        return first == second

    def jaccard(self, one: int, other: int) -> float:
        """Exact similarity of two texts."""
        return 1.0 if self.same(one, other) else jaccard(self._set_of(one), self._set_of(other))

    def _bytes(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        assert self._reader is not None, "texts are read once all of them are written"
        # Not mapped into memory: pages of a large file would count as this process's own.
        return os.pread(self._reader.fileno(), end - start, start)

    def _read_set(self, number: int) -> frozenset[str]:
        return frozenset(shingles(self._bytes(number).decode("utf-8", "surrogatepass"), self._unit, self._size))
