"""Stage `evaluation_cell`: one measurement of one model, and with every number how it was measured.

A cell is known by what decides its result: the model's content, the task with its definition and files, the template,
lm-eval's version, the type of the weights. Whoever asks for the same measurement of the same weights finds it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import (
    EvaluationCellConfig,
    EvaluationCellOutputs,
    EvaluationInputs,
    EvaluationSettings,
    SampledAccuracy,
    Score,
)
from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation import pair_accuracy, reward_benchmarks, sampling
from smoltulu.tasks.evaluation.kept import Kept, kept_scores
from smoltulu.tasks.evaluation.samples import SAMPLES_FILE, Sample, marked, write_samples
from smoltulu.tasks.models.batches import OnBatch
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
_STEPS = 1000  # progress is reported in thousandths of a cell
TASK_VERSION = "1"  # of our own measurements; raise it when one of them changes its meaning


def measure_cell(
    config: EvaluationCellConfig, inputs: EvaluationInputs, context: StageContext
) -> tuple[EvaluationCellOutputs, dict[str, float]]:
    """Make one measurement of `inputs.model`.

    Raises:
        ValueError: unknown task or metric, missing evaluation data, a model folder that cannot be loaded, another type
            of weights on this device than the key stands for.
    """
    check_model_folder(Path(inputs.model))
    _check_dtype(config, context.compute)
    kept = Kept(context.work, device_of(context.compute))
    if kept:
        logger.info("%s: goes on, %d answers are there", config.name, len(kept))
    raw: dict[str, Any] = {}
    if config.task is not None:
        scores, samples, raw = _lm_eval(config, inputs, context, kept)
    elif config.sampled is not None:
        scores, samples = _sampled(config, config.sampled, inputs, context, kept)
    elif config.kind == "implicit_reward":
        scores, samples = _implicit_reward(config, inputs, context, kept)
    elif config.benchmark is not None:
        scores, samples = _reward_benchmark(config, config.benchmark, inputs, context, kept)
    else:
        scores, samples = _preference_pairs(config, inputs, context, kept)
    about = {"backend": config.backend, "dtype": config.dtype, "max_length": config.max_length}
    scores = [score.model_copy(update={"details": score.details | about}) for score in scores]
    write_samples(context.folder / SAMPLES_FILE, samples)
    text = json.dumps(raw, indent=1, ensure_ascii=False, default=str)
    (context.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    for score in scores[:1]:
        logger.info("%s %s: %.4f (%d samples)", score.task, score.metric, score.value, score.num_samples)
    outputs = EvaluationCellOutputs(scores=tuple(scores), samples_file=SAMPLES_FILE, results_file=RESULTS_FILE)
    return outputs, {f"{score.task}/{score.metric}": score.value for score in scores}


def _check_dtype(config: EvaluationCellConfig, compute: ComputeSettings) -> None:
    """Warn where the recipe's precision is not that of the device. ValueError where the key stands for another one."""
    dtype = "bfloat16" if use_bfloat16(config.precision, compute) else "float32"
    if dtype != config.dtype:
        raise ValueError(
            f"this device measures in {dtype}, and this measurement is to be in {config.dtype}: the machine has a GPU "
            "that torch cannot use as the recipe asks. Set compute.device: cpu, or evaluation.precision: float32"
        )


def _lm_eval(
    config: EvaluationCellConfig, inputs: EvaluationInputs, context: StageContext, kept: Kept
) -> tuple[list[Score], list[Sample], dict[str, Any]]:
    """The score of an lm-eval task, the samples behind it, and lm-eval's own results."""
    assert config.task is not None and config.seed is not None and config.apply_chat_template is not None
    settings = EvaluationSettings(
        max_length=config.max_length, apply_chat_template=config.apply_chat_template, seed=config.seed
    )
    manager = harness.check_tasks((config.task,))
    model, tokenizer = _loaded(inputs, config, context)
    _fix_random_numbers(config.seed)
    wrapped = harness.wrap(
        model,
        tokenizer,
        batch_size=context.compute.per_device_eval_batch_size,
        max_length=_max_length(model, config),
        chat=config.apply_chat_template,
    )
    score, samples, results = harness.run_task(
        wrapped,
        manager,
        config.task,
        settings,
        chat_template=inputs.chat_template,
        world=inputs.world,
        externals=context.externals,
        on_progress=lambda share: context.report(int(share * _STEPS), _STEPS),
        kept=kept,
    )
    return [score], samples, {config.task.name: results}


