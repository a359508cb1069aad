"""KTO rows, one answer each with a label, as pairs: a good and a bad answer to the same prompt.

The rows of a prompt may lie anywhere in a data set. Those that wait for a partner are in a private database of SQLite,
which keeps a few MiB in memory and the rest in a temporary file, so memory does not grow with the data.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from smoltulu.tasks.data.formats.columns import OF_PAIRS, Row
from smoltulu.tasks.data.formats.preference import answers_of, prompt_of
from smoltulu.tasks.data.formats.sft import with_tools
from smoltulu.tasks.data.formats.values import MalformedRow, is_empty

_GOOD = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}

#: Why a row is in no pair.
NO_PARTNER = {
    True: "label is true, and no row with label false has its prompt",
    False: "label is false, and no row with label true has its prompt",
}


def read_labelled(row: Row) -> dict[str, Any]:
    """`prompt`, `completion` and `label`: half a pair, with everything that both halves must share under `shared`."""
    prompt = row.need("prompt")
    turns = prompt_of(prompt, row)
    completion = row.answer("completion")
    label = row.need("label")
    good = _GOOD.get(label.strip().lower() if isinstance(label, str) else label) if _can_be_key(label) else None
    if good is None:
        raise MalformedRow("label is neither true nor false")
    shared = with_tools({"prompt": turns}, row)
    row.finish(one_text=isinstance(prompt, str), harmless=OF_PAIRS)
    # Checked alone, so that a broken row is counted as one, whether it finds a partner or not.
    return {"shared": shared, "good": good, "answer": answers_of(turns, {"answer": completion}, row)["answer"]}


def _can_be_key(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and not is_empty(value)


class Partners:
    """Rows that wait for one with the other label. The k-th good answer to a prompt meets the k-th bad one."""

    def __init__(self) -> None:
        self._waiting = sqlite3.connect("", isolation_level=None)  # "": private, on disk where it does not fit
        self._waiting.execute("pragma journal_mode = off")
        self._waiting.execute("pragma synchronous = off")
        self._waiting.execute("create table waiting (shared text, good integer, place integer, answer text)")
        self._waiting.execute("create index of_prompt on waiting (shared, good, place)")

    def __enter__(self) -> Partners:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.close()

    def meet(self, place: int, half: dict[str, Any]) -> dict[str, Any] | None:
        """The pair that a row completes, or None: it waits then."""
        shared, good = json.dumps(half["shared"], sort_keys=True), half["good"]
        found = self._waiting.execute(
            "select place, answer from waiting where shared = ? and good = ? order by place limit 1", (shared, not good)
        ).fetchone()
        if found is None:
            row = (shared, good, place, json.dumps(half["answer"]))
            self._waiting.execute("insert into waiting values (?, ?, ?, ?)", row)
            return None
        self._waiting.execute(
            "delete from waiting where shared = ? and good = ? and place = ?", (shared, not good, found[0])
        )
        answers = (half["answer"], json.loads(found[1]))
        chosen, rejected = answers if good else answers[::-1]
        return {**half["shared"], "chosen": chosen, "rejected": rejected}

    def without_partner(self) -> dict[str, int]:
        """Reason -> number of rows that still wait."""
        rows = self._waiting.execute("select good, count(*) from waiting group by good order by good desc")
        return {NO_PARTNER[bool(good)]: number for good, number in rows}
