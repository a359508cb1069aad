"""Measure a reward model on one benchmark: every answer is scored once, and the scores are compared.

Rules, as allenai/reward-bench has them: a right answer must score strictly higher, a tie is wrong (in RewardBench 2 it
shares the credit); raw logits, no sigmoid; the score is read at the last real token. Ours: the head in float32, so that
bfloat16 makes no ties; the pad token is never eos; and the tokens are those of training. The original renders a
conversation as text and tokenises that with the tokenizer's own special tokens, so that a template that writes bos
gives two of them; here there is one, as the model was trained.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.data.rows import turn_text
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.evaluation import pair_accuracy, rewardbench
from smoltulu.tasks.evaluation.chance import chance_details
from smoltulu.tasks.evaluation.kept import Kept, kept_scores
from smoltulu.tasks.evaluation.reward_benchmark_rows import KNOWN_SUBSETS, Question, Read, check_fields, read_questions
from smoltulu.tasks.evaluation.rewardbench import TIES, Mean, TiesPrompt
from smoltulu.tasks.models.batches import OnBatch
from smoltulu.tasks.models.tokens import conversations
from smoltulu.tasks.models.turns import as_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")

#: How a conversation becomes tokens, in the details of a score.
_TOKENS = "as trained: the chat template once, no second bos"


@dataclass(frozen=True)
class BenchmarkScore:
    """One number of a benchmark. The first one of a task is its headline, the mean of the items of its samples."""

    task: str
    metric: str
    mean: Mean
    limited: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """One question with the score of each of its answers, and how many of them were cut at their beginning."""

    question: Question
    scores: list[float]
    num_cut: int = 0

    @property
    def right(self) -> float:
        """Of a pair: 1 where the right answer scores strictly higher. Else its share of the credit for the best."""
        if len(self.scores) == 2:
            return float(self.scores[0] > self.scores[1])
        return rewardbench.best_of(self.scores)

    @property
    def is_tie(self) -> bool:
        """Whether a wrong answer scores what the best right one does, and nothing more."""
        num_right = self.question.num_right
        return max(self.scores[:num_right]) == max(self.scores[num_right:])


def measure(
    benchmark: RewardBenchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int,
    world: Path | None,
    digests: Mapping[str, str],
    on_batch: OnBatch,
    kept: Kept | None = None,
) -> tuple[list[BenchmarkScore], list[dict[str, Any]]]:
    """Read a benchmark's rows, score them, and make its scores and one row of samples a question.

    Args:
        max_length: tokens of a conversation, where the benchmark is truncated.
        world: folder of the world artifact, for generated sources.
        digests: `<label>.data.<position of the source>` -> content digest of a local file, as the key has it.

    Raises:
        ValueError: as `read_questions`, `score_answers` and `benchmark_scores`; files that changed since the key was
            made.
    """
    check_fields(benchmark)
    tables = [
        read_rows(source, world, digests.get(f"{benchmark.label}.data.{position}"))
        for position, source in enumerate(benchmark.sources)
    ]
    read = read_questions(benchmark, tables)
    for reason, number in read.reasons.most_common():
        logger.warning("%s: %s of %s rows left out: %s", benchmark.label, number, read.num_rows, reason)
    answered = score_answers(
        model,
        tokenizer,
        read.questions,
        max_length=max_length if benchmark.truncation == "left" else None,
        batch_size=batch_size,
        on_batch=on_batch,
        kept=kept,
    )
    scores = benchmark_scores(benchmark, read, answered)
    if scores[0].limited:
        logger.warning("%s is a part: %s", benchmark.label, scores[0].metric)

    def render(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(as_rendered(messages), tokenize=False, add_generation_prompt=True))

    return scores, samples_of(scores[0].task, answered, render)


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_length: int | None,
    batch_size: int,
    on_batch: OnBatch = lambda num_done, num_texts: None,
    kept: Kept | None = None,
) -> list[Answered]:
    """Score every answer.

    Args:
        max_length: a longer text loses its beginning, so that the answer stays; None: nothing is cut.

    Raises:
        ValueError: the tokenizer has no pad token of its own, or a score is NaN or infinite.
    """
    wholes = conversations(tokenizer, [one.prompt + answer for one in questions for answer in one.answers])
    longest = model.config.max_position_embeddings
    if max_length is None and (num_beyond := sum(whole.length > longest for whole in wholes)):
        logger.warning(
            "%s of %s texts are longer than the %s positions of the model, and truncation is none: their scores mean "
            "little; truncation: left would cut them",
            num_beyond,
            len(wholes),
            longest,
        )
    texts = [whole.input_ids if max_length is None else whole.input_ids[-max_length:] for whole in wholes]

    def score(places: list[int], on_batch: OnBatch) -> list[float]:
        own = [texts[place] for place in places]
        return pair_accuracy.reward_scores(model, tokenizer, own, batch_size=batch_size, on_batch=on_batch)

    scores = kept_scores(kept, "reward", texts, batch_size, on_batch, score)
    if broken := sum(not math.isfinite(score) for score in scores):
        raise ValueError(
            f"{broken:,} of {len(scores):,} answers have a score that is NaN or infinite: the model is broken; look at "
            "the loss of its training"
        )
    answered, place = [], 0
    for question in questions:
        own = slice(place, place + len(question.answers))
        num_cut = sum(len(text) < whole.length for text, whole in zip(texts[own], wholes[own], strict=True))
        answered.append(Answered(question, scores[own], num_cut))
        place = own.stop
    return answered


def benchmark_scores(benchmark: RewardBenchmark, read: Read, answered: Sequence[Answered]) -> list[BenchmarkScore]:
    """The scores of a benchmark, its headline first.

    Where pairs are missing, the task is called `…_partial` and every incomplete metric says how many there were.

    Raises:
        ValueError: a subset with more pairs than the benchmark has.
    """
    make = _rewardbench_2 if benchmark.name == "rewardbench_2" else _pairs
    return make(benchmark, answered, _details(benchmark, read, answered))


def _details(benchmark: RewardBenchmark, read: Read, answered: Sequence[Answered]) -> dict[str, Any]:
    counts = {
        "num_ties": sum(one.is_tie for one in answered),
        "num_left_cut": sum(one.num_cut > 0 for one in answered),
        "num_malformed": read.num_malformed,
        "num_other_rows": read.num_others,
    }
    reasons = {"malformed": dict(read.reasons.most_common())} if read.reasons else {}
    known = KNOWN_SUBSETS.get(benchmark.name)
    lacks: dict[str, Any] = {}
    if known is not None:
        here: dict[str, int] = {}
        for one in answered:
            here[one.question.subset] = here.get(one.question.subset, 0) + 1
        try:
            lacks = {"missing": rewardbench.missing(here, known), "num_expected": sum(known.values())}
        except ValueError as error:
            raise ValueError(f"reward benchmark {benchmark.label}: {error}") from None
    return {**counts, **reasons, **lacks, "truncation": benchmark.truncation, "tokens": _TOKENS}


def _pairs(benchmark: RewardBenchmark, answered: Sequence[Answered], details: dict[str, Any]) -> list[BenchmarkScore]:
    """RewardBench, UltraFeedback and pairs of one's own."""
    by_subset = _by_subset(answered)
    subsets = rewardbench.means_of_subsets(by_subset)
    if any(subsets):
        details["subsets"] = _as_details(subsets)
    micro = rewardbench.mean([one.right for one in answered])
    details |= _chance(micro, answered)
    if benchmark.name != "rewardbench":
        limited = any(source.limit is not None for source in benchmark.sources)
        margins = rewardbench.mean([one.scores[0] - one.scores[1] for one in answered])
        made = [
            BenchmarkScore(benchmark.label, "accuracy", micro, limited, details),
            BenchmarkScore(
                benchmark.label, "mean_margin", margins, limited, {"margin": "score of chosen minus score of rejected"}
            ),
        ]
        if len(subsets) > 1:
            plain = rewardbench.weighted((1, one) for one in subsets.values())
            made.append(BenchmarkScore(benchmark.label, "mean_of_subsets", plain, limited))
        return made
    sections = rewardbench.section_scores(subsets)
    details["aggregate"] = "share of all pairs: what the paper prints as RB Average"
    named = _Named(benchmark.label, details["missing"])
    made = [named.score("micro_accuracy", micro, rewardbench.SUBSETS, details)]
    if not details["missing"]:
        four = rewardbench.weighted((1, one) for one in sections.values())
        about = {"aggregate": "plain mean of the four sections: the leaderboard's, without prior sets"}
        made.append(named.score("mean_of_sections", four, rewardbench.SUBSETS, about))
    for section, one in sections.items():
        own = [pair for pair in answered if pair.question.subset in rewardbench.SECTIONS[section]]
        # Maths and code count alike.
        parts = [[pair for pair in own if (pair.question.subset == "math-prm") is maths] for maths in (True, False)]
        here = {name: subsets[name] for name in rewardbench.SECTIONS[section] if name in subsets}
        of_section = {**_chance(one, *filter(None, parts)), "subsets": _as_details(here)}
        made.append(named.score(section, one, rewardbench.SECTIONS[section], of_section))
    return made


