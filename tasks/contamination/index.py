"""Stage `benchmark_index`: all benchmarks of a recipe, read once and made searchable for every data set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from smoltulu.schemas.contamination import Benchmark, BenchmarkIndexConfig, BenchmarkIndexInputs, BenchmarkIndexOutputs
from smoltulu.tasks.contamination.queries import LoadedBenchmark, Query
from smoltulu.tasks.data.hub import SourceUnavailable
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")


def build_benchmark_index(
    config: BenchmarkIndexConfig, inputs: BenchmarkIndexInputs, context: StageContext
) -> tuple[BenchmarkIndexOutputs, dict[str, float]]:
    """Write `index.json`, `queries.parquet` and the arrays of the index.

    Raises:
        ValueError: a benchmark's file or column is missing, none could be loaded, or n-gram mode without spaCy.
    """
    world = Path(inputs.world) if inputs.world else None
    benchmarks = []
    for number, benchmark in enumerate(config.benchmarks):
        context.report(number, len(config.benchmarks) + 1)
        loaded = load_benchmark(benchmark, world, context.externals.get(f"data.{number}"))
        if loaded.not_checked:
            logger.warning("%s: not checked: %s", loaded.name, loaded.not_checked)
        benchmarks.append(loaded)
    if all(benchmark.not_checked for benchmark in benchmarks):
        why = "\n  ".join(f"{benchmark.name}: {benchmark.not_checked}" for benchmark in benchmarks)
        raise ValueError(
            f"contamination: none of the {len(benchmarks)} benchmarks could be loaded, so nothing can be checked:\n  "
            f"{why}\nMake them available, or leave out the contamination block"
        )
    context.report(len(benchmarks), len(benchmarks) + 1)
    # numba, pyarrow and spaCy: too slow to import for `plan`.
    from smoltulu.tasks.contamination.build import build_index

    outputs = build_index(context.folder, benchmarks, config.mode, config.ngram_size, short_items=config.short_items)
    context.report(len(benchmarks) + 1, len(benchmarks) + 1)
    metrics = {
        "num_instances": float(outputs.num_instances),
        "num_phrases": float(outputs.num_phrases),
        "num_not_checked": float(sum(benchmark.not_checked is not None for benchmark in outputs.benchmarks)),
    }
    return outputs, metrics


def load_benchmark(benchmark: Benchmark, world: Path | None = None, digest: str | None = None) -> LoadedBenchmark:
    """Queries of a benchmark, its prefix taken off the first field.

    A Hub dataset that cannot be loaded (gated, offline) is marked as not checked: its share is unknown, never 0 %.

    Args:
        digest: of a local file, as for `read_rows`.

    Raises:
        ValueError: a local file is missing, broken or has changed, no row has a query field, or a field holds no text.
    """
    try:
        rows = list(read_rows(benchmark.source, world, digest))
    except SourceUnavailable as error:
        return LoadedBenchmark(benchmark.name, [], not_checked=str(error))
    if not rows:
        raise ValueError(f"benchmark {benchmark.name}: {benchmark.source.label} has no rows")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"benchmark {benchmark.name}: {benchmark.source.label} has rows that are not objects")
    columns = set().union(*rows)
    missing = [field for field in benchmark.query_fields if field not in columns]
    if missing:
        raise ValueError(
            f"benchmark {benchmark.name}: {benchmark.source.label} has no column {', '.join(missing)}; query_fields "
            f"may name {', '.join(sorted(map(str, columns)))}"
        )
    queries: list[Query | None] = []
    for index, row in enumerate(rows):
        values = [_query_text(row.get(field)) for field in benchmark.query_fields]
        for field, value in zip(benchmark.query_fields, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"benchmark {benchmark.name}: column {field!r} of row {index} holds a {type(value).__name__}; "
                    "query fields must hold text, or messages with a user turn"
                )
        if any(value is None for value in values):
            queries.append(None)
        else:
            queries.append((values[0].removeprefix(benchmark.strip_prefix), *values[1:]))
    return LoadedBenchmark(benchmark.name, queries)


def _query_text(value: Any) -> Any:
    """The last user turn of a list of messages (held-out rlvr rows); any other value unchanged."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return next((turn.get("content") for turn in reversed(value) if turn.get("role") == "user"), value)
    return value


benchmark_index = Stage(
    name="benchmark_index",
    version=1,
    config=BenchmarkIndexConfig,
    inputs=BenchmarkIndexInputs,
    outputs=BenchmarkIndexOutputs,
    function=build_benchmark_index,
    block="contamination",
)
