"""Stage `evaluation`: measure one model, and write down with every number how it was measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.evaluation import (
    EvaluationInputs,
    EvaluationOutputs,
    EvaluationSettings,
    EvaluationStageConfig,
    SampledAccuracy,
    Score,
)
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation import pair_accuracy, sampling
from smoltulu.tasks.evaluation.samples import SAMPLES_FILE, Sample, marked, write_samples
from smoltulu.tasks.models.classifiers import load_to_score
from smoltulu.tasks.models.folders import (
    check_model_folder,
    device_of,
    load_to_write,
    load_tokenizer,
    use_bfloat16,
)
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

PairValue = tuple[str, float, float | None, dict[str, Any]]  # metric, value, standard error, details

RESULTS_FILE = "results.json"
_STEPS_PER_TASK = 1000  # progress is reported in thousandths of a task
_TASK_VERSION = "1"  # of our own measurements; raise it when one of them changes its meaning


def evaluate(
    config: EvaluationStageConfig, inputs: EvaluationInputs, context: StageContext
) -> tuple[EvaluationOutputs, dict[str, float]]:
    """Measure `inputs.model`: lm-eval tasks and sampled accuracy, or pair accuracy of a reward (model).

    Raises:
        ValueError: unknown task or metric, missing evaluation data, a model folder that cannot be loaded.
    """
    check_model_folder(Path(inputs.model))
    raw: dict[str, Any] = {}
    if config.kind == "language_model":
        scores, samples, raw = _language_model(config.settings, inputs, context)
    elif config.kind == "reward_model":
        scores, samples = _reward_model(config.settings, inputs, context)
    else:
        scores, samples = _implicit_reward(config.settings, inputs, context)
    write_samples(context.folder / SAMPLES_FILE, samples)
    document = {"subject": config.subject, "kind": config.kind, "scores": [score.model_dump() for score in scores]}
    text = json.dumps({**document, "lm_eval": raw}, indent=1, ensure_ascii=False, default=str)
    (context.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    outputs = EvaluationOutputs(
        subject=config.subject, scores=tuple(scores), samples_file=SAMPLES_FILE, results_file=RESULTS_FILE
    )
    return outputs, {f"{score.task}/{score.metric}": score.value for score in scores}


def _language_model(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext
) -> tuple[list[Score], list[Sample], dict[str, Any]]:
    """Scores, the samples behind them, and lm-eval's own results by task."""
    if not settings.tasks and settings.sampled is None:
        raise ValueError("nothing to evaluate: give evaluation.tasks or evaluation.sampled")
    manager = harness.check_tasks(settings.tasks) if settings.tasks else None
    if settings.sampled and inputs.verified_eval is None:
        raise ValueError("evaluation.sampled needs held-out rlvr rows: set data.verified_eval")
    model, tokenizer = _load(inputs.model, inputs, settings, context)
    max_length = _max_length(model, settings)
    scores: list[Score] = []
    samples: list[Sample] = []
    raw: dict[str, Any] = {}
    num_parts = len(settings.tasks) + (settings.sampled is not None)

    def report(part: int, share: float) -> None:
        context.report(int((part + share) * _STEPS_PER_TASK), num_parts * _STEPS_PER_TASK)

    if manager is not None:
        _fix_random_numbers(settings.seed)
        wrapped = harness.wrap(
            model,
            tokenizer,
            batch_size=context.compute.per_device_eval_batch_size,
            max_length=max_length,
            chat=settings.apply_chat_template,
        )
        for part, task in enumerate(settings.tasks):
            score, records, results = harness.run_task(
                wrapped,
                manager,
                task,
                settings,
                chat_template=inputs.chat_template,
                world=inputs.world,
                externals=context.externals,
                on_progress=partial(report, part),
            )
            scores.append(score)
            # A task may be asked for twice, with other shots or metrics, and be a member of a group as well.
            samples += [record | {"entry": part} for record in records]
            raw[task.name] = results
            logger.info("%s %s: %.4f (%d documents)", task.name, task.metric, score.value, score.num_samples)
    if settings.sampled is not None:
        score, records = _sampled(
            model,
            tokenizer,
            max_length,
            settings.sampled,
            inputs,
            context.compute.per_device_eval_batch_size,
            partial(report, len(scores)),
        )
        scores.append(score)
        samples += records
    return scores, samples, raw


