"""Counts of the rows of a preflight: made for each part, added up, stored in files."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smoltulu.schemas.preflight import PreflightConfig
from smoltulu.tasks.models.tokens import Conversation, Pair
from smoltulu.tasks.preflight.rows import Tokenised, TokenizerProbe, findings, fit, loses_eos, parts_of

#: Length of the digest of a row's tokens.
_DIGEST_BYTES = 12
_NUM_EXAMPLES = 3
_SHOWN_CHARACTERS = 2_000
_REFUSAL_CHARACTERS = 300
_COUNTS_FILE, _NUMBERS_FILE = "counts.json", "numbers.npz"


class Counts:
    """Counts of the rows of a part, or of all parts, added in order. Every `num_` is a field of PreflightOutputs.

    Duplicates are known only once all parts are added: until then a kept row is a number and a digest.
    """

    def __init__(self) -> None:
        self.num_source_rows = self.num_rows = self.num_dropped = self.num_empty = self.num_truncated = 0
        self.num_overlong = self.num_malformed = self.num_eos_lost = self.num_without_eos = self.num_unstable = 0
        self.num_special = self.num_special_trained = self.num_headers = 0
        self.num_with_tools = self.num_with_reasoning = self.num_untrained_turns = 0
        self.num_two_bos = self.num_beyond_embeddings = self.num_duplicates = self.num_equal = 0
        self.num_tokens = self.num_trained_tokens = self.longest = 0
        #: Packed, as there may be a million of each.
        self.lengths = array("q")
        self.kept = array("q")
        self.digests = bytearray()
        #: Kind of finding -> the first few rows that show it; their text as JSON, cut.
        self.examples: dict[str, list[int]] = {}
        self.texts: dict[int, str] = {}
        #: What is wrong with the first row that the template does not render, and with how many rows what.
        self.malformed = ""
        self.refusals: Counter[str] = Counter()
        self.first_kept: list[Tokenised] = []

    def totals(self) -> dict[str, int]:
        """All counts, by their field of PreflightOutputs."""
        return {name: value for name, value in vars(self).items() if name.startswith("num_") or name == "longest"}

    def note(self, finding: str, number: int, source: dict[str, Any]) -> None:
        """Count a finding and remember its first rows."""
        setattr(self, finding, getattr(self, finding) + 1)
        rows = self.examples.setdefault(finding, [])
        if len(rows) < _NUM_EXAMPLES:
            rows.append(number)
            text = json.dumps(source, ensure_ascii=False)
            self.texts[number] = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"

    def note_malformed(self, number: int, source: dict[str, Any], error: Exception) -> None:
        """Count a row that the template does not render."""
        if not self.num_malformed:
            self.malformed = f"row {number} is not rendered by the chat template: {type(error).__name__}: {error}"
        self.refusals[str(error)[:_REFUSAL_CHARACTERS]] += 1
        self._see(source)
        self.note("num_malformed", number, source)

    def _see(self, source: dict[str, Any]) -> None:
        self.num_source_rows += 1
        for name, count in parts_of(source).items():
            setattr(self, name, getattr(self, name) + count)

    def add(self, part: Counts) -> None:
        """Add the counts of the rows that follow."""
        for name, value in part.totals().items():
            so_far = getattr(self, name)
            setattr(self, name, max(so_far, value) if name == "longest" else so_far + value)
        for finding, rows in part.examples.items():
            mine = self.examples.setdefault(finding, [])
            first = rows[: _NUM_EXAMPLES - len(mine)]
            mine += first
            self.texts |= {number: part.texts[number] for number in first}
        self.malformed = self.malformed or part.malformed
        self.refusals += part.refusals
        self.first_kept += part.first_kept[: _NUM_EXAMPLES - len(self.first_kept)]
        self.lengths.extend(part.lengths)
        self.kept.extend(part.kept)
        self.digests += part.digests

    def finish(self, source_of: Callable[[int], dict[str, Any]]) -> None:
        """Find the duplicates, once all parts are added. `source_of`: number of a row -> the row."""
        import numpy as np

        digests = np.frombuffer(self.digests, dtype=f"V{_DIGEST_BYTES}")
        is_duplicate = np.ones(len(digests), dtype=bool)
        is_duplicate[np.unique(digests, return_index=True)[1]] = False
        rows = np.frombuffer(self.kept, dtype=np.int64)[is_duplicate]
        for number in rows[:_NUM_EXAMPLES].tolist():
            self.note("num_duplicates", number, source_of(number))
        self.num_duplicates = len(rows)
        # In the order of their first rows, which does not depend on how the rows were divided.
        self.examples = dict(sorted(self.examples.items(), key=lambda finding: finding[1][0]))

    def fit(self, config: PreflightConfig, probe: TokenizerProbe, row: Tokenised) -> Conversation | Pair | None:
        """The row within max_length, or None where it is left out; counted either way."""
        self._see(row.source)
        self.lengths.append(row.whole.length)
        for finding in findings(config, probe, row):
            self.note(finding, row.number, row.source)
        overlong = row.whole.length > config.max_length
        if overlong:
            self.note("num_overlong", row.number, row.source)
        fitted = fit(config, row.whole)
        if fitted is None:
            dropped = overlong and (config.overlong == "drop" or config.kind == "prompts")
            self.note("num_dropped" if dropped else "num_empty", row.number, row.source)
            return None
        if overlong:
            self.note("num_truncated", row.number, row.source)
            if loses_eos(probe, row, config.max_length):
                self.note("num_eos_lost", row.number, row.source)
        self._keep(row, fitted)
        return fitted

    def _keep(self, row: Tokenised, fitted: Conversation | Pair) -> None:
        self.num_rows += 1
        sides = fitted.sides
        self.num_tokens += sum(len(ids) for ids, _ in sides)
        self.num_trained_tokens += sum(sum(mask) for _, mask in sides)
        self.longest = max(self.longest, *(len(ids) for ids, _ in sides))
        # A separator between the sides: the same tokens divided otherwise are another pair.
        tokens = b"|".join(array("q", ids).tobytes() for ids, _ in sides)
        self.digests += hashlib.blake2b(tokens, digest_size=_DIGEST_BYTES).digest()
        self.kept.append(row.number)
        if isinstance(fitted, Pair) and fitted.chosen_ids == fitted.rejected_ids:
            self.note("num_equal", row.number, row.source)
        if len(self.first_kept) < _NUM_EXAMPLES:
            self.first_kept.append(Tokenised(row.number, {}, fitted))


def save_counts(counts: Counts, folder: Path) -> None:
    """Write two files of a part's folder: figures and texts, and the numbers and digests of all rows."""
    import numpy as np

    np.savez(
        folder / _NUMBERS_FILE,
        lengths=np.array(counts.lengths, dtype=np.int64),
        kept=np.array(counts.kept, dtype=np.int64),
        digests=np.frombuffer(counts.digests, dtype=np.uint8).reshape(-1, _DIGEST_BYTES),
    )
    said = {
        "totals": counts.totals(),
        "examples": counts.examples,
        "texts": counts.texts,
        "malformed": counts.malformed,
        "refusals": counts.refusals,
        "first_kept": [{"number": row.number, "tokens": asdict(row.whole)} for row in counts.first_kept],
    }
    (folder / _COUNTS_FILE).write_text(json.dumps(said))


def load_counts(folder: Path) -> Counts:
    """The saved counts of a finished part."""
    import numpy as np

    counts = Counts()
    said = json.loads((folder / _COUNTS_FILE).read_text())
    vars(counts).update(said["totals"])
    counts.examples, counts.malformed, counts.refusals = said["examples"], said["malformed"], Counter(said["refusals"])
    counts.texts = {int(number): text for number, text in said["texts"].items()}
    for row in said["first_kept"]:
        kind = Conversation if "input_ids" in row["tokens"] else Pair
        counts.first_kept.append(Tokenised(row["number"], {}, kind(**row["tokens"])))
    with np.load(folder / _NUMBERS_FILE, allow_pickle=False) as numbers:
        counts.lengths = array("q", numbers["lengths"].tobytes())
        counts.kept = array("q", numbers["kept"].tobytes())
        counts.digests = bytearray(numbers["digests"].tobytes())
    return counts
