"""Pass rates: how often the model that RLVR starts from is right, prompt by prompt.

A prompt that is never or always right teaches nothing to an algorithm whose baseline is the other rollouts of a prompt.
Samples are drawn as the run draws its rollouts: same temperature, length, verifiers. Prompts go by length and in parts:
a killed stage resumes after its last whole part. Random numbers belong to a prompt and a sample, so neither parts nor
other prompts change what a prompt is answered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from smoltulu.artifacts.checkpoints import fault, mark_complete
from smoltulu.artifacts.files import made_from_folder, remove_tree
from smoltulu.artifacts.keys import canonical_json, folder_digest, text_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.verifier_audit import PassRatesConfig, PassRatesInputs, PassRatesOutputs, Pool, PoolCounts
from smoltulu.tasks.data.draw import drawn, seed_of
from smoltulu.tasks.data.rows import rows_digest, stored_rows
from smoltulu.tasks.evaluation.sampling import Completion
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Request, Sampling, Written
from smoltulu.tasks.models.folders import (
    check_model_folder,
    load_to_write,
    load_tokenizer,
    use_bfloat16,
)
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.models.tokens import prompt_ids, stop_token_ids
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.verifiers import VERIFIERS_VERSION, Graders, Verdict

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

#: Prompts of a part. Not the batch size, which may differ after a resume.
PART_PROMPTS = 128
_PART_FILE = "rates.parquet"
_PACKAGES = ("torch", "transformers", "tokenizers")

Answer = Callable[[Sequence[int]], list[list[Completion]]]  # numbers of rows -> their samples


def measure_pass_rates(
    config: PassRatesConfig, inputs: PassRatesInputs, context: StageContext
) -> tuple[PassRatesOutputs, dict[str, float]]:
    """Sample, grade, count. Of N processes each takes every N-th part.

    Raises:
        ValueError: no rows, or prompts that leave no room for an answer.
    """
    prepare_torch(context)
    from pyarrow import parquet

    check_model_folder(Path(inputs.model))
    rows = list(stored_rows(Path(inputs.dataset)))
    if not rows:
        raise ValueError("there are no RLVR rows to measure; look at data.rlvr and at what the preflight left out")
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    drawn = draw(rows, config.settings.num_prompts, config.settings.seed)
    asked, tools = [rows[number]["prompt"] for number in drawn], [rows[number].get("tools") for number in drawn]
    prompts = dict(zip(drawn, prompt_ids(tokenizer, asked, tools), strict=True))
    # Longest first: little padding, and what does not fit into memory fails at once.
    order = sorted(drawn, key=lambda number: (-len(prompts[number]), number))
    parts = [order[start : start + PART_PROMPTS] for start in range(0, len(order), PART_PROMPTS)]
    processes = processes_of(context)
    with processes.main_process_first():
        folder = _parts_folder(config, inputs, context)
    answer: Answer | None = None
    with Graders(context.compute.num_threads) as graders:
        for number in range(processes.process_index, len(parts), processes.num_processes):
            place = folder / f"{number:06d}"
            if fault(place, full=True) is not None:
                answer = answer or _sampler(config, inputs, context, prompts, str(processes.device))
                members = [rows[member] for member in parts[number]]
                _write_part(place, rates(members, answer(parts[number]), graders.grade_all, config.must_stop))
            context.report(min((number + 1) * PART_PROMPTS, len(order)), len(order))
    processes.wait_for_everyone()
    measured = _read_parts(folder, len(parts), rows)
    outputs = PassRatesOutputs(
        pass_rates_of=rows_digest(rows),
        num_measured=len(measured),
        num_samples=config.settings.num_samples,
        counts=pool_counts(rows, measured, config.source_labels),
    )
    if processes.is_main_process:
        parquet.write_table(_table(measured), context.folder / outputs.file, compression="zstd")
    return outputs, _metrics(outputs)


def draw(rows: Sequence[Mapping[str, Any]], num_prompts: int | None, seed: int) -> list[int]:
    """Numbers of the rows to measure, ascending. Which are drawn depends on their ids: more prompts contain fewer."""
    return drawn([str(row["id"]) for row in rows], num_prompts, seed)


def _sampler(
    config: PassRatesConfig,
    inputs: PassRatesInputs,
    context: StageContext,
    prompts: Mapping[int, list[int]],
    device: str,
) -> Answer:
    """The model, loaded, as a function."""
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    model = load_to_write(Path(inputs.model), tokenizer, use_bfloat16(config.precision, context.compute))
    longest, room = max(map(len, prompts.values())), model.config.max_position_embeddings
    if longest + config.max_completion_length > room:
        raise ValueError(
            f"the longest prompt has {longest:,} tokens and an answer up to {config.max_completion_length:,} "
            f"(rlvr.max_completion_length), but the model has {room:,} positions; lower max_completion_length or "
            "max_prompt_length"
        )
    model.to(device)
    engine = TransformersEngine(
        model, pad_id=tokenizer.pad_token_id, batch_size=context.compute.per_device_eval_batch_size
    )
    sampling = Sampling(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        stop_ids=tuple(stop_token_ids(tokenizer)),
        seed=seed_of(config.settings.seed, "samples"),
    )

    def answer(members: Sequence[int]) -> list[list[Completion]]:
        samples = range(config.settings.num_samples)
        requests = [Request(prompts[number], 0, number, sample) for number in members for sample in samples]
        written = iter(engine.generate(requests, sampling))
        return [[_completion(tokenizer, next(written)) for _ in samples] for _ in members]

    return answer


def _completion(tokenizer: PreTrainedTokenizerBase, written: Written) -> Completion:
    ids = written.ids[:-1] if written.stopped else written.ids
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), written.stopped)


def rates(
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sequence[Completion]],
    grade: Callable[[list[tuple[str, str, str]]], Sequence[Verdict]],
    must_stop: bool,
) -> list[dict[str, Any]]:
    """One line for each row: how many of its samples are right, as the run would pay them."""
    jobs = [
        (row["verifier"], sample.text, row["ground_truth"])
        for row, several in zip(rows, samples, strict=True)
        for sample in several
    ]
    verdicts = iter(grade(jobs))
    lines = []
    for row, several in zip(rows, samples, strict=True):
        graded = [(next(verdicts), sample.stopped) for sample in several]
        num_right = sum(one.outcome == "right" and (stopped or not must_stop) for one, stopped in graded)
        num_failed = sum(one.outcome == "could_not_grade" for one, _ in graded)
        lines.append(
            {
                "id": str(row["id"]),
                "num_samples": len(several),
                "num_right": num_right,
                "num_could_not_grade": num_failed,
                "num_stopped": sum(sample.stopped for sample in several),
                "pool": pool_of(num_right, len(several) - num_failed),
            }
        )
    return lines


def pool_of(num_right: int, num_graded: int) -> Pool:
    """By the samples that could be graded."""
    if not num_graded:
        return "ungraded"
    return "never" if not num_right else "always" if num_right == num_graded else "sometimes"


def pool_counts(
    rows: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> tuple[PoolCounts, ...]:
    """Pools of every verifier and source."""
    verifiers = {str(row["id"]): row["verifier"] for row in rows}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in measured:
        groups[verifiers[line["id"]], line["id"].partition(":")[0]].append(line)
    counts = []
    for (verifier, source), lines in sorted(groups.items()):
        pools = Counter(line["pool"] for line in lines)
        passed = [
            line["num_right"] / (line["num_samples"] - line["num_could_not_grade"])
            for line in lines
            if line["pool"] != "ungraded"
        ]
        counts.append(
            PoolCounts(
                verifier=verifier,
                source=source,
                label=labels[int(source)] if source.isdecimal() and int(source) < len(labels) else "",
                num_prompts=len(lines),
                pools={pool: pools[pool] for pool in get_args(Pool)},
                mean_pass_rate=fmean(passed) if passed else None,
            )
        )
    return tuple(counts)


def _metrics(outputs: PassRatesOutputs) -> dict[str, float]:
    shares = {
        f"{pool}_share": sum(group.pools[pool] for group in outputs.counts) / max(outputs.num_measured, 1)
        for pool in get_args(Pool)
    }
    graded = [group for group in outputs.counts if group.mean_pass_rate is not None]
    weights = [group.num_prompts - group.pools["ungraded"] for group in graded]
    total = sum(w * (group.mean_pass_rate or 0.0) for w, group in zip(weights, graded, strict=True))
    return {"pass_rate": total / max(sum(weights), 1), **shares, "num_measured": float(outputs.num_measured)}


def _parts_folder(config: PassRatesConfig, inputs: PassRatesInputs, context: StageContext) -> Path:
    """The folder of the parts. Parts of another model, of other rows, settings or versions are removed."""
    made_from = canonical_json(
        {
            "model": folder_digest(Path(inputs.model)),
            "rows": rows_digest(stored_rows(Path(inputs.dataset))),
            "template": text_digest(inputs.chat_template),
            "config": scientific(config),
            "verifiers": VERIFIERS_VERSION,
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "part_prompts": PART_PROMPTS,
        }
    )
    return made_from_folder(context.work / "parts", made_from)


def _write_part(folder: Path, lines: list[dict[str, Any]]) -> None:
    from pyarrow import parquet

    remove_tree(folder)
    folder.mkdir()
    parquet.write_table(_table(lines), folder / _PART_FILE, compression="zstd")
    mark_complete(folder)


def _read_parts(folder: Path, num_parts: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all parts, in the order of the rows."""
    from pyarrow import parquet

    files = (folder / f"{number:06d}" / _PART_FILE for number in range(num_parts))
    lines = [line for file in files for line in parquet.read_table(file).to_pylist()]
    places = {str(row["id"]): place for place, row in enumerate(rows)}
    return sorted(lines, key=lambda line: places[line["id"]])


def _table(lines: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    names = ("num_samples", "num_right", "num_could_not_grade", "num_stopped")
    types = {"id": pa.string(), **dict.fromkeys(names, pa.int32()), "pool": pa.string()}
    return pa.Table.from_pylist(lines, pa.schema([pa.field(name, of, nullable=False) for name, of in types.items()]))


def _most_flops(config: PassRatesConfig, num_rows: int | None) -> float | None:
    """2 a token that is written; reading the prompts, which is done once for all samples of one, is left out."""
    asked = [count for count in (config.settings.num_prompts, num_rows) if count is not None]
    return 2.0 * min(asked) * config.settings.num_samples * config.max_completion_length if asked else None


pass_rates = Stage(
    "pass_rates", 1, PassRatesConfig, PassRatesInputs, PassRatesOutputs, measure_pass_rates,
    distributed=True, eval_batch=True, most_flops=_most_flops,
)  # fmt: skip
