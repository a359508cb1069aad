"""Runs of the stage `selection_scores` on small models, for its tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import folder_digest
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import SelectionScoresConfig, SelectionScoresInputs, SelectionScoresOutputs
from smoltulu.tasks.selection.scores_file import RowScore, stored_scores
from smoltulu.tasks.selection.scores_stage import score_source
from smoltulu.tasks.stage import Report, StageContext
from tests.rows_file import write_rows
from tests.tiny_model import TULU_TEMPLATE

WORDS = ["cat", "dog", "cow", "good", "bad", "one", "two", "three", "apples", "answer", "better"]


def conversation(number: int, answer: str, question: str = "Name three.") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"0:{number}", "messages": turns}


def conversations(num: int, seed: int = 0, most: int = 30) -> list[dict[str, Any]]:
    """Rows of unequal lengths."""
    draw = random.Random(seed)
    return [conversation(i, " ".join(draw.choices(WORDS, k=draw.randint(1, most)))) for i in range(num)]


def write_heads(file: Path, model: Path, chosen: Sequence[tuple[int, int]]) -> Path:
    """What the stage `selection_heads` says of a model, as far as it is read here."""
    file.write_text(json.dumps({"chosen": [list(head) for head in chosen], "model": {"digest": folder_digest(model)}}))
    return file


def scored(
    folder: Path,
    model: Path | None,
    rows: list[dict[str, Any]] | Path,
    *,
    base: Path | None = None,
    heads: Sequence[tuple[int, int]] | Path = ((1, 0),),
    targets: Path | None = None,
    targets_hits: Path | None = None,
    template: str = TULU_TEMPLATE,
    compute: dict[str, Any] | None = None,
    report: Report = lambda *args, **kwargs: None,
    **settings: Any,
) -> tuple[list[RowScore], SelectionScoresOutputs, dict[str, float]]:
    """Lines, outputs and metrics of the stage. `base`: the base model; the selector model where not given."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scorer = settings.get("scorer", "attention_influence")
    defaults: dict[str, Any] = {
        "kind": "sft", "scorer": scorer, "over": "trained", "by": "row", "max_length": 200,
        "mask": "uniform" if scorer == "attention_influence" else None,
    }  # fmt: skip
    dataset = rows if isinstance(rows, Path) else write_rows(folder / "rows.parquet", rows, settings.get("kind", "sft"))
    heads_file = None
    if scorer == "attention_influence":
        assert model is not None
        heads_file = heads if isinstance(heads, Path) else write_heads(folder / "heads.json", model, heads)
    inputs = SelectionScoresInputs(
        model=None if scorer == "counts" else str(model),
        tokenizer=str(base or model),
        dataset=str(dataset),
        heads=None if heads_file is None else str(heads_file),
        targets=None if targets is None else str(targets),
        targets_hits=None if targets_hits is None else str(targets_hits),
        chat_template=template,
    )
    machine = ComputeSettings(**{"device": "cpu", "num_threads": 1} | (compute or {}))
    context = StageContext(folder / "out", folder / "work", machine, report)
    outputs, metrics = score_source(SelectionScoresConfig(**defaults | settings), inputs, context)
    return list(stored_scores(context.folder / outputs.scores_file)), outputs, metrics


def strong_model(folder: Path, num_hidden_layers: int = 3, seed: int = 0) -> Path:
    """A random model whose attention is far from uniform, so that a masked head changes its losses."""
    from safetensors.torch import load_file, save_file

    from tests.tiny_model import build_tiny_model

    build_tiny_model(folder, seed=seed, num_hidden_layers=num_hidden_layers)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "proj" in name or "embed" in name:
            weights[name] = weight * 12
    save_file(weights, file, metadata={"format": "pt"})
    return folder
