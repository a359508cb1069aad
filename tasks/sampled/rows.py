"""Stage `sampled_rows`: the samples that become SFT rows or preference pairs, and from which samples each row is."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from smoltulu.artifacts.readable import percent
from smoltulu.schemas.sampled import (
    AnswerLengths,
    Fate,
    SampledExample,
    SampledRowsConfig,
    SampledRowsInputs,
    SampledRowsOutputs,
    ScoreBar,
    SelectionRules,
)
from smoltulu.tasks.data.rows import turn_text
from smoltulu.tasks.data.rows_writer import RowsWriter
from smoltulu.tasks.models.turns import Messages
from smoltulu.tasks.sampled import selection
from smoltulu.tasks.sampled.samples import asked_of
from smoltulu.tasks.sampled.selection import Choice, Sample
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    import pyarrow as pa

_NUM_EXAMPLES = 6
_EXAMPLE_CHARACTERS = 600
#: Said of what became of prompts without a row, and what to do.
_ADVICE: dict[Fate, str] = {
    "nothing_to_choose": "have no answer that is good and ended; more samples, a better model or more max_new_tokens",
    "nothing_to_reject": "have no worse answer; more samples, a higher temperature or harder prompts",
    "too_close": "have scores that are too close; lower min_margin, or take more samples",
    "ungraded": "could not be graded; look at their truths",
}

logger = logging.getLogger("smoltulu")


@dataclass
class _Seen:
    """What is counted of all prompts."""

    num_right: array[int] = field(default_factory=lambda: array("q"))
    used: list[bool] = field(default_factory=list)
    rewards: array[float] = field(default_factory=lambda: array("d"))
    choices: list[Choice] = field(default_factory=list)
    fates: Counter[Fate] = field(default_factory=Counter)
    num_samples: int = 0
    most_samples: int = 0
    num_tokens: int = 0
    num_repeated: int = 0

    def add(self, samples: list[Sample], fate: Fate) -> None:
        self.num_right.append(sum(sample.outcome == "right" for sample in samples))
        self.rewards.extend(sample.reward for sample in samples if sample.reward is not None)
        self.used.append(fate == "used")
        self.fates[fate] += 1
        self.num_samples += len(samples)
        self.most_samples = max(self.most_samples, len(samples))
        self.num_tokens += sum(sample.num_tokens for sample in samples)
        self.num_repeated += len(samples) - len(selection.distinct(samples))

    def bars(self, rules: SelectionRules) -> tuple[ScoreBar, ...]:
        if rules.score == "verifier":
            return selection.right_bars(self.num_right, self.used, self.most_samples)
        chosen = [one.chosen.reward for one in self.choices if one.chosen.reward is not None]
        rejected = [one.rejected.reward for one in self.choices if one.rejected and one.rejected.reward is not None]
        return selection.reward_bars(self.rewards, chosen, rejected)


def choose_rows(
    config: SampledRowsConfig, inputs: SampledRowsInputs, context: StageContext
) -> tuple[SampledRowsOutputs, dict[str, float]]:
    """Choose the samples that become rows.

    Raises:
        ValueError: not one prompt gives a row.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rules, seen = config.rules, _Seen()
    lineage: list[dict[str, Any]] = []
    examples: list[SampledExample] = []
    names = SampledRowsOutputs.model_fields
    with RowsWriter(context.folder / names["file"].default, "sft" if rules.make == "best" else "preference") as writer:
        for line, samples in scored_samples(Path(inputs.samples), Path(inputs.scores)):
            fate, choice = selection.select(line["id"], samples, rules)
            seen.add(samples, fate)
            if choice is None:
                continue
            prompt, tools = asked_of(line)
            row = selection.row_of(line["id"], prompt, choice) | ({"tools": tools} if tools else {})
            writer.write(row)
            seen.choices.append(
                Choice(_without_text(choice.chosen), choice.rejected and _without_text(choice.rejected))
            )
            lineage.append(_lineage(row["id"], line["id"], choice))
            if len(examples) < _NUM_EXAMPLES:
                examples.append(_example(row["id"], prompt, choice))
    if not lineage:
        raise ValueError(f"no prompt gives a row: {_said_of(seen.fates)}")
    parquet.write_table(
        pa.Table.from_pylist(lineage, _lineage_schema()), context.folder / names["lineage_file"].default,
        compression="zstd",
    )  # fmt: skip
    lengths = selection.answer_lengths(seen.choices, seen.num_samples, seen.num_tokens)
    warning = selection.length_warning(lengths, rules.max_length_ratio)
    if warning is not None:
        logger.warning("%s", warning)
    outputs = SampledRowsOutputs(
        writer=config.writer,
        make=rules.make,
        score=rules.score,
        num_rows=len(lineage),
        fates={fate: seen.fates[fate] for fate in get_args(Fate)},
        num_repeated_samples=seen.num_repeated,
        lengths=lengths,
        histogram=seen.bars(rules),
        examples=tuple(examples),
        warnings=(warning,) if warning is not None else (),
    )
    num_prompts = seen.fates.total()
    logger.info("%s of %s prompts give a row; %s", f"{len(lineage):,}", f"{num_prompts:,}", _said_of(seen.fates))
    return outputs, {
        "num_rows": float(outputs.num_rows),
        "used_share": outputs.num_rows / num_prompts,
        **_length_metrics(lengths),
    }


