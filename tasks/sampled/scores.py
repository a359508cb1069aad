"""Stage `sample_scores`: what samples are worth, by the verifiers of their prompts, by the reward model, or by both.

The reward model reads an answer as a row would have it: with an end, also where the model had not ended it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import canonical_json, file_digest, folder_digest, text_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.sampled import SampleScoresConfig, SampleScoresInputs, SampleScoresOutputs
from smoltulu.tasks.evaluation.pair_accuracy import reward_scores
from smoltulu.tasks.models.classifiers import load_to_score
from smoltulu.tasks.models.folders import check_model_folder, load_tokenizer, use_bfloat16
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.models.tokens import conversations, rendering_errors
from smoltulu.tasks.models.turns import Messages, Prompt, tools_of
from smoltulu.tasks.sampled import parts
from smoltulu.tasks.sampled.samples import asked_of, is_of_samples
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.verifiers import VERIFIERS_VERSION, Graders, Verdict

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_PACKAGES = ("torch", "transformers", "tokenizers")

Rewards = Callable[[list[Messages]], list[float | None]]  # conversations -> their scores


def score_samples(
    config: SampleScoresConfig, inputs: SampleScoresInputs, context: StageContext
) -> tuple[SampleScoresOutputs, dict[str, float]]:
    """Score samples by verifiers, by the reward model, or by both.

    Raises:
        ValueError: verifiers are asked for and a prompt has none; the reward model is none, or scores NaN.
    """
    from pyarrow import parquet

    prepare_torch(context)
    rewards: Rewards | None = None
    counts: Counter[str] = Counter()
    with parquet.ParquetFile(Path(inputs.samples)) as file, Graders(context.compute.num_threads) as graders:
        if not is_of_samples(file.schema_arrow):
            raise ValueError(f"{inputs.samples} holds no samples of this version; make them again (refresh samples)")

        def make(number: int) -> parts.Lines:
            nonlocal rewards
            lines = file.read_row_group(number, use_threads=False).to_pylist()
            made = [{"id": line["id"], "outcomes": [], "reasons": [], "rewards": []} for line in lines]
            if config.verifier:
                add_verdicts(made, lines, graders.grade_all)
            if config.reward_precision is not None:
                rewards = rewards or _rewards(config, inputs, context)
                add_rewards(made, lines, rewards)
            context.report(number + 1, file.num_row_groups)
            return made

        def see(lines: parts.Lines) -> None:
            counts.update(outcome for line in lines for outcome in line["outcomes"])
            counts["without_reward"] += sum(reward is None for line in lines for reward in line["rewards"])
            counts["scored"] += sum(max(len(line["outcomes"]), len(line["rewards"])) for line in lines)

        order = range(file.num_row_groups)
        made = parts.lines_in_parts(context, _made_from(config, inputs), order, schema(), make)
        parts.write_lines(context, SampleScoresOutputs.model_fields["file"].default, schema(), made, see)
    outcomes = {name: counts[name] for name in ("right", "wrong", "could_not_grade")} if config.verifier else {}
    outputs = SampleScoresOutputs(
        num_scored=counts["scored"],
        outcomes=outcomes,
        num_without_reward=counts["without_reward"],
    )
    graded = {f"{name}_share": count / max(outputs.num_scored, 1) for name, count in outcomes.items()}
    return outputs, {"num_scored": float(outputs.num_scored), **graded}


def schema() -> pa.Schema:
    """Columns of the file: a line a prompt, each list as long as its samples, or empty where that was not asked for."""
    import pyarrow as pa

    lists = {"outcomes": pa.string(), "reasons": pa.string(), "rewards": pa.float64()}
    fields = [pa.field(name, pa.list_(kind), nullable=False) for name, kind in lists.items()]
    return pa.schema([pa.field("id", pa.string(), nullable=False), *fields])


def add_verdicts(
    made: parts.Lines, lines: parts.Lines, grade: Callable[[list[tuple[str, str, str]]], list[Verdict]]
) -> None:
    """Outcome and reason of every sample, into `made`."""
    if without := [line["id"] for line in lines if not line["verifier"]]:
        raise ValueError(f"prompts without a verifier cannot be graded, e.g. {without[0]}; score by the reward model")
    jobs = [(line["verifier"], one["text"], line["ground_truth"]) for line in lines for one in line["samples"]]
    verdicts = iter(grade(jobs))
    for target, line in zip(made, lines, strict=True):
        several = [next(verdicts) for _ in line["samples"]]
        target["outcomes"] = [verdict.outcome for verdict in several]
        target["reasons"] = [verdict.reason for verdict in several]


def add_rewards(made: parts.Lines, lines: parts.Lines, rewards: Rewards) -> None:
    """Reward of every sample, into `made`. What says the same after one prompt is scored once."""
    wanted = list(dict.fromkeys((place, one["text"]) for place, line in enumerate(lines) for one in line["samples"]))
    prompts = [Prompt(*asked_of(line)) for line in lines]
    answered: list[Messages] = [
        Prompt([*prompts[place], {"role": "assistant", "content": text}], prompts[place].tools)
        for place, text in wanted
    ]
    found = dict(zip(wanted, rewards(answered), strict=True))
    for place, (target, line) in enumerate(zip(made, lines, strict=True)):
        target["rewards"] = [found[place, one["text"]] for one in line["samples"]]


def _rewards(config: SampleScoresConfig, inputs: SampleScoresInputs, context: StageContext) -> Rewards:
    """The reward model, loaded, as a function. None for what is longer than its positions, or not rendered."""

    assert inputs.reward_model is not None and config.reward_precision is not None
    folder = Path(inputs.reward_model)
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, inputs.chat_template)
    model = load_to_score(folder, tokenizer, use_bfloat16(config.reward_precision, context.compute))
    model.to(str(processes_of(context).device))
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 30

    def rewards(answered: list[Messages]) -> list[float | None]:
        ids = _ids(tokenizer, answered)
        kept = [place for place, tokens in enumerate(ids) if tokens is not None and len(tokens) <= room]
        scores = reward_scores(
            model,
            tokenizer,
            [ids[place] or [] for place in kept],
            batch_size=context.compute.per_device_eval_batch_size,
        )
        if broken := sum(not math.isfinite(score) for score in scores):
            raise ValueError(
                f"{broken:,} of {len(scores):,} scores of the reward model are NaN or infinite: it is broken; look at "
                "the loss of its training"
            )
        found = dict(zip(kept, scores, strict=True))
        return [found.get(place) for place in range(len(answered))]

    return rewards


def _ids(tokenizer: PreTrainedTokenizerBase, answered: list[Messages]) -> list[list[int] | None]:
    """Token ids of whole conversations; None where the template refuses one."""
    try:
        return [one.input_ids for one in conversations(tokenizer, answered, list(map(tools_of, answered)))]
    except rendering_errors():
        return [None] if len(answered) == 1 else [ids for one in answered for ids in _ids(tokenizer, [one])]


def _made_from(config: SampleScoresConfig, inputs: SampleScoresInputs) -> str:
    """What the parts are made from."""
    facts: dict[str, Any] = {"samples": file_digest(Path(inputs.samples)), "config": scientific(config)}
    if config.verifier:
        facts["verifiers"] = VERIFIERS_VERSION
    if inputs.reward_model is not None:
        facts["reward_model"] = folder_digest(Path(inputs.reward_model))
        facts["template"] = text_digest(inputs.chat_template)
        facts["packages"] = {name: metadata.version(name) for name in _PACKAGES}
    return canonical_json(facts)


sample_scores = Stage(
    "sample_scores", 1, SampleScoresConfig, SampleScoresInputs, SampleScoresOutputs, score_samples,
    block="sampled", distributed=True, eval_batch=True, grows_with_model=False,
)  # fmt: skip
