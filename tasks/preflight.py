"""Preflight: the rows of a training stage, tokenised once and checked before anything is trained.

All trainings on the same rows share what it makes: a sweep tokenises nothing again. Rows are cut or dropped here and
nowhere else, so every row that a model does not see as it was written is counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.preflight import LengthReport, PreflightConfig, PreflightInputs, PreflightOutputs
from tasks.disk import adapter_size, cache_bytes, model_size, training_bytes
from tasks.models import check_model_folder, load_tokenizer
from tasks.preflight_rows import Counts, Look, Tokenised, tokenised
from tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")
PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)
_BATCH_ROWS = 512
_HISTOGRAM_BINS = 40
COLUMNS = {
    "conversations": ("input_ids", "labels"),
    "pairs": ("prompt_ids", "prompt_mask", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"),
}


def run_preflight(
    config: PreflightConfig, inputs: PreflightInputs, context: StageContext
) -> tuple[PreflightOutputs, dict[str, float]]:
    """Tokenise, count, try the longest batch, report. ValueError lists every threshold that the rows do not meet."""
    from tasks.dry_run import dry_run
    from tasks.preflight_report import html_report, json_report, problems

    check_model_folder(Path(inputs.model))
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    look = Look.of(tokenizer, Path(inputs.model))
    counts = Counts()
    with _tokenizer_threads(context.compute.num_threads):
        if config.kind == "prompts":
            file = context.folder / "rows.jsonl"
            _write_prompts(config, tokenizer, inputs, file, counts, look, context)
        else:
            file = context.folder / "rows.parquet"
            _write_tokens(config, tokenizer, inputs, file, counts, look, context)
    run, too_large = None, []
    if config.settings.dry_run and counts.num_rows:
        try:
            run = dry_run(config, inputs, file, context)
        except ValueError as error:
            too_large = [str(error)]
    outputs = PreflightOutputs(
        file=file.name,
        **counts.totals(),
        lengths=length_report(counts.lengths),
        tokenizer=look.facts,
        disk_bytes=_disk_bytes(config, inputs, file, context),
        first_rows={name: tuple(rows) for name, rows in counts.examples.items()},
        dry_run=run,
    )
    page = html_report(config, outputs, counts.examples, counts.texts, counts.shown(tokenizer))
    found = problems(config, outputs, counts.examples) + too_large
    # Where it fails, the page is in no artifact: it stays in `work`, which outlives the failure.
    report = (context.work if found else context.folder) / outputs.report_file
    report.parent.mkdir(exist_ok=True)
    report.write_text(page, encoding="utf-8")
    report.with_suffix(".json").write_text(json_report(config, outputs), encoding="utf-8")
    if found:
        raise ValueError("; ".join(found) + f". The whole report: {report}")
    metrics = {
        "num_rows": float(outputs.num_rows),
        "overlong_share": overlong_share(outputs),
        "trained_share": outputs.num_trained_tokens / max(outputs.num_tokens, 1),
        "mean_length": outputs.lengths.mean,
    }
    if outputs.dry_run is not None:
        metrics["dry_run_peak_memory_bytes"] = float(outputs.dry_run.peak_memory_bytes)
    return outputs, metrics


def _disk_bytes(config: PreflightConfig, inputs: PreflightInputs, file: Path, context: StageContext) -> int | None:
    """What the training needs, as it will be asked for before it starts; None where no training is named."""
    if not config.subject:
        return None
    compute, training = context.compute.of(config.subject), config.training
    num_kept = compute.save_total_limit + 1  # and the best
    size, adapter = model_size(Path(inputs.model)), None
    if training is not None:
        num_kept += training.is_extendable and compute.keep_extension_checkpoint
        adapter = adapter_size(size, training.lora_r) if training.lora_r else None
    return training_bytes(size, cache_bytes(file), num_kept, adapter)


def overlong_share(outputs: PreflightOutputs) -> float:
    """Share of the source rows that were longer than max_length, whether cut or dropped."""
    return outputs.num_overlong / max(outputs.num_source_rows, 1)


def length_report(lengths: list[int]) -> LengthReport:
    """Mean, percentiles (nearest rank) and histogram of row lengths in tokens.

    The last bin holds all that is longer: twice the 99th percentile ends the axis, or one row would make it empty.
    """
    ranked = sorted(lengths)

    def percentile(p: int) -> int:
        return ranked[max(-(-len(ranked) * p // 100) - 1, 0)] if ranked else 0

    end = min(percentile(100), 2 * percentile(99))
    width = _round_up(end / _HISTOGRAM_BINS)
    histogram = [0] * (end // width + 1)
    for length in ranked:
        histogram[min(length // width, len(histogram) - 1)] += 1
    return LengthReport(
        mean=sum(ranked) / max(len(ranked), 1),
        percentiles={str(p): percentile(p) for p in PERCENTILES},
        bin_width=width,
        histogram=tuple(histogram),
    )


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10


@contextmanager
def _tokenizer_threads(num_threads: int | None) -> Iterator[None]:
    """Let the tokenizer work on all cores, or on `num_threads`: a stage's process is started with its threads off."""
    names = {"TOKENIZERS_PARALLELISM": "false" if num_threads == 1 else "true"}
    if num_threads is not None:
        names["RAYON_NUM_THREADS"] = str(num_threads)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write_tokens(
    config: PreflightConfig,
    tokenizer: PreTrainedTokenizerBase,
    inputs: PreflightInputs,
    file: Path,
    counts: Counts,
    look: Look,
    context: StageContext,
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = COLUMNS[config.kind]
    # Labels are token ids or -100, masks 0 or 1.
    types = [pa.list_(pa.int8() if name.endswith("_mask") else pa.int32()) for name in names]
    schema = pa.schema([("row", pa.int64()), *zip(names, types, strict=True)])
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in _batches(config, tokenizer, inputs, counts, context):
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            for row in batch:
                fitted = counts.fit(config, look, row)
                if fitted is None:
                    continue
                columns["row"].append(row.number)
                for name in names:
                    columns[name].append(getattr(fitted, name))
            writer.write_table(pa.table(columns, schema))


def _write_prompts(
    config: PreflightConfig,
    tokenizer: PreTrainedTokenizerBase,
    inputs: PreflightInputs,
    file: Path,
    counts: Counts,
    look: Look,
    context: StageContext,
) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for batch in _batches(config, tokenizer, inputs, counts, context):
            for row in batch:
                if counts.fit(config, look, row) is not None:
                    stream.write(json.dumps(row.source, ensure_ascii=False) + "\n")


def _batches(
    config: PreflightConfig,
    tokenizer: PreTrainedTokenizerBase,
    inputs: PreflightInputs,
    counts: Counts,
    context: StageContext,
) -> Iterator[list[Tokenised]]:
    """The rows that the template renders, tokenised, nothing cut."""
    with Path(inputs.dataset).open("rb") as stream:
        num_source_rows = sum(1 for _ in stream)
    rows = _rows(Path(inputs.dataset))
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield tokenised(config, tokenizer, batch, counts)
        context.report(counts.num_source_rows, num_source_rows)


def _rows(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            yield number, json.loads(line)


def _objections(config: PreflightConfig, outputs: PreflightOutputs, metrics: Mapping[str, float]) -> list[str]:
    from tasks.preflight_report import problems

    return problems(config, outputs, {name: list(rows) for name, rows in outputs.first_rows.items()})


preflight = Stage("preflight", 1, PreflightConfig, PreflightInputs, PreflightOutputs, run_preflight, _objections)