def scored_samples(samples: Path, scores: Path) -> Iterator[tuple[dict[str, Any], list[Sample]]]:
    """Every prompt with its samples and what they are worth. Holds a part of each file."""
    from pyarrow import parquet

    with parquet.ParquetFile(samples) as texts, parquet.ParquetFile(scores) as worth:
        for group in range(texts.num_row_groups):
            lines = texts.read_row_group(group, use_threads=False).to_pylist()
            for line, score in zip(lines, worth.read_row_group(group, use_threads=False).to_pylist(), strict=True):
                assert line["id"] == score["id"], (line["id"], score["id"])
                nothing = [None] * len(line["samples"])
                scored = zip(line["samples"], score["outcomes"] or nothing, score["rewards"] or nothing, strict=True)
                yield (
                    line,
                    [
                        Sample(number, one["text"], one["ended"], one["num_tokens"], outcome, reward)
                        for number, (one, outcome, reward) in enumerate(scored)
                    ],
                )


def _without_text(sample: Sample) -> Sample:
    """Texts of all rows would fill the memory."""
    return Sample(sample.number, "", sample.ended, sample.num_tokens, sample.outcome, sample.reward)


def _said_of(fates: Counter[Fate]) -> str:
    total = max(fates.total(), 1)
    return (
        "; ".join(
            f"{fates[fate]:,} ({percent(fates[fate] / total)}) {advice}"
            for fate, advice in _ADVICE.items()
            if fates[fate]
        )
        or "all of them"
    )


def _lineage(row: str, prompt: str, choice: Choice) -> dict[str, Any]:
    line: dict[str, Any] = {"id": row, "prompt_id": prompt}
    for side, sample in (("chosen", choice.chosen), ("rejected", choice.rejected)):
        for name in ("number", "outcome", "reward", "num_tokens", "ended"):
            line[f"{side}_{name}"] = getattr(sample, name) if sample else None
    return line


def _lineage_schema() -> pa.Schema:
    import pyarrow as pa

    types = {
        "number": pa.int32(),
        "outcome": pa.string(),
        "reward": pa.float64(),
        "num_tokens": pa.int32(),
        "ended": pa.bool_(),
    }
    sides = [pa.field(f"{side}_{name}", kind) for side in ("chosen", "rejected") for name, kind in types.items()]
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "prompt_id")] + sides)


def _example(row: str, prompt: Messages, choice: Choice) -> SampledExample:
    sides = {"chosen": choice.chosen.text, "chosen_score": _score(choice.chosen)}
    if choice.rejected is not None:
        sides |= {"rejected": choice.rejected.text, "rejected_score": _score(choice.rejected)}
    asked = turn_text(prompt[-1])
    return SampledExample(id=row, prompt=_cut(asked), **{name: _cut(text) for name, text in sides.items()})


def _score(sample: Sample) -> str:
    said = [
        sample.outcome,
        None if sample.reward is None else f"{sample.reward:.3f}",
        None if sample.ended else "no end",
    ]
    return ", ".join(one for one in said if one is not None)


def _cut(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[: _EXAMPLE_CHARACTERS - 1] + "…"


def _length_metrics(lengths: AnswerLengths) -> dict[str, float]:
    named = {"chosen_tokens": lengths.chosen, "rejected_tokens": lengths.rejected}
    return {name: value for name, value in named.items() if value is not None}


sampled_rows = Stage(
    "sampled_rows", 1, SampledRowsConfig, SampledRowsInputs, SampledRowsOutputs, choose_rows,
    block="sampled", grows_with_model=False,
)  # fmt: skip
