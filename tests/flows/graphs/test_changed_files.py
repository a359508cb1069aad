"""Files that change between the key and the reading: no artifact may hold rows that its key does not stand for."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.store import Found, Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.sources import read_rows, source_digest
from tests.tiny_model import build_tiny_model

LOG = logging.getLogger("test")


def write_rows(file: Path, word: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": "yes"}]}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmark(file: Path, word: str) -> None:
    file.write_text("".join(json.dumps({"question": f"{word} number {n} of many?"}) + "\n" for n in range(9)))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    write_rows(tmp_path / "rows.jsonl", "Is it")
    write_benchmark(tmp_path / "benchmark.jsonl", "question")
    build_tiny_model(tmp_path / "base")
    return {
        "name": "changed",
        "base_model": {"path": str(tmp_path / "base")},
        "data": {"sft": {"sources": [{"path": str(tmp_path / "rows.jsonl"), "format": "messages"}]}},
        "contamination": {
            "benchmarks": [
                {
                    "name": "mine",
                    "source": {"path": str(tmp_path / "benchmark.jsonl"), "format": "text"},
                    "query_fields": ["question"],
                }
            ]
        },
        "compute": {"store": str(tmp_path / "store"), "launcher": "inline", "device": "cpu", "min_free_disk_gb": 0},
    }


EDITS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "rows": ("dataset-sft", lambda at: write_rows(at / "rows.jsonl", "Was it"), "rows.jsonl changed"),
    "benchmark": ("benchmark-index", lambda at: write_benchmark(at / "benchmark.jsonl", "query"), "benchmark.jsonl ch"),
    "weights": (
        "base-model",
        lambda at: shutil.copy(build_tiny_model(at / "other", seed=1) / "model.safetensors", at / "base"),
        "its files changed while the run went on",
    ),
    "template": (
        "base-model",
        lambda at: (at / "base" / "chat_template.jinja").write_text("other"),
        "its files changed while the run went on",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_between_plan_and_reading_is_refused_and_nothing_of_it_is_kept(
    tmp_path: Path, recipe: dict[str, Any], what: str
) -> None:
    """The edited rows were cached for ever under the key of the original, and shared."""
    node, edit, message = EDITS[what]
    graph, store = Graph(load_recipe(recipe)), Store(tmp_path / "store")
    original = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    edit(tmp_path)
    with pytest.raises(ValueError, match=message):
        run_graph(graph, store, LOG)
    assert not isinstance(store.find(graph.spec(node)), Found)
    for file, content in original.items():
        file.write_bytes(content)
    for file in (tmp_path / "base").iterdir():
        if file not in original:
            file.unlink()
    assert run_graph(graph, store, LOG)[node].outcome == "Completed"


def test_an_edit_while_rows_are_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, "Is it")
    content = file.read_bytes()
    source = DataSource(path=str(file), format="messages", limit=30)
    rows = read_rows(source, digest=source_digest(source))
    next(rows)
    write_rows(file, "Was it")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl changed while the run went on"):
        list(rows)
    assert len(list(read_rows(source, digest=source_digest(source)))) == 30


def test_a_file_that_joins_a_folder_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", "Is it")
    source = DataSource(path=str(tmp_path), format="messages")
    rows = read_rows(source, digest=source_digest(source))
    next(rows)
    write_rows(tmp_path / "b.jsonl", "Is it")
    with pytest.raises(ValueError, match="changed while the run went on"):
        list(rows)
