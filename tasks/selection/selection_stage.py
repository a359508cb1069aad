"""Stage `selection`: which rows of a set are trained on, or how much each of them weighs.

It stands behind all checks and finds the score of a row by its content. Texts are never in memory together: a row takes
some 300 bytes: 204 MB at 100,000 rows, 443 MB at 939,343.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.selection import SelectionConfig, SelectionInputs, SelectionOutputs, SourceSelection
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.near_duplicates.results import write_kept
from smoltulu.tasks.selection.choice import Ranked, choose, groups, rank_weights, ranking
from smoltulu.tasks.selection.joining import Scored, join
from smoltulu.tasks.selection.weights_file import part_weights, write_weights
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("smoltulu")

BELOW_CUT, TOO_SHORT, TOO_MANY = "ranked below the cut", "fewer tokens than min_tokens", "more tokens than max_tokens"


def select(
    config: SelectionConfig, inputs: SelectionInputs, context: StageContext
) -> tuple[SelectionOutputs, dict[str, float]]:
    """Write the kept rows, `fates.parquet` (a line a row), a page, and with use: weight `weights.parquet`.

    Raises:
        ValueError: as `joining.join` and `choice.choose`; no row is left; scores that are all the same.
    """
    import numpy as np

    from smoltulu.tasks.selection.page import write_page

    dataset = Path(inputs.dataset)
    num_rows = rows_file.num_rows(dataset)
    if not num_rows:
        raise ValueError(f"selection: {dataset} has no row to select from")
    scored = join(
        dataset, inputs.scores, config.method, config.seed, config.labels,
        lambda number: context.report(number, 2 * num_rows, num_rows=float(number)),
    )  # fmt: skip
    reasons, why = _left_out(config, scored)
    able = np.flatnonzero(why < 0)
    if not len(able):
        said = ", ".join(f"{reason}: {int((why == code).sum()):,}" for code, reason in enumerate(reasons))
        raise ValueError(f"selection: none of {num_rows:,} rows can be kept ({said}); look at the limits of its block")
    _warn_of_ties(config, scored, able)
    rows = Ranked(scored.sources[able], scored.num_tokens[able], scored.scores[able], scored.ties[able])
    kept = np.zeros(num_rows, dtype=bool)
    kept[able] = choose(config.keep, rows, config.labels)
    reasons.append(BELOW_CUT)
    why = np.where(kept | (why >= 0), why, len(reasons) - 1).astype(np.int16)

    outputs = SelectionOutputs(
        kind=config.kind,
        method=config.method,
        use=config.use,
        weights_file="weights.parquet" if config.use == "weight" else None,
        num_rows_read=num_rows,
        num_rows=int(kept.sum()),
        num_kept_tokens=int(scored.num_tokens[kept].sum()),
        by_source=_by_source(config, scored, kept, why, reasons),
    )
    write_kept(dataset, context.folder / outputs.file, np.flatnonzero(~kept))
    ranks = _ranks(config, rows, able, num_rows)
    _write_fates(context.folder / outputs.fates_file, dataset, scored, kept, why, reasons, ranks)
    if outputs.weights_file is not None:
        _write_weights(context.folder / outputs.weights_file, config, inputs, scored, kept)
    context.report(3 * num_rows // 2, 2 * num_rows, num_rows=float(num_rows))
    write_page(context.folder / outputs.page_file, config, inputs, outputs, scored, kept, why, reasons)
    emptied = [f"{number} ({one.label})" for number, one in outputs.by_source.items() if not one.num_kept]
    if emptied:
        logger.warning("selection: no row is kept of source %s", ", ".join(emptied))
    unscored = int((scored.problems >= 0).sum())
    if unscored:
        counts = [f"{reason}: {int((scored.problems == code).sum()):,}" for code, reason in enumerate(scored.reasons)]
        logger.warning(
            "selection: %s of %s rows have no score and are kept out (%s)",
            f"{unscored:,}",
            f"{num_rows:,}",
            ", ".join(counts),
        )
    metrics = {
        "num_rows": float(outputs.num_rows),
        "kept_share": outputs.num_rows / num_rows,
        "num_kept_tokens": float(outputs.num_kept_tokens),
        "num_unscored": float(unscored),
    }
    return outputs, metrics


def _left_out(config: SelectionConfig, scored: Scored) -> tuple[list[str], np.ndarray]:
    """Reasons, and the place there of why a row cannot be kept, (R,); -1: it can."""
    import numpy as np

    reasons, why = list(scored.reasons), scored.problems.copy()
    for reason, are in (
        (TOO_SHORT, scored.num_tokens < config.min_tokens),
        (TOO_MANY, scored.num_tokens > (config.max_tokens or np.iinfo(np.int64).max)),
    ):
        if (are & (why < 0)).any():
            reasons.append(reason)
            why[are & (why < 0)] = len(reasons) - 1
    return reasons, why


def _warn_of_ties(config: SelectionConfig, scored: Scored, able: np.ndarray) -> None:
    """ValueError where a model's scores are all the same: it tells no row from another."""
    values = scored.scores[able]
    if len(able) > 1 and (values == values[0]).all():
        said = f"all {len(able):,} rows score {values[0]:.6g}"
        if config.method in ("attention_influence", "rds_plus", "perplexity"):
            raise ValueError(
                f"selection: {said}, so method {config.method} tells none from another; look at the selector model and "
                "its gates, or take method length or random"
            )
        logger.warning("selection: %s: which are kept is drawn by hash", said)


