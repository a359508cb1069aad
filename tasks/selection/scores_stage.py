"""Stage `selection_scores`: scores of the rows of one source, in parts that survive a kill.

Which rows share a part depends on the rows alone. While a part is scored, the next one is tokenised. docs/selection.md
says what the scores mean.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import canonical_json, file_digest, folder_digest, text_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.selection import Scorer, SelectionScoresConfig, SelectionScoresInputs, SelectionScoresOutputs
from smoltulu.tasks.data.rows import num_rows, stored_rows
from smoltulu.tasks.models.folders import check_model_folder, load_tokenizer
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.sampled import parts
from smoltulu.tasks.selection.rendering import Rendered, Renderer, check_template, tokenizer_difference
from smoltulu.tasks.selection.scores_file import PROBLEMS, RowScore, ScoresWriter, scores_schema
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smoltulu.tasks.selection.scoring import Measured

logger = logging.getLogger("smoltulu")

#: Rows of a part: what a kill may cost, and what is sorted by length at a time. Not the batch size, which may differ
#: after a resume.
PART_ROWS = 256
#: Files of a model folder that say nothing about its tokenizer.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PACKAGES = ("torch", "transformers", "tokenizers", "jinja2")
#: Raise it when the lines of a part change.
_FORMAT = 1
_SHOWN = 5

#: Passes of the selector model over each token.
PASSES: dict[Scorer, int] = {"counts": 0, "perplexity": 1, "rds_plus": 1, "attention_influence": 2}

Score = Callable[[list[Rendered]], dict[int, "Measured"]]  # rows without a problem -> by number, what was measured


def score_source(
    config: SelectionScoresConfig, inputs: SelectionScoresInputs, context: StageContext
) -> tuple[SelectionScoresOutputs, dict[str, float]]:
    """Write scores.parquet, a line a row (tasks/selection/scores_file.py).

    Rows that are too long, that train nothing, whose answers are empty, or whose loss is no number have a `problem`
    instead of a score.

    Raises:
        ValueError: the selector model has another tokenizer than the base, cannot use the template, or is not the one
            that the heads are of; targets of RDS+ are none, or in a benchmark; no row has a score.
    """
    from smoltulu.tasks.trainer.prepare import prepare_torch

    _check(config, inputs)
    total = num_rows(Path(inputs.dataset))
    if total == 0:
        raise ValueError(f"selection: {inputs.dataset} has no row to score")
    if config.scorer != "counts":
        prepare_torch(context)
    tokenizer = load_tokenizer(Path(inputs.tokenizer), inputs.chat_template)
    check_template(tokenizer, config.kind)
    max_length, score = _scorer(config, inputs, context, tokenizer)
    render = Renderer(tokenizer, config.kind, max_length, _by(config), config.trained_turns)
    processes = processes_of(context)
    seen = _Seen()
    name = SelectionScoresOutputs.model_fields["scores_file"].default
    with (
        _Parts(Path(inputs.dataset), total, render, processes.num_processes) as ahead,
        ScoresWriter(context.folder / name, config.scorer) if processes.is_main_process else nullcontext() as writer,
    ):
        for lines in parts.lines_in_parts(
            context,
            _made_from(config, inputs),
            range(ahead.num_parts),
            scores_schema(config.scorer),
            lambda number: _score_part(number, ahead, score, context),
        ):
            for line in lines:
                seen.count(line)
                if writer is not None:
                    writer.write_line(line)
    seen.accept(total, config)
    outputs = SelectionScoresOutputs(
        scorer=config.scorer,
        num_scored_rows=seen.num_scored,
        num_unscored_rows=total - seen.num_scored,
        num_tokens=seen.num_tokens,
    )
    means = {measure: value / seen.num_scored for measure, value in seen.sums.items()}
    if (guess := math.log(len(tokenizer))) < means.get("loss", 0.0):
        logger.warning(
            "selection: the selector model's mean loss on these rows is %.2f nats, a guess over %s tokens has %.2f; "
            "it knows nothing of such texts, so its scores rank them by little; give a model that was trained on texts "
            "like these",
            means["loss"],
            f"{len(tokenizer):,}",
            guess,
        )
    return outputs, {
        "num_scored_rows": float(outputs.num_scored_rows),
        "num_unscored_rows": float(outputs.num_unscored_rows),
        **means,
    }


class _Parts:
    """The rows of each part, rendered. While a part is scored, the next one of this process is rendered."""

    def __init__(self, source: Path, num_rows: int, render: Renderer, stride: int) -> None:
        self._source, self._render, self._stride, self.num_rows = source, render, stride, num_rows
        self.num_parts = -(-num_rows // PART_ROWS)
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[int, Future[list[Rendered]]] = {}
        self.started, self.num_tokens = time.monotonic(), 0

    def take(self, number: int) -> list[Rendered]:
        """The rows of a part."""
        begun = self._begun.pop(number, None)
        rows = self._rows(number) if begun is None else begun.result()
        self.num_tokens += sum(len(row.ids) for row in rows)
        return rows

    def begin_after(self, number: int) -> None:
        """Have the part after this one rendered. A tokenizer works for one thread at a time."""
        if number + self._stride < self.num_parts:
            self._begun[number + self._stride] = self._thread.submit(self._rows, number + self._stride)

    def _rows(self, number: int) -> list[Rendered]:
        first = number * PART_ROWS
        return self._render(enumerate(stored_rows(self._source, first, PART_ROWS), first))

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _score_part(number: int, ahead: _Parts, score: Score, context: StageContext) -> parts.Lines:
    rows = ahead.take(number)
    score([])  # what is loaded for it may tokenise too
    ahead.begin_after(number)
    found = score([row for row in rows if not row.problem])
    speed = ahead.num_tokens / max(time.monotonic() - ahead.started, 1e-9)
    context.report(min((number + 1) * PART_ROWS, ahead.num_rows), ahead.num_rows, tokens_per_second=speed)
    return [asdict(_line(row, found.get(row.row))) for row in rows]


def _check(config: SelectionScoresConfig, inputs: SelectionScoresInputs) -> None:
    """What the scorer needs is there."""
    if config.kind == "texts":
        raise ValueError("selection: texts are no conversations, so they cannot be scored; select from sft, preference "
                         "or rlvr rows")  # fmt: skip
    needed = {
        "attention_influence": ("model", "heads"),
        "rds_plus": ("model", "targets"),
        "perplexity": ("model",),
        "counts": (),
    }[config.scorer]
    missing = [name for name in needed if getattr(inputs, name) is None]
    assert not missing, f"{config.scorer} needs {missing}"
    assert config.scorer != "attention_influence" or config.mask is not None
    if inputs.model is not None:
        check_model_folder(Path(inputs.model))


def _by(config: SelectionScoresConfig) -> Any:
    """`by`, where it has a meaning."""
    if config.by != "row" and (config.scorer not in ("attention_influence", "perplexity") or config.kind == "rlvr"):
        why = "prompts have no trained turn" if config.kind == "rlvr" else f"{config.scorer} measures whole rows"
        logger.warning("selection: by %s does nothing: %s", config.by, why)
        return "row"
    return config.by


def _scorer(
    config: SelectionScoresConfig,
    inputs: SelectionScoresInputs,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, Score]:
    """Tokens of the longest row that is scored, and the function that scores. The model is loaded when it is needed."""
    if inputs.model is None or config.scorer == "counts":
        return config.max_length, lambda rows: {}
    folder = Path(inputs.model)
    _check_tokenizer(folder, inputs, config, tokenizer)
    positions = _positions(folder) or config.max_length
    if positions < config.max_length:
        logger.warning(
            "selection.max_length %s is more than the %s positions of the selector model: rows longer than these are "
            "not scored",
            *(f"{length:,}" for length in (config.max_length, positions)),
        )
    max_length = min(config.max_length, positions)
    heads = None if inputs.heads is None else chosen_heads(Path(inputs.heads), folder)
    if config.scorer == "rds_plus":
        from smoltulu.tasks.selection.rds_plus import check_targets

        assert inputs.targets is not None
        check_targets(Path(inputs.targets), None if inputs.targets_hits is None else Path(inputs.targets_hits))
    score: Score | None = None

    def load() -> Score:
        from smoltulu.tasks.selection import rds_plus, scoring

        device = str(processes_of(context).device)
        selector = scoring.load_selector(folder, tokenizer, config.precision, context.compute, device)
        whole = config.over == "whole" or config.kind == "rlvr"
        if config.scorer == "rds_plus":
            assert inputs.targets is not None
            measure = rds_plus.likeness(rds_plus.embedded(selector, tokenizer, Path(inputs.targets), max_length))
        elif config.scorer == "perplexity":
            measure = scoring.perplexity(whole)
        else:
            assert heads is not None and config.mask is not None
            measure = scoring.influence(heads, config.mask, whole)
        return lambda rows: scoring.score_rows(selector, rows, measure)

    def scored(rows: list[Rendered]) -> dict[int, Measured]:
        nonlocal score
        score = score or load()
        return score(rows)

    return max_length, scored


def _positions(folder: Path) -> int | None:
    """Tokens that the model reads at most, whatever its config calls them (GPT-2: n_positions); None: no bound."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _check_tokenizer(
    folder: Path, inputs: SelectionScoresInputs, config: SelectionScoresConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """ValueError where the selector model reads other tokens than the base model, or cannot use the template."""
    if folder == Path(inputs.tokenizer):
        return
    own = load_tokenizer(folder, inputs.chat_template)
    if difference := tokenizer_difference(tokenizer, own):
        raise ValueError(
            f"selection.model has another tokenizer than the base model ({difference}), so it would read other tokens "
            "than the trained ones; give a selector model with the base model's tokenizer, or none: then the base "
            "model scores"
        )
    check_template(own, config.kind)


