"""Stage `evaluation`: measure one model, and write down with every number how it was measured."""

from __future__ import annotations

import json
import logging
import random
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from smoltulu.schemas.evaluation import (
    EvaluationInputs,
    EvaluationOutputs,
    EvaluationSettings,
    EvaluationStageConfig,
    Score,
)
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation import pair_accuracy, sampling
from smoltulu.tasks.models.folders import (
    check_model_folder,
    device_of,
    fit_embeddings,
    load_language_model,
    load_tokenizer,
    use_bfloat16,
)
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

SAMPLES_FILE = "samples.jsonl"
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
    with (context.folder / SAMPLES_FILE).open("w", encoding="utf-8") as samples:

        def write(record: dict[str, Any]) -> None:
            samples.write(json.dumps(record, ensure_ascii=False) + "\n")

        raw: dict[str, Any] = {}
        if config.kind == "language_model":
            scores, raw = _language_model(config.settings, inputs, context, write)
        elif config.kind == "reward_model":
            scores = _reward_model(config.settings, inputs, context, write)
        else:
            scores = _implicit_reward(config.settings, inputs, context, write)
    document = {"subject": config.subject, "kind": config.kind, "scores": [score.model_dump() for score in scores]}
    text = json.dumps({**document, "lm_eval": raw}, indent=1, ensure_ascii=False, default=str)
    (context.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    outputs = EvaluationOutputs(
        subject=config.subject, scores=tuple(scores), samples_file=SAMPLES_FILE, results_file=RESULTS_FILE
    )
    return outputs, {f"{score.task}/{score.metric}": score.value for score in scores}


def _language_model(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext, write: Any
) -> tuple[list[Score], dict[str, Any]]:
    if not settings.tasks and settings.sampled is None:
        raise ValueError("nothing to evaluate: give evaluation.tasks or evaluation.sampled")
    manager = harness.check_tasks(settings.tasks) if settings.tasks else None
    if settings.sampled and inputs.verified_eval is None:
        raise ValueError("evaluation.sampled needs held-out rlvr rows: set data.verified_eval")
    model, tokenizer = _load(inputs.model, inputs, settings, context)
    max_length = _max_length(model, settings)
    scores: list[Score] = []
    raw: dict[str, Any] = {}
    num_parts = len(settings.tasks) + (settings.sampled is not None)

    def report(part: int, share: float, **metrics: float) -> None:
        context.report(int((part + share) * _STEPS_PER_TASK), num_parts * _STEPS_PER_TASK, **metrics)

    if manager is not None:
        _fix_random_numbers(settings.seed)
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=context.compute.per_device_eval_batch_size,
            max_length=max_length,
            softmax_dtype="float32",  # sums of bfloat16 are rounded to a quarter: choices would tie
        )
        for part, task in enumerate(settings.tasks):
            score, records, results = harness.run_task(
                wrapped,
                manager,
                task,
                settings,
                chat_template=inputs.chat_template,
                world=inputs.world,
                on_progress=partial(report, part),
            )
            for record in records:
                write(record)
            scores.append(score)
            raw[task.name] = results
            logger.info("%s %s: %.4f (%d documents)", task.name, task.metric, score.value, score.num_samples)
    if settings.sampled is not None:
        scores.append(_sampled(model, tokenizer, max_length, settings, inputs, context, write, report, len(scores)))
    return scores, raw


def _sampled(
    model: Any,
    tokenizer: Any,
    max_length: int,
    settings: EvaluationSettings,
    inputs: EvaluationInputs,
    context: StageContext,
    write: Any,
    report: Any,
    part: int,
) -> Score:
    sampled = settings.sampled
    assert sampled is not None and inputs.verified_eval is not None
    if sampled.max_new_tokens >= max_length:
        raise ValueError(
            f"evaluation.sampled.max_new_tokens {sampled.max_new_tokens} leaves no room for a prompt: this model and "
            f"evaluation.max_length allow {max_length} tokens in all"
        )
    rows = _read_rows(inputs.verified_eval, sampled.num_prompts)
    prompts, num_truncated = sampling.encode_prompts(
        tokenizer, [row["prompt"] for row in rows], max_length - sampled.max_new_tokens
    )
    num_completions = len(rows) * sampled.num_samples_per_prompt
    completions = sampling.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=sampled.max_new_tokens,
        batch_size=context.compute.per_device_eval_batch_size,
        num_samples=sampled.num_samples_per_prompt,
        temperature=sampled.temperature,
        seed=sampled.seed,
        on_batch=lambda num_done, num_tokens: report(part, num_done / num_completions),
    )
    accuracy = sampling.verified_accuracy(rows, completions, num_truncated)
    for prompt in accuracy.prompts:
        write(
            {
                "task": "verified_sampled",
                "id": prompt.id,
                "scores": prompt.scores,
                "mean": prompt.mean,
                "num_stopped": prompt.num_stopped,
                "completion": prompt.first_completion,
            }
        )
    num_samples = len(accuracy.prompts) * sampled.num_samples_per_prompt
    return _own_score(
        "verified_sampled",
        "accuracy",
        accuracy.value,
        accuracy.stderr,
        num_samples,
        inputs.chat_template,
        {
            "num_prompts": len(accuracy.prompts),
            "num_samples_per_prompt": sampled.num_samples_per_prompt,
            "temperature": sampled.temperature,
            "max_new_tokens": sampled.max_new_tokens,
            "num_ungradable": accuracy.num_ungradable,
            "num_truncated": accuracy.num_truncated,
            "stopped_share": sum(prompt.num_stopped for prompt in accuracy.prompts) / num_samples,
            "stderr": "clustered by prompt",
        },
    )


