"""Stage `contamination`: which benchmark instances are in the training rows, and what happens to those rows."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.contamination import (
    Benchmark,
    BenchmarkReport,
    ContaminationInputs,
    ContaminationOutputs,
    ContaminationSettings,
    ContaminationStageConfig,
)
from tasks.contamination_engine import FullMatcher, Hit, Matcher, NgramMatcher, spacy_tokenizer, term_slice
from tasks.data import SourceUnavailable, read_rows
from tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

_SHORT_TERMS = 8  # instances under so many terms are often found by accident
_MATCH_CHARACTERS = 200
_ROWS_PER_REPORT = 1_000

Query = tuple[str, ...]


@dataclass
class LoadedBenchmark:
    """Queries of one benchmark; None where a field is None: the rule leaves such instances out."""

    name: str
    queries: list[Query | None]
    not_checked: str | None = None


@dataclass(frozen=True)
class RowHit:
    """An instance found in a row: in its first turn of the highest score."""

    turn: int
    text: str
    hit: Hit


def check_contamination(
    config: ContaminationStageConfig, inputs: ContaminationInputs, context: StageContext
) -> tuple[ContaminationOutputs, dict[str, float]]:
    """Write `rows.jsonl`, `hits.jsonl` (a line per benchmark, instance and row) and `removed.jsonl`.

    `rows.jsonl` has the lines of the input, byte for byte: without those that hit under the policy `remove`, else all.

    Raises:
        ValueError: a benchmark's file or column is missing, none could be loaded, n-gram mode without spaCy, the
            policy `fail` and a share above `fail_above`, or no row is left. No rows file is there then.
    """
    settings = config.settings
    world = Path(inputs.world) if inputs.world else None
    benchmarks = [load_benchmark(benchmark, world) for benchmark in settings.benchmarks]
    if all(benchmark.not_checked for benchmark in benchmarks):
        why = "\n  ".join(f"{benchmark.name}: {benchmark.not_checked}" for benchmark in benchmarks)
        raise ValueError(
            f"contamination: none of the {len(benchmarks)} benchmarks could be loaded, so nothing can be checked:\n  "
            f"{why}\nMake them available, or leave out the contamination block"
        )
    # Instances of all benchmarks in one list, so that the rows are scanned once.
    places = [
        (number, index)
        for number, benchmark in enumerate(benchmarks)
        for index, query in enumerate(benchmark.queries)
        if query is not None
    ]
    matcher = make_matcher([benchmarks[number].queries[index] for number, index in places], settings)  # type: ignore[misc]

    source = Path(inputs.dataset)
    num_rows_read = _num_lines(source)
    if num_rows_read == 0:
        raise ValueError(f"contamination: {source} has no row to check")
    names = ContaminationOutputs.model_fields
    rows_path, hits_path, removed_path = (
        context.folder / names[name].default for name in ("file", "hits_file", "removed_file")
    )
    partial = rows_path.with_suffix(".partial")  # renamed when the outcome is accepted
    contaminated: set[int] = set()
    num_rows_contaminated = num_removed = 0
    started = time.monotonic()
    with (
        source.open("rb") as rows,
        partial.open("wb") as kept,
        hits_path.open("w", encoding="utf-8") as hits_file,
        removed_path.open("w", encoding="utf-8") as removed_file,
    ):
        for num_done, line in enumerate((line for line in rows if line.strip()), 1):
            row = json.loads(line)
            found = row_hits(row, matcher)
            reasons: dict[str, list[int]] = {}
            for instance, row_hit in sorted(found.items()):
                number, index = places[instance]
                if matcher.num_terms[instance] >= settings.min_terms:
                    reasons.setdefault(benchmarks[number].name, []).append(index)
                _write_line(hits_file, _hit_record(benchmarks[number].name, index, row["id"], row_hit, matcher))
            contaminated.update(found)
            num_rows_contaminated += bool(found)
            if reasons and settings.policy == "remove":
                num_removed += 1
                _write_line(removed_file, {"id": row["id"], "reasons": reasons})
            else:
                kept.write(line)
            if num_done % _ROWS_PER_REPORT == 0 or num_done == num_rows_read:
                context.report(
                    num_done,
                    num_rows_read,
                    rows_per_second=num_done / max(time.monotonic() - started, 1e-9),
                    num_rows_contaminated=float(num_rows_contaminated),
                )

    reports = tuple(_reports(benchmarks, places, contaminated, matcher))
    counting = {instance for instance in contaminated if matcher.num_terms[instance] >= settings.min_terms}
    try:
        if settings.policy == "fail":
            _accept_shares(tuple(_reports(benchmarks, places, counting, matcher)), settings.fail_above)
        if num_removed == num_rows_read:
            raise ValueError(f"contamination: all {num_rows_read} training rows hit a benchmark, so none is left")
    except ValueError as error:
        partial.unlink()
        # The folder of a failed stage is not kept, its work folder is: the user has to see what was found.
        shutil.copy(hits_path, context.work / hits_path.name)
        raise ValueError(f"{error}. What was found: {context.work / hits_path.name}") from error
    partial.rename(rows_path)
    for report in reports:
        if report.not_checked:
            logger.warning("%s: not checked: %s", report.name, report.not_checked)
        elif report.share is not None and report.share > settings.fail_above:
            logger.warning(
                "%s: %s of its %s instances (%.2f %%) are in these training rows",
                report.name,
                f"{report.num_contaminated:,}",
                f"{report.num_instances:,}",
                100 * report.share,
            )

    outputs = ContaminationOutputs(
        kind=config.kind,
        num_rows_read=num_rows_read,
        num_rows=num_rows_read - num_removed,
        num_removed=num_removed,
        num_rows_contaminated=num_rows_contaminated,
        benchmarks=reports,
    )
    metrics = {
        "num_rows": float(outputs.num_rows),
        "num_removed": float(num_removed),
        "num_rows_contaminated": float(num_rows_contaminated),
        **{f"contaminated_share/{report.name}": report.share for report in reports if report.share is not None},
    }
    return outputs, metrics


def load_benchmark(benchmark: Benchmark, world: Path | None = None) -> LoadedBenchmark:
    """Queries of a benchmark, its prefix taken off the first field.

    A Hub dataset that cannot be had (gated, offline) is marked as not checked: its share is unknown, never 0 %.

    Raises:
        ValueError: a local file is missing or broken, no row has a query field, or a field holds no text.
    """
    try:
        rows = list(read_rows(benchmark.source, world))
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
    """A list of messages stands for its last user turn (held-out rlvr rows); all else is left as it is."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return next((turn.get("content") for turn in reversed(value) if turn.get("role") == "user"), value)
    return value