def _rewardbench_2(
    benchmark: RewardBenchmark, answered: Sequence[Answered], details: dict[str, Any]
) -> list[BenchmarkScore]:
    by_subset = _by_subset([one for one in answered if one.question.subset != TIES])
    subsets = rewardbench.means_of_subsets(by_subset)
    best = [one for values in by_subset.values() for one in values]
    num_best = {name: num for name, num in rewardbench.SUBSETS_2.items() if name != TIES}
    reference, tied = _ties(answered, "ref"), _ties(answered, "tied")
    if reference.keys() & tied.keys():
        subsets[TIES] = rewardbench.ties_score(reference, tied)
    elif reference or tied:
        logger.warning("%s: no id of Ties has both a ref and a tied prompt, so Ties has no score", benchmark.label)
    details["subsets"] = _as_details(subsets)
    named = _Named(benchmark.label, details["missing"])
    made = []
    if best:
        about = {"aggregate": "share of prompts of all subsets but Ties; k answers that tie for the best share 1/k"}
        about |= _chance(rewardbench.mean(best), [one for one in answered if one.question.subset != TIES])
        made.append(named.score("best_of_4", rewardbench.mean(best), num_best, {**about, **details}))
    if not details["missing"]:
        six = rewardbench.weighted((1, one) for one in subsets.values())
        about = {"aggregate": "plain mean of the six subsets: the leaderboard's"}
        made.append(named.score("mean_of_subsets", six, rewardbench.SUBSETS_2, about))
    made += [named.score(name, one, {name: rewardbench.SUBSETS_2[name]}, {}) for name, one in subsets.items()]
    if not made:
        raise ValueError(
            f"reward benchmark {benchmark.label}: nothing to score; Ties needs a ref and a tied prompt of one id"
        )
    if not best:
        made[0].details.update(details)
    return made