def _reward_model(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext, write: Any
) -> list[Score]:
    pairs = _pairs(inputs)
    model, tokenizer = _load(inputs.model, inputs, settings, context, reward_model=True)
    measured = pair_accuracy.reward_model_accuracy(
        model,
        tokenizer,
        pairs,
        max_length=_max_length(model, settings),
        batch_size=context.compute.per_device_eval_batch_size,
        on_batch=context.report,
    )
    for record in measured.records:
        write({"task": "preference", **record})
    margin = {"margin": "score of chosen minus score of rejected"}
    return _pair_scores(
        "preference",
        measured,
        inputs,
        [
            ("pair_accuracy", measured.value, measured.stderr, measured.details),
            ("mean_margin", measured.margin, measured.margin_stderr, margin),
        ],
    )


def _implicit_reward(
    settings: EvaluationSettings, inputs: EvaluationInputs, context: StageContext, write: Any
) -> list[Score]:
    pairs = _pairs(inputs)
    if inputs.reference_model is None:
        raise ValueError("implicit_reward compares with the model DPO started from: give reference_model")
    check_model_folder(Path(inputs.reference_model))
    logps = []
    encoded = num_too_long = None
    for position, folder in enumerate((inputs.model, inputs.reference_model)):
        # One model at a time, so that a policy and its reference need the memory of one.
        model, tokenizer = _load(folder, inputs, settings, context)
        if encoded is None:
            encoded, num_too_long = pair_accuracy.encode_pairs(tokenizer, pairs, _max_length(model, settings))
        logps.append(
            pair_accuracy.completion_logps(
                model,
                tokenizer,
                [side for pair in encoded for side in (pair.chosen, pair.rejected)],
                batch_size=context.compute.per_device_eval_batch_size,
                on_batch=partial(_report_half, context, position),
            )
        )
        del model
    assert encoded is not None and num_too_long is not None
    measured = pair_accuracy.implicit_reward_accuracy(encoded, logps[0], logps[1], num_too_long)
    for record in measured.records:
        write({"task": "implicit_reward", **record})
    sums = measured.details
    per_token = "log-probability ratio per completion token, eos included"
    summed = "log-probability ratio summed over the completion, eos included"
    margin, margin_stderr = sums["margin_sum"], sums["margin_sum_stderr"]
    return _pair_scores(
        "implicit_reward",
        measured,
        inputs,
        [
            ("pair_accuracy", measured.value, measured.stderr, {**sums, "reward": per_token}),
            ("pair_accuracy_unnormalised", sums["accuracy_sum"], sums["accuracy_sum_stderr"], {"reward": summed}),
            ("mean_margin", measured.margin, measured.margin_stderr, {"reward": f"{per_token}, without beta"}),
            ("mean_margin_unnormalised", margin, margin_stderr, {"reward": f"{summed}, without beta"}),
        ],
    )


def _pair_scores(
    task: str,
    measured: pair_accuracy.PairAccuracy,
    inputs: EvaluationInputs,
    values: list[tuple[str, float, float | None, dict[str, Any]]],
) -> list[Score]:
    """Scores of (metric, value, standard error, details) on the held-out pairs; says how many of them were too long."""
    if num_too_long := measured.details["num_too_long"]:
        num_in_all = measured.num_pairs + num_too_long
        logger.warning("%s of %s held-out pairs left out: longer than max_length", num_too_long, num_in_all)
    return [
        _own_score(task, metric, value, stderr, measured.num_pairs, inputs.chat_template, details)
        for metric, value, stderr, details in values
    ]


def _report_half(context: StageContext, position: int, num_done: int, num_in_all: int) -> None:
    """Progress of the first (0) or second (1) of two passes over the same pairs."""
    context.report(position * num_in_all + num_done, 2 * num_in_all)


def _own_score(
    task: str,
    metric: str,
    value: float,
    stderr: float | None,
    num_samples: int,
    chat_template: str,
    details: dict[str, Any],
) -> Score:
    return Score(
        task=task,
        metric=metric,
        value=value,
        stderr=stderr,
        num_samples=num_samples,
        num_fewshot=0,
        harness=_own_harness(),
        task_version=_TASK_VERSION,
        template_digest=harness.template_digest(chat_template),
        details=details,
    )


def _own_harness() -> str:
    try:
        return f"smoltulu {metadata.version('smoltulu')}"
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "smoltulu (not installed)"


def _load(
    folder: str,
    inputs: EvaluationInputs,
    settings: EvaluationSettings,
    context: StageContext,
    *,
    reward_model: bool = False,
) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, in the precision that this device has, and its tokenizer."""
    import torch

    tokenizer = load_tokenizer(Path(folder), inputs.chat_template)
    model = pair_accuracy.load_reward_model(Path(folder)) if reward_model else load_language_model(Path(folder))
    fit_embeddings(model, tokenizer)  # a pad token that was added here needs a row; it is never attended to
    if use_bfloat16(settings.precision, context.compute):
        # Not the buffers: rotary frequencies in bfloat16 turn position 2,000 by another radian. Not the score head,
        # which was trained in float32.
        for name, parameter in model.named_parameters():
            if not (reward_model and name.startswith("score.")):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device_of(context.compute)).eval(), tokenizer


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
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    try:
        import langdetect
    except ImportError:
        return
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
