"""Stages `mixture` and `held_out_rows`: a set as its recipe wants it, and the rows that are put aside.

Both stand behind all checks: what those removed does not count, and repeats are no duplicates to them. They read one
rows file, so that another share reads no source and checks no row again. Each tells held-out rows from the others by
itself: which they are depends on no share, and so their file, their tokens and a reference's log-probabilities stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.files import remove_tree
from smoltulu.schemas.mixture import HeldOutRowsOutputs, MixtureConfig, MixtureInputs, MixtureOutputs, SourceShare
from smoltulu.tasks.data.rows import GROUP_CHARACTERS, GROUP_ROWS, WRITE_OPTIONS, group_starts, open_rows, stored_rows
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from smoltulu.tasks.data.mixture import Drawn

#: Bytes of rows that are put into their order in memory.
_BUCKET_BYTES = 256 << 20


def mix(config: MixtureConfig, inputs: MixtureInputs, context: StageContext) -> tuple[MixtureOutputs, dict[str, float]]:
    """Write `rows.parquet`. ValueError where the rules ask for more than there is, or leave nothing."""
    import numpy as np

    from smoltulu.tasks.data import held_out, mixture

    source, labels = Path(inputs.dataset), _labels(config)
    sources, numbers, fate = _fates(config, source)
    trained = np.flatnonzero(fate == held_out.TRAINED)
    num_rules = len(config.rules)

    def count(are: np.ndarray) -> list[int]:
        found: list[int] = np.bincount(sources[are], minlength=num_rules).tolist()
        return found

    there = count(trained)
    wanted = mixture.counts(config.rules, there, labels)
    drawn = mixture.draw(config.seed, sources[trained], numbers[trained], wanted)
    drawn = mixture.Drawn(trained[drawn.places], drawn.times)
    outputs = MixtureOutputs(
        kind=config.kind,
        num_rows=sum(wanted),
        num_held_out=int((fate == held_out.HELD_OUT).sum()),
        shares=tuple(
            SourceShare(
                label=label,
                num_given=given,
                num_held_out=aside,
                num_left_out=left_out,
                num_distinct=min(in_set, left),
                num_rows=in_set,
            )
            for label, given, aside, left_out, left, in_set in zip(
                labels,
                count(np.arange(len(sources))),
                count(fate == held_out.HELD_OUT),
                count(fate == held_out.LEFT_OUT),
                there,
                wanted,
                strict=True,
            )
        ),
    )
    _write(source, drawn, context.folder / outputs.file, context)
    metrics = {
        "num_rows": outputs.num_rows,
        "num_repeated": sum(one.num_repeated for one in outputs.shares),
        "num_held_out": outputs.num_held_out,
    }
    return outputs, {name: float(value) for name, value in metrics.items()}


def put_aside(
    config: MixtureConfig, inputs: MixtureInputs, context: StageContext
) -> tuple[HeldOutRowsOutputs, dict[str, float]]:
    """Write the rows that are held out. ValueError where there is none, or none would be left to train on."""
    import numpy as np

    from smoltulu.tasks.data import held_out, mixture

    source = Path(inputs.dataset)
    sources, _, fate = _fates(config, source)
    aside = np.flatnonzero(fate == held_out.HELD_OUT)
    counted = np.bincount(sources[aside], minlength=len(config.rules)).tolist()
    labels = [f"{number}: {label}" for number, label in enumerate(_labels(config))]
    outputs = HeldOutRowsOutputs(
        kind=config.kind, num_rows=len(aside), num_by_source=dict(zip(labels, counted, strict=True))
    )
    drawn = mixture.Drawn(aside, np.ones(len(aside), dtype=int))
    _write(source, drawn, context.folder / outputs.file, context)
    return outputs, {"num_rows": float(len(aside))}


def _labels(config: MixtureConfig) -> tuple[str, ...]:
    return config.labels or tuple(f"source {number}" for number in range(len(config.rules)))


def _fates(config: MixtureConfig, source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every row its source, its number there, and what becomes of it (tasks/data/held_out.py), (R,) each."""
    import numpy as np

    from smoltulu.tasks.data import held_out

    sources, numbers = _ids(source)
    assert not len(sources) or sources.max() < len(config.rules), "rows of a source without a rule"
    if not any(rule.holds_out for rule in config.rules):
        return sources, numbers, np.full(len(sources), held_out.TRAINED)
    texts = held_out.hashes(stored_rows(source))
    return sources, numbers, held_out.split(config.rules, sources, texts, _labels(config))


