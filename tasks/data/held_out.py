"""Which rows of a set are held out: by what they ask, so that no question is on both sides. Pure but for its reader.

The choice depends on the rows alone, and on no seed: mixtures of the same sources are measured on the same rows. Texts
are taken in the order of their hash until there are enough rows. A text that stands in more rows than are still wanted
is passed over: it would take more out of the training than was asked for.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.mixture import MixtureRule
from smoltulu.tasks.data.rows import turn_text

if TYPE_CHECKING:
    import numpy as np

#: What becomes of a row.
TRAINED, HELD_OUT, LEFT_OUT = 0, 1, 2


def asked(row: Mapping[str, Any]) -> str:
    """What a row asks: its prompt; of a conversation all before the last answer. Of one that asks nothing all of it."""
    turns = row["messages"] if "messages" in row else row["prompt"]
    if "messages" in row:
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        turns = turns[: answers[-1]] if answers and answers[-1] else turns
    return asked_text(turns)


def asked_text(turns: Sequence[dict[str, Any]]) -> str:
    """Turns without system messages, case, and how spaces are set, which make no other question."""
    said = [(turn["role"], turn_text(turn)) for turn in turns if turn["role"] not in ("system", "developer")]
    return json.dumps([(role, " ".join(unicodedata.normalize("NFKC", text).casefold().split())) for role, text in said])


def hashes(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """64 bits of what each row asks, (R,)."""
    import numpy as np

    digests = b"".join(hashlib.sha256(asked(row).encode("utf-8", "surrogatepass")).digest()[:8] for row in rows)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def num_wanted(rule: MixtureRule, num_rows: int, label: str) -> int:
    """Rows to hold out of a source of so many. ValueError where none would be left to train on."""
    if not rule.holds_out:
        return 0
    wanted = rule.num_held_out or max(1, int((rule.held_out or 0) * num_rows + 0.5))
    if wanted >= num_rows:
        given = f"num_held_out {wanted:,}" if rule.num_held_out else f"held_out {rule.held_out:g}"
        raise ValueError(
            f"{label}: {given} of {num_rows:,} rows leaves none to train on; lower it, or hold out of another source"
        )
    return wanted


def split(rules: Sequence[MixtureRule], sources: np.ndarray, texts: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """What becomes of each row, (R,): TRAINED, HELD_OUT, or LEFT_OUT, as it asks what is held out of another source.

    sources, texts  (R,) source of each row, and the hash of what it asks

    Raises:
        ValueError: nothing can be held out of a source, or nothing would be left to train on.
    """
    import numpy as np

    distinct, group, sizes = np.unique(texts, return_inverse=True, return_counts=True)
    fate = np.full(len(texts), TRAINED)
    is_hidden = np.zeros(len(distinct), dtype=bool)
    for source, rule in enumerate(rules):
        rows = np.flatnonzero(sources == source)
        wanted = num_wanted(rule, len(rows), labels[source])
        if not wanted:
            continue
        own = np.bincount(group[rows], minlength=len(distinct))
        chosen, left = [], wanted
        for text in np.flatnonzero(own):  # in the order of their hash
            if sizes[text] <= left:
                chosen.append(text)
                left -= int(own[text])
                if not left:
                    break
        if not chosen:
            raise ValueError(
                f"{labels[source]}: no row can be held out: each of its texts stands in more than the {wanted:,} rows "
                "that are to be held out; raise held_out, or remove repeated rows first"
            )
        taken = np.zeros(len(distinct), dtype=bool)
        taken[chosen] = True
        is_hidden |= taken
        fate[rows[taken[group[rows]]]] = HELD_OUT
    fate[is_hidden[group] & (fate == TRAINED)] = LEFT_OUT
    return fate