def _chance(score: Mean, *parts: Sequence[Answered]) -> dict[str, Any]:
    """What guessing gives, and whether the score is within its noise. Of parts, where they count alike."""
    return chance_details(score.value, [[(one.right, len(one.scores)) for one in part] for part in parts])


def _ties(answered: Sequence[Answered], kind: str) -> dict[str, TiesPrompt]:
    """Number of an id -> its prompt of this kind, ref or tied."""
    return {
        one.question.key.partition(":")[2]: TiesPrompt(one.scores, one.question.num_right)
        for one in answered
        if one.question.subset == TIES and one.question.key.startswith(f"{kind}:")
    }


@dataclass(frozen=True)
class _Named:
    """Names scores of a published benchmark so that a part of it is never taken for the whole."""

    label: str
    missing: Mapping[str, int]

    def score(self, metric: str, one: Mean, expected: Mapping[str, int], details: dict[str, Any]) -> BenchmarkScore:
        lacks = sum(self.missing.get(name, 0) for name in expected)
        task = f"{self.label}_partial" if self.missing else self.label
        # No comma: that is lm-eval's, between metric and filter.
        metric += f" ({one.num} of {sum(expected.values())})" if lacks else ""
        return BenchmarkScore(task, metric, one, bool(lacks), details)


def _by_subset(answered: Sequence[Answered]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for one in answered:
        values.setdefault(one.question.subset, []).append(one.right)
    return values


def _as_details(subsets: Mapping[str, Mean]) -> dict[str, dict[str, Any]]:
    return {name: {"value": one.value, "stderr": one.stderr, "num": one.num} for name, one in subsets.items()}


def samples_of(
    task: str, answered: Sequence[Answered], render: Callable[[list[dict[str, str]]], str]
) -> list[dict[str, Any]]:
    """One row a question: both scores of a pair, else all scores, the right answers' first.

    Rows of Ties have no `right`: that subset has a score as a whole only.
    """
    rows = []
    for one in answered:
        question = one.question
        row: dict[str, Any] = {"task": task, "id": question.id, "subset": question.subset}
        if question.subset == TIES:
            row |= {"scores": one.scores, "num_right": question.num_right}
        elif len(one.scores) == 2:
            row |= {"right": one.right, "chosen": one.scores[0], "rejected": one.scores[1]}
        else:
            row |= {"right": one.right, "scores": one.scores, "num_right": 1}
        row |= {"doc_hash": _digest(question.prompt), "target_hash": _digest(question.answers)}
        row |= {"prompt": render(question.prompt), "is_left_cut": one.num_cut > 0}
        row["answers"] = ["\n\n".join(map(turn_text, answer)) for answer in question.answers]
        rows.append(row)
    return rows


def _digest(value: Any) -> str:
    return text_digest(json.dumps(value, ensure_ascii=False, sort_keys=True))[:16]
