"""The page of a selection: what is kept and dropped, the rows at both ends, what the score goes with, and the heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.selection import SelectionConfig, SelectionInputs, SelectionOutputs
from smoltulu.tasks.data.rows import rows_at, texts_of
from smoltulu.tasks.report.render import render
from smoltulu.tasks.selection.choice import Ranked, groups, ranking
from smoltulu.tasks.selection.figures import correlations, length_bands, overlaps
from smoltulu.tasks.selection.joining import Scored

if TYPE_CHECKING:
    import numpy as np

#: Rows of each end of a source that are shown, and characters of each.
_NUM_ROWS, _NUM_CHARACTERS = 20, 600
#: Sources whose rows are shown.
_MAX_SOURCES = 40


def write_page(
    file: Path,
    config: SelectionConfig,
    inputs: SelectionInputs,
    outputs: SelectionOutputs,
    scored: Scored,
    kept: np.ndarray,
    why: np.ndarray,
    reasons: Sequence[str],
) -> None:
    """Write the page, which loads nothing. why: place in `reasons` of why a row is not kept, (R,)."""
    import numpy as np

    able = np.flatnonzero(~np.isnan(scored.scores))
    rows = Ranked(scored.sources[able], scored.num_tokens[able], scored.scores[able], scored.ties[able])
    labels = {number: source.label for number, source in outputs.by_source.items()}
    columns = {
        "length in tokens": scored.num_tokens.astype(np.float64),
        "perplexity (loss)": scored.loss,
        "repetition": scored.repetition,
    }
    there = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    page = render(
        "selection.html.jinja",
        config=config,
        found=outputs,
        labels=labels,
        amount=config.keep.amount,
        bands=length_bands(scored.num_tokens, kept, scored.scores),
        correlated=list(there),
        correlations=correlations(scored.sources, scored.scores, there),
        overlaps=overlaps(config.keep, rows, kept[able], scored.loss[able], config.labels)
        if config.use == "filter"
        else [],
        ends=_ends(Path(inputs.dataset), config, rows, able, kept, why, reasons, scored),
        heads=_heads(inputs.heads),
    )
    file.write_text(page, encoding="utf-8")


def _ends(
    dataset: Path,
    config: SelectionConfig,
    rows: Ranked,
    able: np.ndarray,
    kept: np.ndarray,
    why: np.ndarray,
    reasons: Sequence[str],
    scored: Scored,
) -> list[tuple[int, list[tuple[str, list[dict[str, Any]]]]]]:
    """Source -> the rows with its highest and its lowest scores."""
    chosen: list[tuple[int, np.ndarray, np.ndarray]] = []
    for source, places in list(groups(rows.domains, "domain"))[:_MAX_SOURCES]:
        assert source is not None
        order = able[places[ranking(rows.scores[places], rows.ties[places], "highest")]]
        half = min(_NUM_ROWS, (len(order) + 1) // 2)
        chosen.append((source, order[:half], order[half:][-_NUM_ROWS:][::-1]))
    wanted = [int(number) for _, *ends in chosen for end in ends for number in end]
    texts = rows_at(dataset, wanted)

    def line(number: int) -> dict[str, Any]:
        whole = "\n".join(f"{role}: {text}" for role, text in texts_of(texts[number]))
        return {
            "id": texts[number]["id"],
            "score": float(scored.scores[number]),
            "num_tokens": int(scored.num_tokens[number]),
            "fate": "kept" if kept[number] else reasons[why[number]],
            "text": whole[:_NUM_CHARACTERS] + (" …" if len(whole) > _NUM_CHARACTERS else ""),
        }

    return [
        (
            source,
            [
                (name, [line(int(number)) for number in end])
                for name, end in (("highest", first), ("lowest", last))
                if len(end)
            ],
        )
        for source, first, last in chosen
    ]


def _heads(file: str | None) -> dict[str, Any] | None:
    """What the heads artifact says (tasks/selection/heads_stage.py), for a drawing and its tables."""
    if file is None:
        return None
    found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    chosen = {(int(layer), int(head)) for layer, head in found["chosen"]}
    control = found["control"]
    return {
        "cells": [
            (layer, head, value, (layer, head) in chosen)
            for layer, values in enumerate(found["scores"])
            for head, value in enumerate(values)
        ],
        "num_layers": len(found["scores"]),
        "num_heads": max(map(len, found["scores"])),
        "num_chosen": len(chosen),
        "model": found["model"],
        "rule": found["rule"],
        "mask": found["mask"],
        "probes": found["probes"],
        "gates": found["gates"],
        "sets": [
            ("none", control["plain"]),
            ("the chosen heads", control["chosen"]),
            *((f"random set {number}", one) for number, one in enumerate(control["random"], 1)),
        ],
    }
