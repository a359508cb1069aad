"""Rows of every supported form -> normalised rows. Pure: no files, no network, and the input is never changed.

`forms` has the list, `reading` goes over rows and counts, `sft`, `preference`, `kto` and `rlvr` read one row each with
`columns` (what is not read), `turns`, `tools`, `transcripts` and `values`. docs/data.md has a row per form. A row that
cannot be trusted raises `MalformedRow` with a short reason, the same for all rows with that fault, so that reasons can
be counted.
"""

from smoltulu.tasks.data.formats.forms import FORMAT_FIELDS, FORMS, KIND_FORMATS, check_source
from smoltulu.tasks.data.formats.reading import SourceCounts, adapt
from smoltulu.tasks.data.formats.values import DroppedRow, MalformedRow, Message

__all__ = [
    "FORMAT_FIELDS",
    "FORMS",
    "KIND_FORMATS",
    "DroppedRow",
    "MalformedRow",
    "Message",
    "SourceCounts",
    "adapt",
    "check_source",
]
