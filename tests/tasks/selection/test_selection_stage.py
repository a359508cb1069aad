"""The stage `selection` on small real files: rows find their scores by content, and what comes out of it."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import SCORER, SelectionInputs, SelectionOutputs, SelectionSettings
from smoltulu.tasks.selection.scores_file import PartScore, RowScore, ScoresWriter, row_digest
from smoltulu.tasks.selection.selection_stage import select
from smoltulu.tasks.stage import StageContext
from tests.rich_rows import ASKED, TOOLS
from tests.rows_file import read_rows, write_rows


def sft_row(row_id: str, text: str) -> dict[str, Any]:
    return {"id": row_id, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}


#: Two sources, four rows each: their texts are "0:0" and so on.
ROWS = [sft_row(f"{source}:{number}", f"text {source}:{number}") for source in range(2) for number in range(4)]


def write_scores(
    file: Path, rows: Sequence[dict[str, Any]], method: str = "attention_influence", **columns: Sequence[Any]
) -> str:
    """The scores of rows: 10, 20, ... tokens and scores 0.1, 0.2, ..., unless given."""
    with ScoresWriter(file, SCORER[method]) as writer:  # type: ignore[index]
        for number, row in enumerate(rows):
            values: dict[str, Any] = {
                "num_tokens": 10 * (number + 1), "num_trained_tokens": 1, "num_characters": 50, "repetition": 0.0,
                "score": None if SCORER[method] == "counts" else (number + 1) / 10,  # type: ignore[index]
            }  # fmt: skip
            values |= {name: column[number] for name, column in columns.items()}
            # As the source is read by itself: under other ids.
            writer.write(RowScore(row=number, id=f"0:{number}", digest=row_digest(row), **values))
    return str(file)


def run(
    folder: Path, rows: Sequence[dict[str, Any]], scores: dict[str, str], heads: str | None = None, **settings: Any
) -> tuple[SelectionOutputs, Path, dict[str, float]]:
    dataset = write_rows(folder / "given.parquet", rows, None if rows else "sft", group_rows=3)
    out = folder / f"out{len(list(folder.glob('out*')))}"
    out.mkdir()
    given = {"method": "attention_influence", "keep": {"share": 0.5}} | settings
    config = SelectionSettings.model_validate(given).stage_config("sft", ("first", "second"))
    context = StageContext(out, folder / "work", ComputeSettings(), lambda step, num_steps, **metrics: None)
    made, metrics = select(config, SelectionInputs(dataset=str(dataset), scores=scores, heads=heads), context)
    assert isinstance(made, SelectionOutputs)
    return made, out, metrics


def kept_ids(out: Path) -> list[str]:
    return [row["id"] for row in read_rows(out / "rows.parquet")]


def both(folder: Path, method: str = "attention_influence", **columns: Sequence[Any]) -> dict[str, str]:
    return {
        str(source): write_scores(
            folder / f"{method}{source}.parquet", ROWS[4 * source : 4 * source + 4], method, **columns
        )
        for source in range(2)
    }


def test_selection_keeps_the_best_of_each_source_in_their_order(tmp_path: Path) -> None:
    outputs, out, metrics = run(tmp_path, ROWS, both(tmp_path))
    assert kept_ids(out) == ["0:2", "0:3", "1:2", "1:3"]
    assert read_rows(out / "rows.parquet") == [ROWS[number] for number in (2, 3, 6, 7)]
    assert (outputs.num_rows_read, outputs.num_rows, outputs.num_kept_tokens) == (8, 4, 140)
    assert outputs.by_source["1"].model_dump() == {
        "label": "second", "num_rows": 4, "num_tokens": 100, "num_kept": 2, "num_kept_tokens": 70,
        "dropped": {"ranked below the cut": 2},
    }  # fmt: skip
    fates = parquet.read_table(out / "fates.parquet").to_pylist()
    assert [(one["id"], one["rank"], one["kept"]) for one in fates[:4]] == [
        ("0:0", 4, False), ("0:1", 3, False), ("0:2", 2, True), ("0:3", 1, True),
    ]  # fmt: skip
    assert fates[0] == {
        "row": 0, "id": "0:0", "source": 0, "num_tokens": 10, "score": 0.1, "rank": 4, "kept": False,
        "why": "ranked below the cut",
    }  # fmt: skip
    assert metrics == {"num_rows": 4.0, "kept_share": 0.5, "num_kept_tokens": 140.0, "num_unscored": 0.0}
    assert not (out / "weights.parquet").exists() and outputs.weights_file is None


def test_selection_finds_scores_by_content_whatever_the_mixture(tmp_path: Path) -> None:
    """Rows that checks removed, another order, repeats of a mixture."""
    mixed = [ROWS[6], ROWS[3] | {"id": "0:3#2"}, ROWS[0], ROWS[3], ROWS[7]]
    _, out, _ = run(tmp_path, mixed, both(tmp_path), keep={"share": 0.6, "within": "all"})
    # Scores: 0.3, 0.4, 0.1, 0.4, 0.4; three of five are kept.
    assert kept_ids(out) == ["0:3#2", "0:3", "1:3"]


def test_selection_keeps_rich_rows_as_they_were(tmp_path: Path) -> None:
    asked = {"id": "0:1", "messages": ASKED, "tools": TOOLS}
    rows = [ROWS[0], asked, asked | {"id": "0:2", "tools": [{"name": "other"}]}, ROWS[3]]
    scores = {"0": write_scores(tmp_path / "s.parquet", rows)}
    _, out, _ = run(tmp_path, rows, scores, keep={"share": 1})
    assert read_rows(out / "rows.parquet") == rows
    _, out, _ = run(tmp_path, rows, scores)
    assert read_rows(out / "rows.parquet") == rows[2:]


@pytest.mark.parametrize("kind", ["preference", "rlvr"])
def test_selection_of_pairs_and_prompts(tmp_path: Path, kind: str) -> None:
    def row(number: int) -> dict[str, Any]:
        given: dict[str, Any] = {"id": f"0:{number}", "prompt": [{"role": "user", "content": f"question {number}"}]}
        if kind == "rlvr":
            return given | {"verifier": "gsm8k", "ground_truth": str(number)}
        return given | {side: [{"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")}

    rows = [row(number) for number in range(4)]
    scores = {"0": write_scores(tmp_path / "s.parquet", rows)}
    _, out, _ = run(tmp_path, rows, scores)
    assert read_rows(out / "rows.parquet") == rows[2:]
    assert "user: question 3" in (out / "selection.html").read_text()


def test_length_and_random_read_the_same_counts(tmp_path: Path) -> None:
    scores = both(tmp_path, "length")
    assert kept_ids(run(tmp_path, ROWS, scores, method="length")[1]) == ["0:2", "0:3", "1:2", "1:3"]
    shortest = run(tmp_path, ROWS, scores, method="length", keep={"share": 0.5, "order": "lowest"})
    assert kept_ids(shortest[1]) == ["0:0", "0:1", "1:0", "1:1"]
    drawn = {tuple(kept_ids(run(tmp_path, ROWS, scores, method="random", seed=seed)[1])) for seed in range(6)}
    assert len(drawn) > 1 and all(len(one) == 4 for one in drawn)
    again = run(tmp_path, ROWS[::-1], scores, method="random", seed=0)[1]
    assert sorted(kept_ids(again)) == kept_ids(run(tmp_path, ROWS, scores, method="random", seed=0)[1])


def test_rows_without_a_score_are_told_and_kept_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    problems = ["", "too long", "", "loss is no number"]
    columns = {"problem": problems, "score": [0.1, None, 0.2, None]}
    with caplog.at_level(logging.WARNING):
        outputs, out, metrics = run(tmp_path, ROWS, both(tmp_path, **columns), keep={"share": 1})
    assert kept_ids(out) == ["0:0", "0:2", "1:0", "1:2"] and metrics["num_unscored"] == 4
    assert outputs.by_source["0"].dropped == {"too long": 1, "loss is no number": 1}
    assert "4 of 8 rows have no score and are kept out (too long: 2, loss is no number: 2)" in caplog.text
    fates = parquet.read_table(out / "fates.parquet").to_pylist()
    assert (fates[1]["score"], fates[1]["rank"], fates[1]["why"]) == (None, 0, "too long")


def test_a_source_of_which_nothing_is_kept_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = both(tmp_path)
    scores["1"] = write_scores(tmp_path / "low.parquet", ROWS[4:], score=[-4, -3, -2, -1])
    with caplog.at_level(logging.WARNING):
        _, out, _ = run(tmp_path, ROWS, scores, keep={"threshold": 0.2})
    assert kept_ids(out) == ["0:1", "0:2", "0:3"] and "no row is kept of source 1 (second)" in caplog.text


def test_limits_of_length(tmp_path: Path) -> None:
    outputs, out, _ = run(tmp_path, ROWS, both(tmp_path), keep={"share": 1}, min_tokens=20, max_tokens=30)
    assert kept_ids(out) == ["0:1", "0:2", "1:1", "1:2"]
    assert outputs.by_source["0"].dropped == {"fewer tokens than min_tokens": 1, "more tokens than max_tokens": 1}
    with pytest.raises(ValueError, match=r"none of 8 rows can be kept \(fewer tokens than min_tokens: 8\)"):
        run(tmp_path, ROWS, both(tmp_path), min_tokens=50)


def test_weights_of_rows(tmp_path: Path) -> None:
    outputs, out, _ = run(tmp_path, ROWS, both(tmp_path), use="weight", min_weight=0.0, max_weight=3.0)
    assert kept_ids(out) == [row["id"] for row in ROWS] and outputs.weights_file == "weights.parquet"
    lines = parquet.read_table(out / "weights.parquet").to_pylist()
    assert [(one["row"], one["num_tokens"], one["weight"], one["spans"]) for one in lines[:5]] == [
        (0, 10, 0.0, []), (1, 20, 1.0, []), (2, 30, 2.0, []), (3, 40, 3.0, []), (4, 10, 0.0, []),
    ]  # fmt: skip


def test_weights_of_turns_are_ranks_among_all_turns_of_the_source(tmp_path: Path) -> None:
    def part(turn: int, first: int, score: float | None) -> PartScore:
        return PartScore(turn, 0, first, first + 2, 2, None, None, score)

    parts = [(), (part(0, 2, 0.5), part(1, 6, 0.1)), (part(0, 3, None),), (part(0, 1, 0.3),)]
    scores = {"0": write_scores(tmp_path / "s.parquet", ROWS[:4], parts=parts)}
    # The first row is removed by a check; the rows are in another order.
    _, out, _ = run(tmp_path, [ROWS[3], ROWS[1], ROWS[2]], scores, use="weight", by="turn", min_weight=1, max_weight=2)
    lines = parquet.read_table(out / "weights.parquet").to_pylist()
    assert [one["weight"] for one in lines] == [2.0, 1.0, 1.5]
    assert [[(span["first"], span["last"], span["weight"]) for span in one["spans"]] for one in lines] == [
        [(1, 3, 1.5)], [(2, 4, 2.0), (6, 8, 1.0)], [],
    ]  # fmt: skip


def test_weights_where_no_turn_has_a_score(tmp_path: Path) -> None:
    _, out, _ = run(tmp_path, ROWS, both(tmp_path), use="weight", by="turn")
    assert all(one["spans"] == [] for one in parquet.read_table(out / "weights.parquet").to_pylist())


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([*ROWS[:3], sft_row("0:3", "edited")], {},
         r"1 of 4 rows of source 0 \(first\) are not in its scores .*the first is row 0:3: these are scores of"),
        ([sft_row("2:0", "a")], {}, "has rows of source 2, and there are scores of 0, 1; score each source"),
        ([sft_row("9" * 5000 + ":1", "a")], {}, "does not begin with the number of a source"),
        ([sft_row("row-1", "a")], {}, "row id 'row-1' does not begin with the number of a source"),
        (ROWS, {"method": "perplexity"}, "by attention_influence .* method perplexity needs those of perplexity"),
        (ROWS, {"method": "length"}, "method length needs those of counts"),
        ([], {}, "has no row to select from"),
        (ROWS, {"keep": {"threshold": 7}}, "keeps none of 8 rows: they score 0.1 to 0.4"),
    ],
)  # fmt: skip
def test_selection_of_other_rows_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows, both(tmp_path), **settings)


def test_selection_without_a_whole_scores_file_is_refused(tmp_path: Path) -> None:
    scores = both(tmp_path)
    Path(scores["1"]).write_bytes(Path(scores["1"]).read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        run(tmp_path, ROWS, scores)


def test_scores_that_are_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="all 8 rows score 0, so method attention_influence tells none from another"):
        run(tmp_path, ROWS, both(tmp_path, score=[0.0] * 4))
    with caplog.at_level(logging.WARNING):
        run(tmp_path, ROWS, both(tmp_path, "length", num_tokens=[7] * 4), method="length")
    assert "all 8 rows score 7: which are kept is drawn by hash" in caplog.text


def test_texts_are_never_in_memory_together(tmp_path: Path) -> None:
    """Twice the rows, each of 20,000 characters: memory grows by the columns alone."""

    def peak(num_rows: int) -> int:
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        rows = [sft_row(f"0:{number}", f"{number} " + "x" * 20_000) for number in range(num_rows)]
        columns = {"num_tokens": range(1, num_rows + 1), "score": [one / num_rows for one in range(num_rows)]}
        scores = {"0": write_scores(folder / "s.parquet", rows, **columns)}  # type: ignore[arg-type]
        del rows[100:]
        run(folder, rows, scores)  # imports
        again = [sft_row(f"0:{number}", f"{number} " + "x" * 20_000) for number in range(num_rows)]
        dataset = write_rows(folder / "given.parquet", again, "sft", group_rows=50)
        del again
        out = folder / "measured"
        out.mkdir()
        config = SelectionSettings(method="attention_influence").stage_config("sft", ("first",))
        context = StageContext(out, folder / "work", ComputeSettings(), lambda step, num_steps, **metrics: None)
        tracemalloc.start()
        select(config, SelectionInputs(dataset=str(dataset), scores=scores), context)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(1600) - peak(400) < 1_000_000  # 24 MB of text more


HEADS: dict[str, Any] = {
    "model": {"digest": "0" * 64, "num_layers": 2, "num_heads": 3, "num_parameters": 1234, "planted": True},
    "mask": "uniform", "rule": "threshold", "scores": [[0.0, 0.1, 0.0], [0.9, 0.0, 0.05]], "chosen": [[1, 0], [0, 1]],
    "probes": {"accuracy": 0.95, "num_probes": 20},
    "control": {
        "plain": {"accuracy": 0.95}, "chosen": {"heads": [[1, 0], [0, 1]], "accuracy": 0.1, "correlation": 0.97},
        "random": [{"heads": [[0, 0], [1, 1]], "accuracy": 0.9, "correlation": None}],
    },
    "gates": [{"name": "accuracy", "passed": True, "sentence": "the model does 95 %"},
              {"name": "ties", "passed": False, "sentence": "heads tie at the cut <b>"}],
}  # fmt: skip


def test_the_page_of_a_selection(tmp_path: Path) -> None:
    rows = [sft_row("0:0", "<script>alert(1)</script>" + "y" * 900), *ROWS[1:]]
    scores = {
        str(n): write_scores(tmp_path / f"{n}.parquet", rows[4 * n : 4 * n + 4], loss=[4.0, 3, 2, 1]) for n in (0, 1)
    }
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps(HEADS))
    page = (run(tmp_path, rows, scores, str(heads))[1] / "selection.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "heads tie at the cut &lt;b&gt;" in page and "y" * 500 in page and "y" * 700 not in page
    assert page.count("<rect ") == 6 and "layer 1, head 0: 0.900, masked" in page
    for said in (
        "share 0.5, highest first, ranked within each source", "4 of 8 rows kept, with 140 tokens",
        "ranked below the cut: 2", "random set 1", " of 20 lookups", "lowest perplexity",
        "written into its weights by hand",
    ):  # fmt: skip
        assert said in page, said
    weighed = (run(tmp_path, rows, scores, use="weight")[1] / "selection.html").read_text()
    assert "rows weigh 0.5 to 1.5 by their rank" in weighed and "Jaccard" not in weighed
