"""Every form that rows may have: the one list for recipes, `--format`, detection and the documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smoltulu.schemas.data import DatasetKind, DataSource
from smoltulu.tasks.data.formats.all_text import read_all_text
from smoltulu.tasks.data.formats.columns import Row
from smoltulu.tasks.data.formats.kto import read_labelled
from smoltulu.tasks.data.formats.preference import read_by_label, read_by_score, read_by_strength, read_preference
from smoltulu.tasks.data.formats.rlvr import read_rlvr
from smoltulu.tasks.data.formats.sft import (
    read_function_calls,
    read_instruction,
    read_messages,
    read_prompt_completion,
    read_question_answer,
    read_text,
    read_transcript,
)
from smoltulu.tasks.verifiers import canonical_name


@dataclass(frozen=True)
class Form:
    """How rows of one form are read."""

    kind: DatasetKind | None  # None: of benchmarks, which hold no conversations
    fields: tuple[str, ...]  # required first
    read: Callable[[Row], dict[str, Any]]
    optional: tuple[str, ...] = ()  # may be absent in every row

    @property
    def names(self) -> tuple[str, ...]:
        """All that `fields` of a source may map."""
        return (*self.fields, *self.optional)


_SINGLE = ("system", "tools", "history", "reasoning_content")
_PAIR = ("system", "tools", "score_chosen", "score_rejected", "margin")

FORMS: dict[str, Form] = {
    "messages": Form("sft", ("messages",), read_messages, ("system", "tools")),
    "prompt_completion": Form("sft", ("prompt", "completion"), read_prompt_completion, _SINGLE),
    "instruction": Form("sft", ("instruction", "input", "output"), read_instruction, _SINGLE),
    "question_answer": Form("sft", ("question", "answer"), read_question_answer, _SINGLE),
    "function_calls": Form("sft", ("query", "answers"), read_function_calls, ("system", "tools", "history")),
    "transcript": Form("sft", ("text",), read_transcript, ("system", "tools")),
    "preference": Form("preference", ("prompt", "chosen", "rejected"), read_preference, (*_PAIR, "history")),
    "preference_by_label": Form(
        "preference", ("input", "output_1", "output_2", "label"), read_by_label, ("system", "tools", "history")
    ),
    "preference_by_strength": Form(
        "preference", ("prompt", "response_1", "response_2", "preference_strength"), read_by_strength,
        ("system", "tools", "history"),
    ),
    "preference_by_score": Form(
        "preference", ("prompt", "completions"), read_by_score, ("system", "tools", "history")
    ),
    "kto": Form("preference", ("prompt", "completion", "label"), read_labelled, ("system", "tools", "history")),
    "rlvr": Form(
        "rlvr", ("messages", "prompt", "question", "verifier", "ground_truth"), read_rlvr,
        ("system", "tools", "history"),
    ),
    "all_text": Form("texts", (), read_all_text),
    "text": Form(None, ("text",), read_text),
}  # fmt: skip

#: Fields of each form; `fields` of a source maps these names to columns.
FORMAT_FIELDS: dict[str, tuple[str, ...]] = {name: form.names for name, form in FORMS.items()}

#: Forms that give rows of each kind.
KIND_FORMATS: dict[str, tuple[str, ...]] = {
    kind: tuple(name for name, form in FORMS.items() if form.kind == kind)
    for kind in ("sft", "preference", "rlvr", "texts")
}

_OF_PAIRS = ("ties", "empty_answers", "min_margin", "rejected_above_chosen")
#: Forms that say by how much one answer is better.
_WITH_MARGIN = ("preference", "preference_by_strength", "preference_by_score")


def check_source(source: DataSource, kind: DatasetKind) -> None:
    """ValueError, before any row is read, for a form that gives no rows of this kind, or for settings that it lacks."""
    label, name = f"data source {source.label!r}", source.format
    if name not in KIND_FORMATS[kind]:
        raise ValueError(f"{label}: format {name!r} gives no {kind} rows; allowed are {', '.join(KIND_FORMATS[kind])}")
    form = FORMS[name]
    unknown = sorted(set(source.fields) - set(form.names))
    if unknown:
        raise ValueError(
            f"{label}: format {name!r} has no field {', '.join(unknown)}; `fields` maps our names "
            f"({', '.join(form.names)}) to the columns of the data"
        )
    needed = {source.fields.get(field, field): field for field in form.fields}
    if kind != "rlvr" and (both := sorted(set(source.ignore) & needed.keys() - {"input"})):
        raise ValueError(f"{label}: ignore names {', '.join(both)}, which format {name!r} reads; remove one of the two")
    _check_preferences(source, kind, label)
    if source.columns is not None and kind != "texts":
        raise ValueError(f"{label}: columns is said of format all_text, and it is {name!r}; use fields, or remove it")
    if kind != "rlvr" and (source.verifier is not None or source.verifiers is not None):
        raise ValueError(
            f"{label}: it gives {kind} rows, which no verifier grades; remove `verifier` and `verifiers`, or give the "
            "source to data.rlvr"
        )
    for verifier in (*([source.verifier] if source.verifier is not None else []), *(source.verifiers or {}).values()):
        try:
            canonical_name(verifier)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    if len({name.lower() for name in source.verifiers or {}}) < len(source.verifiers or {}):
        raise ValueError(f"{label}: `verifiers` names one twice; case does not count")


def _check_preferences(source: DataSource, kind: DatasetKind, label: str) -> None:
    usual = {name: DataSource.model_fields[name].default for name in _OF_PAIRS}
    given = [name for name in _OF_PAIRS if getattr(source, name) != usual[name]]
    if given and kind != "preference":
        raise ValueError(f"{label}: {', '.join(given)} is said of pairs, and it gives {kind} rows; remove it")
    scores = [name for name in given if name in ("min_margin", "rejected_above_chosen")]
    if scores and source.format not in _WITH_MARGIN:
        raise ValueError(
            f"{label}: {', '.join(scores)} needs scores, which format {source.format!r} has not; those that have: "
            f"{', '.join(_WITH_MARGIN)}"
        )