def _sampled(
    config: EvaluationCellConfig,
    sampled: SampledAccuracy,
    inputs: EvaluationInputs,
    context: StageContext,
    kept: Kept,
) -> tuple[list[Score], list[Sample]]:
    if inputs.verified_eval is None:
        raise ValueError("evaluation.sampled needs held-out rlvr rows: set data.verified_eval")
    model, tokenizer = _loaded(inputs, config, context)
    max_length = _max_length(model, config)
    if sampled.max_new_tokens >= max_length:
        raise ValueError(
            f"evaluation.sampled.max_new_tokens {sampled.max_new_tokens} leaves no room for a prompt: this model and "
            f"evaluation.max_length allow {max_length} tokens in all"
        )
    rows = _read_rows(inputs.verified_eval, sampled.num_prompts)
    prompts, num_left_cut = sampling.encode_prompts(
        tokenizer,
        [row["prompt"] for row in rows],
        max_length - sampled.max_new_tokens,
        [row.get("tools") for row in rows],
    )
    completions = sampling.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=sampled.max_new_tokens,
        batch_size=context.compute.per_device_eval_batch_size,
        num_samples=sampled.num_samples_per_prompt,
        temperature=sampled.temperature,
        seed=sampled.seed,
        on_batch=context.report,
        kept=kept,
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
    asked: dict[str, dict[str, str]] = _digests(rows, ("prompt",), ("verifier", "ground_truth"))
    for row, ids in zip(rows, prompts, strict=True):
        asked[str(row["id"])] |= {"prompt": tokenizer.decode(ids), "target": str(row["ground_truth"])}
    samples = [{"task": score.task, **record, **asked[record["id"]]} for record in accuracy.records]
    return [score], [marked(one) for one in samples]


def _reward_benchmark(
    config: EvaluationCellConfig,
    benchmark: RewardBenchmark,
    inputs: EvaluationInputs,
    context: StageContext,
    kept: Kept,
) -> tuple[list[Score], list[Sample]]:
    model, tokenizer = _loaded(inputs, config, context)
    made, samples = reward_benchmarks.measure(
        benchmark,
        model,
        tokenizer,
        max_length=_max_length(model, config),
        batch_size=context.compute.per_device_eval_batch_size,
        world=Path(inputs.world) if inputs.world else None,
        digests=context.externals,
        on_batch=context.report,
        kept=kept,
    )
    scores = [
        Score(
            task=one.task,
            metric=one.metric,
            value=one.mean.value,
            stderr=one.mean.stderr,
            num_samples=one.mean.num,
            limited=one.limited,
            details=one.details,
            **_source(inputs),
        )
        for one in made
    ]
    return scores, samples


