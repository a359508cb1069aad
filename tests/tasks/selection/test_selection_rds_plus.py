"""RDS+: the mean by hand, the nearest target, and targets that cannot be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from smoltulu.tasks.contamination.scan import HITS
from smoltulu.tasks.models.folders import load_language_model, load_tokenizer
from smoltulu.tasks.selection import scores_stage
from smoltulu.tasks.selection.rds_plus import kind_of, pooled
from smoltulu.tasks.selection.rendering import Rendered, Renderer
from smoltulu.tasks.selection.scoring import Batch
from tests.rows_file import write_rows
from tests.small_runs import pairs
from tests.tasks.preflight.test_preflight import prompts
from tests.tasks.selection.scored import conversation, conversations, scored, strong_model
from tests.tiny_model import TULU_TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strong_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_stage, "PART_ROWS", 8)


def _row(num_tokens: int) -> Rendered:
    return Rendered(0, "0:0", "", [1] * num_tokens, [0] * num_tokens, 0, 0.0)


def test_the_mean_by_hand() -> None:
    """Weights 1/3, 2/3 of the first row; what lies behind it is another row, or padding."""
    hidden = torch.tensor([[3.0, 0.0], [0.0, 6.0], [100.0, -100.0], [0.0, -5.0]])
    batch = Batch([_row(2), _row(1)], {}, [0, 3])
    expected = torch.tensor([[1.0, 4.0], [0.0, -1.0]])
    assert torch.allclose(pooled(hidden, batch), torch.nn.functional.normalize(expected, dim=1))


def test_scores_are_the_greatest_cosine(tmp_path: Path, model: Path) -> None:
    rows, targets = conversations(9), conversations(3, seed=4)
    file = write_rows(tmp_path / "targets.parquet", targets)
    lines, _, _ = scored(tmp_path / "packed", model, rows, scorer="rds_plus", targets=file)
    padded, _, _ = scored(tmp_path / "padded", model, rows, scorer="rds_plus", targets=file, compute={"packing": False})
    net = load_language_model(model)
    render = Renderer(load_tokenizer(model, TULU_TEMPLATE), "sft", 200)

    def mean(row: Rendered) -> torch.Tensor:
        with torch.no_grad():
            hidden = net(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1.0, len(row.ids) + 1)
        return (hidden * weights[:, None]).sum(0) / weights.sum()

    wanted = [mean(row) for row in render(enumerate(targets))]
    for line, twin, row in zip(lines, padded, render(enumerate(rows)), strict=True):
        cosines = [torch.cosine_similarity(mean(row), target, dim=0).item() for target in wanted]
        assert line.score == pytest.approx(max(cosines), abs=1e-5)
        assert twin.score == pytest.approx(line.score, abs=1e-6)
        assert line.loss is line.masked_loss is None and not line.parts


def test_the_tokenizer_works_for_one_thread_at_a_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, and it raises "Already borrowed": the targets are rendered before the next rows are."""
    render, inside, most = Renderer.__call__, [0], [0]

    def rendering(self: Renderer, rows: Any) -> list[Rendered]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        made = render(self, rows)
        inside[0] -= 1
        return made

    monkeypatch.setattr(Renderer, "__call__", rendering)
    file = write_rows(tmp_path / "targets.parquet", conversations(3, seed=4))
    scored(tmp_path, model, conversations(20), scorer="rds_plus", targets=file)
    assert most == [1]


def test_a_target_is_the_row_that_is_most_like_it(tmp_path: Path, model: Path) -> None:
    rows = conversations(12)
    for number in (2, 7):
        file = write_rows(tmp_path / "targets.parquet", [rows[number]])
        lines, _, _ = scored(tmp_path / f"{number}", model, rows, scorer="rds_plus", targets=file)
        best = max(lines, key=lambda line: line.score or -1)
        assert best.row == number and best.score == pytest.approx(1, abs=1e-5)


def test_targets_may_be_of_another_kind(tmp_path: Path, model: Path) -> None:
    for kind, rows in (("preference", pairs(2)), ("rlvr", prompts(2)), ("sft", conversations(2))):
        file = write_rows(tmp_path / f"{kind}.parquet", rows)
        assert kind_of(file) == kind
    lines, _, _ = scored(tmp_path, model, conversations(3), scorer="rds_plus", targets=tmp_path / "preference.parquet")
    assert all(line.score is not None for line in lines)
    texts = write_rows(tmp_path / "texts.parquet", [{"id": "0:0", "messages": [], "origins": "{}"}], "texts")
    with pytest.raises(ValueError, match="which are no conversations"):
        kind_of(texts)


def _refused(folder: Path, model: Path, targets: list[dict[str, Any]], said: str, **more: Any) -> None:
    file = write_rows(folder / "targets.parquet", targets, "sft")
    with pytest.raises(ValueError, match=said):
        scored(folder / "scored", model, conversations(3), scorer="rds_plus", targets=file, **more)


def test_targets_that_cannot_be(tmp_path: Path, model: Path) -> None:
    _refused(tmp_path, model, [], "selection.targets has no row")
    long = [conversation(0, "cat"), conversation(1, "cat " * 300), conversation(2, "")]
    _refused(tmp_path, model, long, r"2 of 3 targets cannot be used: 0:1 \(too long\), 0:2 \(empty answer\)")


def test_targets_that_are_in_a_benchmark(tmp_path: Path, model: Path) -> None:
    def hit(row: int, benchmark: str) -> dict[str, Any]:
        return {"row": row, "row_id": f"0:{row}", "turn": 0, "instance": 1, "benchmark": benchmark,
                "benchmark_row": 7, "score": 1.0, "num_terms": 9, "text": "x"}  # fmt: skip

    hits = [hit(0, "gsm8k"), hit(2, "mmlu"), hit(2, "gsm8k")]
    parquet.write_table(pa.Table.from_pylist(hits, HITS), tmp_path / "hits.parquet")
    targets = conversations(4)
    _refused(tmp_path, model, targets, "2 of 4 targets are in a benchmark .*row 0:0: gsm8k; row 0:2: gsm8k, mmlu",
             targets_hits=tmp_path)  # fmt: skip
    parquet.write_table(HITS.empty_table(), tmp_path / "hits.parquet")
    file = write_rows(tmp_path / "targets.parquet", targets)
    lines, _, _ = scored(tmp_path / "clean", model, conversations(3), scorer="rds_plus", targets=file,
                         targets_hits=tmp_path)  # fmt: skip
    assert len(lines) == 3
    _refused(tmp_path, model, targets, "no artifact of the contamination check", targets_hits=tmp_path / "clean")
