"""Rows of a reward benchmark -> comparisons. Pure: no files, no models.

Beside `preference` and `preference_by_label` (docs/data.md) there are forms of published files, so that what can be had
of RewardBench without its Hub dataset is read as it lies: `llmbar` (princeton-nlp/LLMBar) and `humanevalpack`
(bigcode-project/octopack); and `best_of`, RewardBench 2's rows.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smoltulu.schemas.data import DataSource
from smoltulu.schemas.reward_benchmarks import RewardBenchmark, RewardBenchmarkName
from smoltulu.tasks.data.formats import FORMAT_FIELDS, MalformedRow, Message, adapt
from smoltulu.tasks.evaluation.rewardbench import SUBSETS, SUBSETS_2, TIES

#: Fields of each form; `fields` of a source maps these names to columns.
FIELDS: dict[str, tuple[str, ...]] = {
    "preference": (*FORMAT_FIELDS["preference"], "subset"),
    "preference_by_label": (*FORMAT_FIELDS["preference_by_label"], "subset"),
    "llmbar": (*FORMAT_FIELDS["preference_by_label"], "subset"),
    "humanevalpack": ("instruction", "canonical_solution", "buggy_solution", "language"),
    "best_of": ("id", "prompt", "chosen", "rejected", "num_correct", "subset"),
}
#: Subsets that a benchmark has; a row of any other is an error.
KNOWN_SUBSETS: dict[RewardBenchmarkName, Mapping[str, int]] = {"rewardbench": SUBSETS, "rewardbench_2": SUBSETS_2}

#: LLMBar's names -> RewardBench's. Its `Processed_*` sets are other benchmarks' pairs, which RewardBench does not take.
_LLMBAR = {
    "LLMBar_Natural": "llmbar-natural",
    "LLMBar_Adversarial_Neighbor": "llmbar-adver-neighbor",
    "LLMBar_Adversarial_GPTInst": "llmbar-adver-GPTInst",
    "LLMBar_Adversarial_GPTOut": "llmbar-adver-GPTOut",
    "LLMBar_Adversarial_Manual": "llmbar-adver-manual",
}
_NOT_REWARDBENCH = "Processed_"
_LANGUAGES = ("python", "js", "java", "go", "cpp", "rust")
_NUM_ANSWERS = 4  # RewardBench 2: one right, three wrong


@dataclass(frozen=True)
class Question:
    """One comparison: the `num_right` right answers come first, wrong ones follow. Answers are lists of messages.

    key   RewardBench 2's own id, which joins the prompts of Ties
    """

    id: str
    subset: str
    prompt: list[Message]
    answers: list[list[Message]]
    num_right: int = 1
    key: str = ""


@dataclass
class Read:
    """What reading a benchmark gave.

    num_rows    all of them
    reasons     why a row was left out as malformed -> number of rows
    num_others  rows that belong to no subset of the benchmark by their form (LLMBar's `Processed_*`)
    """

    questions: list[Question] = field(default_factory=list)
    num_rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    num_others: int = 0

    @property
    def num_malformed(self) -> int:
        """Rows without a comparison."""
        return self.reasons.total()


def check_fields(benchmark: RewardBenchmark) -> None:
    """ValueError where `fields` of a source names what its form does not have."""
    for source in benchmark.sources:
        if unknown := sorted(set(source.fields) - set(FIELDS[source.format])):
            raise ValueError(
                f"reward benchmark {benchmark.label}, source {source.label!r}: format {source.format!r} has no field "
                f"{', '.join(unknown)}; `fields` maps our names ({', '.join(FIELDS[source.format])}) to columns"
            )


def read_questions(benchmark: RewardBenchmark, tables: Iterable[Iterable[Any]]) -> Read:
    """The comparisons of a benchmark.

    Args:
        tables: the rows of each of its sources.

    Raises:
        ValueError: too many malformed rows, a subset that the benchmark does not have, or nothing to compare.
    """
    read = Read()
    known = KNOWN_SUBSETS.get(benchmark.name)
    for index, (source, rows) in enumerate(zip(benchmark.sources, tables, strict=True)):
        before = (read.num_rows, read.num_malformed)
        for place, row in enumerate(rows):
            read.num_rows += 1
            if source.format == "llmbar" and _subset(row, source).startswith(_NOT_REWARDBENCH):
                read.num_others += 1
                continue
            try:
                question = _question(row, source, f"{index}:{place}", needs_subset=known is not None)
            except MalformedRow as error:
                read.reasons[str(error)] += 1
                continue
            if known is not None and question.subset not in known:
                raise ValueError(_unknown_subset(benchmark, source, place, question.subset, known))
            read.questions.append(question)
        _check_share(benchmark, source, read.num_rows - before[0], read.num_malformed - before[1], read.reasons)
    if not read.questions:
        raise ValueError(
            f"reward benchmark {benchmark.label}: none of {read.num_rows:,} rows is a comparison"
            + (f" ({_told(read.reasons)})" if read.reasons else "")
            + "; check the file, the split or `limit`"
        )
    return read


def _check_share(
    benchmark: RewardBenchmark, source: DataSource, num_rows: int, num_malformed: int, reasons: Counter[str]
) -> None:
    """Each source by itself, so that a small one that is all malformed does not hide behind a large one."""
    if num_malformed > benchmark.max_malformed_share * num_rows:
        raise ValueError(
            f"reward benchmark {benchmark.label}, source {source.label!r}: {num_malformed:,} of {num_rows:,} rows are "
            f"no comparison ({num_malformed / num_rows:.2%}), allowed are {benchmark.max_malformed_share:.2%} "
            f"(max_malformed_share). Reasons: {_told(reasons)}. Mend `format` and `fields`, or the data"
        )


def _told(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason}: {number:,}" for reason, number in reasons.most_common())


def _unknown_subset(
    benchmark: RewardBenchmark, source: DataSource, place: int, subset: str, known: Mapping[str, int]
) -> str:
    near = difflib.get_close_matches(subset, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"reward benchmark {benchmark.label}, source {source.label!r}, row {place}: subset {subset!r} is none of "
        f"{benchmark.name}'s; {hint}It has: {', '.join(known)}. For pairs of your own use name: pairs"
    )


def _question(row: Any, source: DataSource, own_id: str, needs_subset: bool) -> Question:
    if not isinstance(row, dict):
        raise MalformedRow("row is not an object")
    if source.format == "humanevalpack":
        return _code_pair(row, source, own_id)
    subset = _subset(row, source)
    if needs_subset and not subset:
        raise MalformedRow("no subset (`fields: {subset: COLUMN}` names its column)")
    if source.format == "best_of":
        return _several(row, source, own_id, subset)
    if source.format == "llmbar":
        subset = _LLMBAR.get(subset, subset)
        source = source.model_copy(update={"format": "preference_by_label"})
    pair = adapt(row, source)
    if "tools" in pair:
        raise MalformedRow("the row offers tools, which a reward benchmark does not render")
    return Question(own_id, subset, pair["prompt"], [pair["chosen"], pair["rejected"]])


def _subset(row: Any, source: DataSource) -> str:
    value = row.get(source.fields.get("subset", "subset")) if isinstance(row, dict) else None
    return value if isinstance(value, str) else ""


def _code_pair(row: dict[str, Any], source: DataSource, own_id: str) -> Question:
    """HumanEvalPack's instruction, answered by the canonical and by the buggy body of the function.

    RewardBench says no more than "correct code as chosen and rejected as one with bugs" (arXiv 2403.13787, section 3).
    Whether its answers repeat the declaration is written nowhere public: the bodies stand here as the file has them.
    """
    language = _value(row, source, "language")
    if language not in _LANGUAGES:
        raise MalformedRow(f"language is none of {', '.join(_LANGUAGES)}")
    names = {"prompt": "instruction", "chosen": "canonical_solution", "rejected": "buggy_solution"}
    pair = adapt(
        {ours: _value(row, source, theirs) for ours, theirs in names.items()},
        source.model_copy(update={"format": "preference", "fields": {}}),
    )
    return Question(own_id, f"hep-{language}", pair["prompt"], [pair["chosen"], pair["rejected"]])


def _several(row: dict[str, Any], source: DataSource, own_id: str, subset: str) -> Question:
    """A row of RewardBench 2: lists of right and of wrong answers."""
    chosen, rejected = _value(row, source, "chosen"), _value(row, source, "rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not chosen or not rejected:
        raise MalformedRow("chosen and rejected are not lists of at least one answer")
    is_ties = subset.lower() == TIES.lower()
    if not is_ties and (len(chosen) != 1 or len(chosen) + len(rejected) != _NUM_ANSWERS):
        raise MalformedRow(f"{len(chosen)} right and {len(rejected)} wrong answers instead of 1 and {_NUM_ANSWERS - 1}")
    stated = row.get(source.fields.get("num_correct", "num_correct"))
    if stated is not None and stated != len(chosen):
        raise MalformedRow("num_correct is not the number of chosen answers")
    as_pair = source.model_copy(update={"format": "preference", "fields": {}})
    prompt = _value(row, source, "prompt")
    pairs = [
        [adapt({"prompt": prompt, "chosen": right, "rejected": wrong}, as_pair) for wrong in rejected]
        for right in chosen
    ]
    answers = [of_right[0]["chosen"] for of_right in pairs] + [pair["rejected"] for pair in pairs[0]]
    key = str(row.get(source.fields.get("id", "id"), ""))
    if is_ties:
        kind, _, number = key.partition(":")
        if kind not in ("ref", "tied") or not number:
            raise MalformedRow("an id of Ties is neither ref:NUMBER nor tied:NUMBER")
        if (kind == "ref") != (len(chosen) == 1):
            raise MalformedRow("Ties: a ref prompt has one right answer, a tied one several")
    return Question(own_id, TIES if is_ties else subset, pairs[0][0]["prompt"], answers, len(chosen), key)


def _value(row: dict[str, Any], source: DataSource, name: str) -> Any:
    value = row.get(source.fields.get(name, name))
    if value is None:
        raise MalformedRow(f"field {name!r} is missing")
    return value