def _ids(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Source of every row, and its number there, (R,) each. Reads no text."""
    import numpy as np

    parts: list[list[int]] = []
    with open_rows(file) as opened:
        for group in range(opened.metadata.num_row_groups):
            ids = opened.read_row_group(group, columns=["id"], use_threads=False)["id"].to_pylist()
            parts += [[int(part) for part in one.split(":")] for one in ids]
    made = np.array(parts, dtype=np.int64).reshape(-1, 2)
    return made[:, 0], made[:, 1]


def _write(source: Path, drawn: Drawn, file: Path, context: StageContext) -> None:
    """The drawn rows in their order. Memory does not grow with the set: rows go through files, a stretch of it each."""
    from pyarrow import parquet

    with open_rows(source) as opened:
        num_read = max(opened.metadata.num_rows, 1)
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups) * len(drawn.places) / num_read
        num_buckets = max(1, math.ceil(num_bytes / _BUCKET_BYTES))
        length = max(1, math.ceil(len(drawn.places) / num_buckets))
        folder = context.work / "buckets"
        remove_tree(folder)
        folder.mkdir(parents=True)
        files = [folder / f"{number:05d}.parquet" for number in range(num_buckets)]
        writers: list[Any] = [None] * num_buckets
        num_written = 0
        for bucket, table in _pieces(opened, drawn, length):
            writers[bucket] = writers[bucket] or parquet.ParquetWriter(files[bucket], table.schema, compression="lz4")
            writers[bucket].write_table(table)
            num_written += len(table)
            context.report(num_written, 2 * len(drawn.places), num_rows=float(num_written))
        for writer in filter(None, writers):
            writer.close()
        partial = file.with_suffix(".partial")
        with parquet.ParquetWriter(partial, opened.schema_arrow, **WRITE_OPTIONS) as output:
            for one in filter(Path.exists, files):
                rows = parquet.read_table(one, use_threads=False)
                rows = rows.sort_by("position").drop_columns(["position"]).cast(opened.schema_arrow)
                for start in range(0, len(rows), GROUP_ROWS):
                    _write_group(output, rows.slice(start, GROUP_ROWS))
                num_written += len(rows)
                context.report(num_written, 2 * len(drawn.places), num_rows=float(num_written))
    remove_tree(folder)
    partial.rename(file)


def _pieces(opened: Any, drawn: Drawn, length: int) -> Iterator[tuple[int, pa.Table]]:
    """(bucket, rows with their `position` in the set), a row group of the source after the other."""
    import numpy as np
    import pyarrow as pa

    by_place = np.argsort(drawn.places, kind="stable")
    sorted_places = drawn.places[by_place]
    starts = group_starts(opened)
    for group in range(len(starts) - 1):
        first, last = np.searchsorted(sorted_places, [starts[group], starts[group + 1]])
        if first == last:
            continue
        rows = opened.read_row_group(group, use_threads=False)
        positions = by_place[first:last]
        buckets = positions // length
        at_once = max(1, int(GROUP_CHARACTERS / max(rows.nbytes / len(rows), 1)))
        for bucket in np.unique(buckets):
            own = positions[buckets == bucket]
            for start in range(0, len(own), at_once):
                some = own[start : start + at_once]
                table = rows.take(pa.array(drawn.places[some] - starts[group]))
                ids = [
                    one if time == 1 else f"{one}#{time}"
                    for one, time in zip(table["id"].to_pylist(), drawn.times[some].tolist(), strict=True)
                ]
                place = table.schema.get_field_index("id")
                table = table.set_column(place, opened.schema_arrow.field("id"), pa.array(ids, pa.string()))
                yield int(bucket), table.append_column("position", pa.array(some))


def _write_group(output: Any, rows: pa.Table) -> None:
    """As one row group, or as several where texts are long: a reader holds one in memory."""
    if len(rows) > 1 and rows.nbytes > 2 * GROUP_CHARACTERS:
        half = len(rows) // 2
        _write_group(output, rows.slice(0, half))
        _write_group(output, rows.slice(half))
    elif len(rows):
        output.write_table(rows)


mixture = Stage("mixture", 1, MixtureConfig, MixtureInputs, MixtureOutputs, mix, block="data", grows_with_model=False)
held_out_rows = Stage(
    "held_out_rows", 1, MixtureConfig, MixtureInputs, HeldOutRowsOutputs, put_aside, block="data",
    grows_with_model=False,
)  # fmt: skip