def _preference_pairs(
    config: EvaluationCellConfig, inputs: EvaluationInputs, context: StageContext, kept: Kept
) -> tuple[list[Score], list[Sample]]:
    pairs = _pairs(inputs)
    model, tokenizer = _loaded(inputs, config, context)
    ids, texts = pair_accuracy.encode_pairs(tokenizer, pairs, _max_length(model, config))
    batch_size = context.compute.per_device_eval_batch_size

    def score(places: list[int], on_batch: OnBatch) -> list[float]:
        own = [texts[place].ids for place in places]
        return pair_accuracy.reward_scores(model, tokenizer, own, batch_size=batch_size, on_batch=on_batch)

    rewards = kept_scores(kept, "reward", [text.ids for text in texts], batch_size, context.report, score)
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
    config: EvaluationCellConfig, inputs: EvaluationInputs, context: StageContext, kept: Kept
) -> tuple[list[Score], list[Sample]]:
    pairs = _pairs(inputs)
    if inputs.reference_model is None:
        raise ValueError("implicit_reward compares with the model DPO started from: give reference_model")
    check_model_folder(Path(inputs.reference_model))
    logps = []
    for position, folder in enumerate((inputs.model, inputs.reference_model)):
        # One model at a time, so that a policy and its reference need the memory of one.
        device = device_of(context.compute)
        model, tokenizer = _load(folder, inputs.chat_template, False, config.dtype, device)
        if position == 0:
            ids, texts = pair_accuracy.encode_pairs(tokenizer, pairs, _max_length(model, config))

        logps.append(_logps(("policy", "reference")[position], model, tokenizer, texts, context, kept))
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


def _logps(
    label: str,
    model: Any,
    tokenizer: Any,
    texts: Sequence[pair_accuracy.EncodedText],
    context: StageContext,
    kept: Kept,
) -> list[float]:
    """Log-probability of each completion by one of the two models, `label`."""
    batch_size = context.compute.per_device_eval_batch_size

    def score(places: list[int], on_batch: OnBatch) -> list[float]:
        own = [texts[place] for place in places]
        return pair_accuracy.completion_logps(model, tokenizer, own, batch_size=batch_size, on_batch=on_batch)

    def report(num_done: int, num_in_all: int) -> None:
        context.report((label == "reference") * num_in_all + num_done, 2 * num_in_all)

    return kept_scores(kept, label, [text.ids for text in texts], batch_size, report, score)


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
        said = [row[name] for name in names] + ([row["tools"]] if "tools" in row and "prompt" in names else [])
        return text_digest(json.dumps(said, ensure_ascii=False, sort_keys=True))[:16]

    return {str(row["id"]): {"doc_hash": digest(row, question), "target_hash": digest(row, answer)} for row in rows}


def _source(inputs: EvaluationInputs) -> dict[str, Any]:
    """The fields of a `Score` that say how our own measurements are made."""
    try:
        version = metadata.version("smoltulu")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "(not installed)"
    return {
        "num_fewshot": 0,
        "harness": f"smoltulu {version}",
        "task_version": TASK_VERSION,
        "template_digest": text_digest(inputs.chat_template),
    }


def _loaded(inputs: EvaluationInputs, config: EvaluationCellConfig, context: StageContext) -> tuple[Any, Any]:
    """Model and tokenizer; the last ones are kept, as all measurements of a model are made in one process."""
    folder, device = Path(inputs.model), device_of(context.compute)
    changed = max(path.stat().st_mtime_ns for path in folder.iterdir())
    return _last(inputs.model, changed, inputs.chat_template, config.kind == "reward_model", config.dtype, device)


@lru_cache(maxsize=1)
def _last(folder: str, changed: int, template: str, is_scored: bool, dtype: str, device: str) -> tuple[Any, Any]:
    return _load(folder, template, is_scored, dtype, device)


def _load(folder: str, chat_template: str, is_scored: bool, dtype: str, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, and its tokenizer. `is_scored`: it has a head for rewards."""
    tokenizer = load_tokenizer(Path(folder), chat_template)
    load = load_to_score if is_scored else load_to_write
    return load(Path(folder), tokenizer, dtype == "bfloat16").to(device), tokenizer


def _max_length(model: Any, config: EvaluationCellConfig) -> int:
    return min(config.max_length, int(model.config.max_position_embeddings))


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


evaluation_cell = Stage(
    name="evaluation_cell",
    version=2,
    config=EvaluationCellConfig,
    inputs=EvaluationInputs,
    outputs=EvaluationCellOutputs,
    function=measure_cell,
    eval_batch=True,
)