def _by_source(
    config: SelectionConfig, scored: Scored, kept: np.ndarray, why: np.ndarray, reasons: list[str]
) -> dict[str, SourceSelection]:
    import numpy as np

    found = {}
    for number, places in groups(scored.sources, "domain"):
        assert number is not None
        tokens, mine = scored.num_tokens[places], kept[places]
        counts = np.bincount(why[places][why[places] >= 0], minlength=len(reasons))
        found[str(number)] = SourceSelection(
            label=config.labels[number] if number < len(config.labels) else f"source {number}",
            num_rows=len(places),
            num_tokens=int(tokens.sum()),
            num_kept=int(mine.sum()),
            num_kept_tokens=int(tokens[mine].sum()),
            dropped={reason: int(count) for reason, count in zip(reasons, counts, strict=True) if count},
        )
    return found


def _ranks(config: SelectionConfig, rows: Ranked, able: np.ndarray, num_rows: int) -> np.ndarray:
    """Place of each row in the ranking that it is part of, from 1, (R,); 0: it is in none."""
    import numpy as np

    ranks = np.zeros(num_rows, dtype=np.int64)
    for _, places in groups(rows.domains, config.keep.within):
        order = ranking(rows.scores[places], rows.ties[places], config.keep.order)
        ranks[able[places[order]]] = np.arange(1, len(places) + 1)
    return ranks


def _write_weights(
    file: Path, config: SelectionConfig, inputs: SelectionInputs, scored: Scored, kept: np.ndarray
) -> None:
    import numpy as np

    are = np.flatnonzero(kept)
    rule = (config.keep.within, config.keep.order, config.min_weight, config.max_weight)
    weights = rank_weights(scored.scores[are], scored.sources[are], *rule)
    parts = None
    if config.by != "row":
        files = {int(number): Path(name) for number, name in inputs.scores.items()}
        parts = part_weights(files, scored.sources[are], scored.lines[are], rule)
    write_weights(file, scored.num_tokens[are], weights, parts)


def _write_fates(
    file: Path,
    dataset: Path,
    scored: Scored,
    kept: np.ndarray,
    why: np.ndarray,
    reasons: list[str],
    ranks: np.ndarray,
) -> None:
    """A line a row, in their order: source, score, place in its ranking (0: none), tokens, and why it is not kept."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    texts = np.array([*reasons, ""])  # -1 is the last
    with rows_file.open_rows(dataset) as opened:
        starts = rows_file.group_starts(opened)
        writer: Any = None
        for group, (start, end) in enumerate(pairwise(starts)):
            ids = opened.read_row_group(group, columns=["id"], use_threads=False)["id"].combine_chunks()
            own = slice(start, end)
            scores = scored.scores[own]
            table = pa.table(
                {
                    "row": pa.array(np.arange(start, end)),
                    "id": ids,
                    "source": pa.array(scored.sources[own].astype(np.int32)),
                    "num_tokens": pa.array(scored.num_tokens[own].astype(np.int32)),
                    "score": pa.array(scores, mask=np.isnan(scores)),
                    "rank": pa.array(ranks[own]),
                    "kept": pa.array(kept[own]),
                    "why": pa.array(texts[why[own]].tolist(), pa.string()),
                }
            )
            writer = writer or parquet.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()


def _kept_share(config: SelectionConfig) -> float | None:
    """Of the rows, where the settings say it; a share of tokens is not far from one of rows."""
    return config.keep.share or config.keep.token_share


selection = Stage(
    "selection", 1, SelectionConfig, SelectionInputs, SelectionOutputs, select, block="selector",
    grows_with_model=False, kept_share=_kept_share,
)  # fmt: skip