def chosen_heads(file: Path, model: Path) -> list[tuple[int, int]]:
    """(layer, head) of the heads to mask. ValueError where there is none, or they are of another model."""
    try:
        said = json.loads(file.read_text())
        chosen = [(int(layer), int(head)) for layer, head in said["chosen"]]
        digest = said["model"]["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the heads file of the stage selection_heads ({error!r})") from None
    if digest != (here := folder_digest(model)):
        raise ValueError(
            f"{file}: the heads are of another model (digest {digest[:12]}) than the selector model {model} "
            f"({here[:12]}); find the heads of this one first"
        )
    if not chosen:
        raise ValueError(f"{file}: no head is chosen, so nothing can be masked; look at the gates of selection_heads")
    return chosen


def _line(row: Rendered, found: Measured | None) -> RowScore:
    line = RowScore(
        row=row.row,
        id=row.id,
        digest=row.digest,
        num_tokens=len(row.ids),
        num_trained_tokens=sum(row.mask),
        num_characters=row.num_characters,
        repetition=row.repetition,
        problem=row.problem,
    )
    if found is None:
        return line
    changes = {name: getattr(found, name) for name in ("loss", "masked_loss", "score", "problem", "parts")}
    return RowScore(**{**vars(line), **changes})


class _Seen:
    """What there is of the lines: sums, and of each problem how many rows have it and the first of their ids."""

    def __init__(self) -> None:
        self.num_scored = self.num_tokens = 0
        self.sums: dict[str, float] = {}
        self.problems: Counter[str] = Counter()
        self.ids: dict[str, list[str]] = {}

    def count(self, line: dict[str, Any]) -> None:
        """A line of the file."""
        self.num_tokens += line["num_tokens"]
        if problem := line["problem"]:
            self.problems[problem] += 1
            if self.problems[problem] <= _SHOWN:
                self.ids.setdefault(problem, []).append(line["id"])
            return
        self.num_scored += 1
        for name in ("loss", "masked_loss", "score"):
            if line[name] is not None:
                self.sums[name] = self.sums.get(name, 0.0) + line[name]

    def accept(self, total: int, config: SelectionScoresConfig) -> None:
        """Say which rows have no score. ValueError where none has one."""
        found = "; ".join(
            f"{self.problems[problem]:,} {problem} (rows {', '.join(ids)}"
            f"{', ...' if self.problems[problem] > _SHOWN else ''})"
            for problem, ids in sorted(self.ids.items())
        )
        if not self.num_scored:
            advice = [PROBLEMS[problem].format(max_length=f"{config.max_length:,}") for problem in sorted(self.ids)]
            raise ValueError(f"selection: none of the {total:,} rows has a score: {found}. {' '.join(advice)}")
        if found:
            num_unscored = total - self.num_scored
            logger.warning("selection: %s of %s rows have no score: %s", f"{num_unscored:,}", f"{total:,}", found)


def _made_from(config: SelectionScoresConfig, inputs: SelectionScoresInputs) -> str:
    """What the parts are made from."""
    folder = Path(inputs.tokenizer)
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.endswith(_WEIGHTS))
    facts: dict[str, Any] = {
        "rows": file_digest(Path(inputs.dataset)),
        "config": scientific(config),
        "tokenizer": {file.name: file_digest(file) for file in files},
        "template": text_digest(inputs.chat_template),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "part_rows": PART_ROWS,
        "format": _FORMAT,
    }
    if inputs.model is not None:
        facts["model"] = folder_digest(Path(inputs.model))
    for name in ("heads", "targets"):
        if (file_name := getattr(inputs, name)) is not None:
            facts[name] = file_digest(Path(file_name))
    return canonical_json(facts)


selection_scores = Stage(
    "selection_scores", 1, SelectionScoresConfig, SelectionScoresInputs, SelectionScoresOutputs, score_source,
    block="selector", distributed=True, eval_batch=True, num_passes=lambda config: PASSES[config.scorer],
)  # fmt: skip
