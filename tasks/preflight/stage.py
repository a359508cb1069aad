"""Preflight: the rows of a training stage, tokenised once and checked before anything is trained.

All trainings on the same rows share its artifact: a sweep tokenises nothing again. Rows are cut or dropped here and
nowhere else, so every row that a model does not see as it was written is counted. tasks/preflight/parts.py processes
the rows in parts, this module joins them. File and figures do not depend on the division.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType

from smoltulu.schemas.preflight import LengthReport, PreflightConfig, PreflightInputs, PreflightOutputs
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.data.rows import rows_at, stored_rows
from smoltulu.tasks.models.folders import check_model_folder, load_tokenizer
from smoltulu.tasks.models.tokens import TOKENISATION
from smoltulu.tasks.preflight.counts import Counts, load_counts
from smoltulu.tasks.preflight.parts import ROWS_FILE, Maker, Part, cut, make_parts, output_writer, parts_folder
from smoltulu.tasks.preflight.rollout_memory import TooLarge
from smoltulu.tasks.preflight.rows import TokenizerProbe, shown
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.disk import disk_of_training
from smoltulu.tasks.verifiers.kinds import kinds_of

logger = logging.getLogger("smoltulu")
PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)
_HISTOGRAM_BINS = 40
_NUM_REFUSALS = 10


def run_preflight(
    config: PreflightConfig,
    inputs: PreflightInputs,
    context: StageContext,
    stages: Mapping[str, Stage] = MappingProxyType({}),
) -> tuple[PreflightOutputs, dict[str, float]]:
    """Tokenise, count, try the longest batch, report. ValueError lists every threshold that the rows fail.

    stages  by name; where the training of the rows is not among them, there is no dry run and no figure of it
    """
    from smoltulu.tasks.preflight.dry_run import dry_run
    from smoltulu.tasks.preflight.report import html_report, json_report, problems
    from smoltulu.tasks.training.rollout_engine import check_engine

    subject = stages.get(config.subject)
    training = subject and subject.config.model_validate(config.training_settings)
    assert training is None or isinstance(training, TrainingSettings)
    compute = context.compute.of(config.subject, training.effective_batch_size if training else None)
    check_model_folder(Path(inputs.model))
    if isinstance(training, RLVRSettings):  # its turn comes after days of other trainings
        check_engine(training, Path(inputs.model), compute)
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    probe = TokenizerProbe.of(tokenizer, Path(inputs.model))
    folder = parts_folder(config, inputs, context.work)
    maker = Maker(config, tokenizer, probe, Path(inputs.dataset), folder)
    file = context.folder / ROWS_FILE
    counts = _put_together(maker, file, context)
    run, too_large = None, []
    if config.settings.dry_run and counts.num_rows and subject and training:
        try:
            run = dry_run(subject, training, inputs, file, counts.longest, context)
        except ValueError as error:
            if compute.is_sharded and isinstance(error, TooLarge):
                logger.warning(
                    "%s. This was one device alone, and compute.parallel fsdp2 divides the training among %d: nobody "
                    "knows its memory yet", error, compute.num_processes,
                )  # fmt: skip
            else:
                too_large = [str(error)]
    outputs = PreflightOutputs(
        file=file.name,
        **counts.totals(),
        refusals=dict(counts.refusals.most_common(_NUM_REFUSALS)),
        lengths=length_report(counts.lengths),
        kinds=_kinds(file) if config.kind == "prompts" else {},
        tokens_by_source=_tokens_by_source(file, Path(inputs.dataset)),
        tokenizer=probe.facts,
        disk_bytes=training and disk_of_training(training, Path(inputs.model), file, compute),
        first_rows={name: tuple(rows) for name, rows in counts.examples.items()},
        dry_run=run,
    )
    page = html_report(config, outputs, training, counts.texts, [shown(tokenizer, row) for row in counts.first_kept])
    found = problems(config, outputs) + too_large
    # A failed preflight makes no artifact: its report stays in `work`.
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


def overlong_share(outputs: PreflightOutputs) -> float:
    """Share of the source rows that were longer than max_length, whether cut or dropped."""
    return outputs.num_overlong / max(outputs.num_source_rows, 1)


def length_report(lengths: Sequence[int]) -> LengthReport:
    """Mean, percentiles (nearest rank) and histogram of row lengths in tokens.

    The axis ends at twice the 99th percentile, so that one long row does not squeeze it; the last bin holds the rest.
    """
    import numpy as np

    ranked = np.sort(np.asarray(lengths, dtype=np.int64))

    def percentile(p: int) -> int:
        return int(ranked[max(-(-len(ranked) * p // 100) - 1, 0)]) if len(ranked) else 0

    end = min(percentile(100), 2 * percentile(99))
    width = _round_up(end / _HISTOGRAM_BINS)
    bins = np.minimum(ranked // width, end // width)
    return LengthReport(
        mean=int(ranked.sum()) / max(len(ranked), 1),
        percentiles={str(p): percentile(p) for p in PERCENTILES},
        bin_width=width,
        histogram=tuple(np.bincount(bins, minlength=end // width + 1).tolist()),
    )


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    return next(factor * 10**power for power in count() for factor in (1, 2, 5) if factor * 10**power >= value)


def _put_together(maker: Maker, file: Path, context: StageContext) -> Counts:
    """All parts, in order: their rows in `file`, their counts added up. Holds one batch of rows at a time."""
    from pyarrow import parquet

    parts, counts = cut(maker.dataset), Counts()
    num_source_rows = sum(part.num_rows for part in parts)

    with output_writer(maker.config.kind, file, maker.is_rich) as writer:
        writer.add_key_value_metadata({TOKENISATION: maker.probe.facts.tokenisation})

        def take(part: Part) -> None:
            folder = maker.folder_of(part)
            with parquet.ParquetFile(folder / ROWS_FILE) as rows:
                for group in range(rows.num_row_groups):
                    writer.write_table(rows.read_row_group(group, use_threads=False))
            added = load_counts(folder)
            if added.malformed and not counts.malformed:
                logger.warning("%s", added.malformed)
            counts.add(added)
            context.report(counts.num_source_rows, num_source_rows)

        make_parts(maker, parts, context.compute.num_threads, take)

    counts.finish(lambda number: rows_at(maker.dataset, [number])[number])
    return counts


def _kinds(file: Path) -> dict[str, int]:
    """Rows of each verifier, and of each kind of constraint."""
    counted = Counter(kind for row in stored_rows(file) for kind in kinds_of(row["verifier"], row["ground_truth"]))
    return dict(sorted(counted.items()))


def _tokens_by_source(file: Path, dataset: Path) -> dict[str, int]:
    """Tokens of each source, whose number begins a row's id. Of prompts, a single source, and other ids, none."""
    import pyarrow.compute as pc
    from pyarrow import parquet

    times = {"input_ids": 1, "prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    sources = [one.partition(":")[0] for one in parquet.read_table(dataset, columns=["id"])["id"].to_pylist()]
    columns = [name for name in parquet.read_schema(file).names if name in times]
    if not columns or len(set(sources)) < 2 or not all(source.isdecimal() for source in set(sources)):
        return {}
    found: Counter[str] = Counter(dict.fromkeys(sources, 0))
    with parquet.ParquetFile(file) as rows:
        for group in range(rows.num_row_groups):
            table = rows.read_row_group(group, columns=["row", *columns], use_threads=False)
            lengths = [times[name] * pc.list_value_length(table[name]).to_numpy() for name in columns]
            for number, length in zip(table["row"].to_pylist(), sum(lengths).tolist(), strict=True):
                found[sources[number]] += length
    return dict(sorted(found.items(), key=lambda pair: int(pair[0])))


def _gate_failures(config: PreflightConfig, outputs: PreflightOutputs, metrics: Mapping[str, float]) -> list[str]:
    from smoltulu.tasks.preflight.report import problems

    return problems(config, outputs)


def preflight_of(stages: Mapping[str, Stage]) -> Stage:
    """The stage. The dry run takes from `stages`, by name, the training that the rows are for."""
    return Stage(
        "preflight", 2, PreflightConfig, PreflightInputs, PreflightOutputs, partial(run_preflight, stages=stages),
        _gate_failures, block="trainings", keeps_rows=True, grows_with_model=False, has_copies=True,
    )  # fmt: skip