def make_matcher(queries: list[Query], settings: ContaminationSettings) -> Matcher:
    """The engine of the mode asked for. Raises ValueError for n-gram mode without spaCy."""
    if settings.mode == "full":
        return FullMatcher(queries)
    return NgramMatcher(queries, spacy_tokenizer(), settings.ngram_size, settings.match_threshold)


def user_turns(row: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(index of the message, text) of every user turn: of `messages`, or of `prompt` and then of both completions.

    Completions hold a user turn only where chosen and rejected part before their last turn.
    """
    messages = [message for name in ("messages", "prompt", "chosen", "rejected") for message in row.get(name, ())]
    for index, message in enumerate(messages):
        if message["role"] == "user":
            yield index, message["content"]


def row_hits(row: dict[str, Any], matcher: Matcher) -> dict[int, RowHit]:
    """Instance -> its best hit in the row; no match crosses turns, assistant text is never looked at."""
    found: dict[int, RowHit] = {}
    for turn, text in user_turns(row):
        for hit in matcher.hits(text):
            if hit.instance not in found or hit.score > found[hit.instance].hit.score:
                found[hit.instance] = RowHit(turn, text, hit)
    return found


def _hit_record(benchmark: str, index: int, row_id: str, found: RowHit, matcher: Matcher) -> dict[str, Any]:
    text = term_slice(found.text, found.hit.start, found.hit.end)
    return {
        "benchmark": benchmark,
        "instance": index,
        "row": row_id,
        "turn": found.turn,
        "score": found.hit.score,
        "num_terms": matcher.num_terms[found.hit.instance],
        "text": text if len(text) <= _MATCH_CHARACTERS else text[: _MATCH_CHARACTERS - 1] + "…",
    }


def _reports(
    benchmarks: list[LoadedBenchmark], places: list[tuple[int, int]], contaminated: set[int], matcher: Matcher
) -> Iterator[BenchmarkReport]:
    for number, benchmark in enumerate(benchmarks):
        instances = [instance for instance, place in enumerate(places) if place[0] == number]
        found = [instance for instance in instances if instance in contaminated]
        yield BenchmarkReport(
            name=benchmark.name,
            num_instances=len(instances),
            num_skipped=len(benchmark.queries) - len(instances),
            num_contaminated=len(found),
            num_unmatchable=sum(matcher.unmatchable[instance] for instance in instances),
            num_short_hits=sum(matcher.num_terms[instance] < _SHORT_TERMS for instance in found),
            not_checked=benchmark.not_checked,
        )


def _accept_shares(reports: tuple[BenchmarkReport, ...], fail_above: float) -> None:
    above = [report for report in reports if report.share is not None and report.share > fail_above]
    if above:
        found = "; ".join(
            f"{report.name}: {report.num_contaminated} of {report.num_instances} instances ({report.share:.2%})"
            for report in above
        )
        raise ValueError(f"contamination: the training data holds more than {fail_above:.2%} (fail_above) of {found}")


def _num_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(bool(line.strip()) for line in stream)


def _write_line(stream: Any, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record, ensure_ascii=False) + "\n")


contamination = Stage(
    name="contamination",
    version=1,
    config=ContaminationStageConfig,
    inputs=ContaminationInputs,
    outputs=ContaminationOutputs,
    function=check_contamination,
)