def _sampled(
    model: Any,
    tokenizer: Any,
    max_length: int,
    sampled: SampledAccuracy,
    inputs: EvaluationInputs,
    batch_size: int,
    on_progress: Callable[[float], None],
) -> tuple[Score, list[Sample]]:
    assert inputs.verified_eval is not None
    if sampled.max_new_tokens >= max_length:
        raise ValueError(
            f"evaluation.sampled.max_new_tokens {sampled.max_new_tokens} leaves no room for a prompt: this model and "
            f"evaluation.max_length allow {max_length} tokens in all"
        )
    rows = _read_rows(inputs.verified_eval, sampled.num_prompts)
    prompts, num_left_cut = sampling.encode_prompts(
        tokenizer, [row["prompt"] for row in rows], max_length - sampled.max_new_tokens
    )
    completions = sampling.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=sampled.max_new_tokens,
        batch_size=batch_size,
        num_samples=sampled.num_samples_per_prompt,
        temperature=sampled.temperature,
        seed=sampled.seed,
        on_batch=lambda num_done, num_completions: on_progress(num_done / num_completions),
    )
    accuracy = sampling.verified_accuracy(rows, completions)
    num_samples = len(accuracy.records) * sampled.num_samples_per_prompt
    score = Score(
        task="verified_sampled",
        metric="accuracy",
        value=accuracy.value,
        stderr=accuracy.stderr,
        num_samples=num_samples,
        details={
            "num_prompts": len(accuracy.records),
            "num_samples_per_prompt": sampled.num_samples_per_prompt,
            "temperature": sampled.temperature,
            "max_new_tokens": sampled.max_new_tokens,
            "seed": sampled.seed,
            "num_ungradable": accuracy.num_ungradable,
            # Of samples; prompts that were cut are counted once.
            "num_empty": sum(not one.text.strip() for samples in completions for one in samples),
            "num_truncated": sum(not one.stopped for samples in completions for one in samples),
            "num_left_cut": num_left_cut,
            "stopped_share": sum(record["num_stopped"] for record in accuracy.records) / num_samples,
            "stderr": "clustered by prompt",
        },
        **_source(inputs),
    )
    asked = _digests(rows, ("prompt",), ("verifier", "ground_truth"))
    samples = [{"task": score.task, **record, **asked[record["id"]]} for record in accuracy.records]
    return score, [marked(one) for one in samples]


def _reward_model(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext
) -> tuple[list[Score], list[Sample]]:
    pairs = _pairs(inputs)
    model, tokenizer = _load(inputs.model, inputs, settings, context, reward_model=True)
    ids, texts = pair_accuracy.encode_pairs(tokenizer, pairs, _max_length(model, settings))
    rewards = pair_accuracy.reward_scores(
        model,
        tokenizer,
        [text.ids for text in texts],
        batch_size=context.compute.per_device_eval_batch_size,
        on_batch=context.report,
    )
    measured = pair_accuracy.rank_pairs(rewards)
    asked = _digests(pairs, ("prompt",), ("chosen", "rejected"))
    samples: list[Sample] = [
        {"task": "preference", "id": pair_id, "right": right, "chosen": chosen, "rejected": rejected, **asked[pair_id]}
        for pair_id, right, chosen, rejected in zip(ids, measured.right, rewards[::2], rewards[1::2], strict=True)
    ]
    counts = {
        "num_too_long": len(pairs) - len(ids),
        "num_ties": sum(sample["chosen"] == sample["rejected"] for sample in samples),
    }
    margin = {"margin": "score of chosen minus score of rejected"}
    values: list[PairValue] = [
        ("pair_accuracy", measured.value, measured.stderr, counts),
        ("mean_margin", measured.margin, measured.margin_stderr, margin),
    ]
    return _pair_scores("preference", len(ids), inputs, values), samples


def _implicit_reward(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext
) -> tuple[list[Score], list[Sample]]:
    pairs = _pairs(inputs)
    if inputs.reference_model is None:
        raise ValueError("implicit_reward compares with the model DPO started from: give reference_model")
    check_model_folder(Path(inputs.reference_model))
    logps = []
    for position, folder in enumerate((inputs.model, inputs.reference_model)):
        # One model at a time, so that a policy and its reference need the memory of one.
        model, tokenizer = _load(folder, inputs, settings, context)
        if position == 0:
            ids, texts = pair_accuracy.encode_pairs(tokenizer, pairs, _max_length(model, settings))
        logps.append(
            pair_accuracy.completion_logps(
                model,
                tokenizer,
                texts,
                batch_size=context.compute.per_device_eval_batch_size,
                on_batch=partial(_report_half, context, position),
            )
        )
        del model
    mean, total, records = pair_accuracy.implicit_reward_accuracy(ids, texts, *logps)
    per_token = "log-probability ratio per completion token, eos included"
    summed = "log-probability ratio summed over the completion, eos included"
    details = {"num_too_long": len(pairs) - len(ids), "reward": per_token}
    values: list[PairValue] = [
        ("pair_accuracy", mean.value, mean.stderr, details),
        ("pair_accuracy_unnormalised", total.value, total.stderr, {"reward": summed}),
        ("mean_margin", mean.margin, mean.margin_stderr, {"reward": f"{per_token}, without beta"}),
        ("mean_margin_unnormalised", total.margin, total.margin_stderr, {"reward": f"{summed}, without beta"}),
    ]
    asked = _digests(pairs, ("prompt",), ("chosen", "rejected"))
    samples = [{"task": "implicit_reward", **record, **asked[record["id"]]} for record in records]
    return _pair_scores("implicit_reward", len(ids), inputs, values), samples


def _pair_scores(task: str, num_pairs: int, inputs: EvaluationInputs, values: list[PairValue]) -> list[Score]:
    source = _source(inputs)
    return [
        Score(task=task, metric=metric, value=value, stderr=stderr, num_samples=num_pairs, details=details, **source)
        for metric, value, stderr, details in values
    ]


def _digests(
    rows: Sequence[Mapping[str, Any]], question: Sequence[str], answer: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Id -> digests of what is asked and of what is right, as lm-eval's samples have them: rows may be made again."""

    def digest(row: Mapping[str, Any], names: Sequence[str]) -> str:
        return text_digest(json.dumps([row[name] for name in names], ensure_ascii=False, sort_keys=True))[:16]

    return {str(row["id"]): {"doc_hash": digest(row, question), "target_hash": digest(row, answer)} for row in rows}


def _report_half(context: StageContext, position: int, num_done: int, num_in_all: int) -> None:
    """Progress of the first (0) or second (1) of two passes over the same pairs."""
    context.report(position * num_in_all + num_done, 2 * num_in_all)


def _source(inputs: EvaluationInputs) -> dict[str, Any]:
    """The fields of a `Score` that say how our own measurements are made."""
    try:
        version = metadata.version("smoltulu")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "(not installed)"
    return {
        "num_fewshot": 0,
        "harness": f"smoltulu {version}",
        "task_version": _TASK_VERSION,
        "template_digest": text_digest(inputs.chat_template),
    }


def _load(
    folder: str,
    inputs: EvaluationInputs,
    settings: EvaluationSettings,
    context: StageContext,
    *,
    reward_model: bool = False,
) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, in the precision that this device has, and its tokenizer."""
    tokenizer = load_tokenizer(Path(folder), inputs.chat_template)
    load = load_to_score if reward_model else load_to_write
    model = load(Path(folder), tokenizer, use_bfloat16(settings.precision, context.compute))
    return model.to(device_of(context.compute)), tokenizer


def _max_length(model: Any, settings: EvaluationSettings) -> int:
    return min(settings.max_length, model.config.max_position_embeddings)


def _pairs(inputs: EvaluationInputs) -> list[dict[str, Any]]:
    if inputs.preference_eval is None:
        raise ValueError("pair accuracy needs held-out pairs: set data.preference_eval")
    return _read_rows(inputs.preference_eval)


def _read_rows(file: str, limit: int | None = None) -> list[dict[str, Any]]:
    rows = list(stored_rows(Path(file), count=limit))
    if not rows:
        raise ValueError(f"{Path(file).name} has no rows to evaluate on; check the evaluation set in the recipe's data")
    return rows


def _fix_random_numbers(seed: int) -> None:
    """lm-eval tasks may draw from the global generators, and IFEval's language detector guesses unless seeded."""
    import langdetect
    from transformers import set_seed

    set_seed(seed)
    langdetect.DetectorFactory.seed = 0


evaluation = Stage(
    name="evaluation",
    version=1,
    same_externals={
        # recipes/lm_eval/: its files named modules of ours by other paths.
        "8b468125da96605f8dc2d4ec67234942903aef99eb9c5258e02a39aab318dfe1": (
            "6e7fe912c266117b365025583ae7ae8303948e2d87a2a3997e885775df5005c1"
        ),
    },
    config=EvaluationStageConfig,
    inputs=EvaluationInputs,
    outputs=EvaluationOutputs,
    function=evaluate,
    eval_batch=True,
)
