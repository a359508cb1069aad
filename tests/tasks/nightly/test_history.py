"""Nights as files: whole or not there, in order, and whatever shape a file has no night ends for it."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltulu.schemas.nightly import MeasuredModel, Told
from smoltulu.tasks.nightly import history as module
from smoltulu.tasks.nightly.history import (
    UNREAD,
    History,
    Row,
    is_compared,
    is_told,
    last_different,
    next_repetition,
    num_missed,
    time_of_night,
    told_models,
)

NODE = "evaluation-sft"


def at(day: int) -> str:
    return f"2026-10-{day:02d}T03:00:00+00:00"


def model(number: int, weights: int | None = None) -> MeasuredModel:
    return MeasuredModel(
        stage="evaluation", key=f"{number:063x}a", generation=f"gen-{number:04d}", digest=f"{number:064x}",
        model_digest=f"{number if weights is None else weights:064x}",
    )  # fmt: skip


def score(day: int, made: MeasuredModel, task: str = "gsm8k", node: str = NODE) -> Row:
    return Row(
        "score", at(day), f"night-{day}", node=node, model=made.model_digest, stage=made.stage, key=made.key,
        generation=made.generation, evaluation=made.digest, task=task, metric="acc", value=0.5, num_items=40,
    )  # fmt: skip


def night(day: int, *rows: Row) -> list[Row]:
    return [Row("night", at(day), f"night-{day}", verdict="well", reason="no real drop", num_items=0), *rows]


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "store", "tiny")


def test_what_is_added_is_read_in_the_order_of_time(history: History) -> None:
    assert history.read() == []
    second, first = night(2, score(2, model(2))), night(1, score(1, model(1)), score(1, model(1), "piqa"))
    file = history.add(second, [model(2)])
    assert file.name == "2026-10-02-night-2.parquet"
    history.add([replace(row, run="another") for row in first], [model(1), model(1)])
    assert history.read() == [*(replace(row, run="another") for row in first), *second] and not history.notes
    told = Told.model_validate_json((history.folder / "told.json").read_text())
    assert told.evaluations == (model(1),)
    assert {path.name for path in history.folder.iterdir()} == {
        "told.json", "2026-10-01-another.parquet", "2026-10-02-night-2.parquet",
    }  # fmt: skip


@pytest.mark.parametrize("content", [
    b"", b"PAR1", b"not at all", "cut", "other columns", "empty",
])  # fmt: skip
def test_a_file_that_is_not_whole_is_named_set_aside_and_skipped(history: History, content: bytes | str) -> None:
    kept = night(1, score(1, model(1)))
    history.add(kept, [])
    bad = history.add(night(2, score(2, model(2))), [])
    if content == "cut":
        bad.write_bytes(bad.read_bytes()[:-20])
    elif isinstance(content, str):
        metadata = {"format": str(module.FORMAT)}
        table = pq.read_table(bad).slice(0, 0) if content == "empty" else pa.table({"kind": ["night"]})
        pq.write_table(table.replace_schema_metadata(metadata), bad)
    else:
        bad.write_bytes(content)
    assert history.read(set_aside=False) == kept and bad.exists()
    assert history.read() == kept
    assert not bad.exists() and (history.folder / f"damaged-{bad.name}").exists()
    assert all(bad.name in note and "\n" not in note for note in history.notes) and len(history.notes) == 2
    assert "set aside as damaged-" in history.notes[1]
    assert history.read() == kept and len(history.notes) == 2  # said once


def test_a_file_of_another_format_stays_where_it_is(history: History) -> None:
    file = history.add(night(1), [])
    pq.write_table(pq.read_table(file).replace_schema_metadata({"format": "2"}), file)
    assert history.read() == [] and file.exists()
    assert "it has format 2; this version reads 1" in history.notes[0]


def test_what_is_no_plain_file_is_never_waited_for(history: History) -> None:
    kept = night(1)
    history.add(kept, [])
    os.mkfifo(history.folder / "2026-10-02-pipe.parquet")
    (history.folder / "2026-10-03-folder.parquet").mkdir()
    assert history.read() == kept and len(history.notes) == 2


def test_a_night_that_is_killed_while_it_writes_is_not_there(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    history.add(night(1), [])

    replace_file = Path.replace

    def killed(source: Path, target: Path) -> Path:
        if target.suffix == ".parquet":
            raise KeyboardInterrupt
        return replace_file(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        history.add(night(2), [])
    monkeypatch.undo()
    assert [row.at for row in history.read()] == [at(1)] and not history.notes
    assert list(history.folder.glob(".*.parquet.*"))
    with history.alone(lambda holder: None):
        assert not list(history.folder.glob(".*.parquet.*"))


def test_of_two_nights_at_once_one_waits_for_the_other(history: History) -> None:
    order, told = [], []
    begun = threading.Event()

    def first() -> None:
        with history.alone(told.append):
            begun.set()
            time.sleep(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with History(history.root, "tiny").alone(told.append):
        order.append("second")
    thread.join()
    assert order == ["first", "second"] and told == [f"process {os.getpid()} on {os.uname().nodename}"]
    with open(history.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it is free


def test_ninety_nights_are_read_in_a_second(history: History) -> None:
    """Seven tasks, five models, two references: more than a night has."""
    rows = [score(1, model(1), f"task-{i}", f"evaluation-{j}") for i in range(7) for j in range(15)]
    for number in range(90):
        stamp = f"2026-{1 + number // 28:02d}-{1 + number % 28:02d}T03:00:00+00:00"
        history.add([replace(row, at=stamp, run=f"n{number}") for row in night(1, *rows)], [])
    best = 10.0
    for _ in range(3):
        began = time.process_time()  # others may use the machine
        assert len(history.read()) == 90 * 106
        best = min(best, time.process_time() - began)
    assert best < 1.0


@pytest.mark.parametrize("name", ["../tiny", "Tiny", "", "a/b"])
def test_a_recipe_of_another_name_leads_nowhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no recipe's name"):
        History(tmp_path, name)


# --- What the nights say --------------------------------------------------------------------------------------------


def test_missed_nights_are_counted_by_day() -> None:
    rows = [*night(3), *night(1)]
    assert [num_missed(rows, date(2026, 10, day)) for day in (3, 4, 5, 8)] == [0, 0, 1, 4]
    assert num_missed([], date(2026, 10, 3)) == 0  # the first
    assert num_missed(rows, date(2026, 9, 1)) == 0  # a clock that was set back


def test_the_last_different_model_is_not_the_last_evaluation() -> None:
    again = model(3, weights=2)  # the same weights, with a task more
    rows = [*night(1, score(1, model(1))), *night(2, score(2, model(2)), score(2, model(2), "piqa")),
            *night(3, score(3, again))]  # fmt: skip
    told = told_models(rows)[NODE]
    assert told == [model(1), model(2), again]
    assert last_different(told, model(2).model_digest) == model(1)
    assert last_different(told, "f" * 64) == again
    assert last_different(told[:1], model(1).model_digest) is None
    # Rolled back to the first: it is compared with what came after it.
    assert last_different(told, model(1).model_digest) == again


def test_a_line_that_does_not_say_what_it_measured_is_no_reference() -> None:
    rows = night(1, replace(score(1, model(1)), generation="../../etc"), score(1, model(2)))
    assert told_models(rows) == {NODE: [model(2)]}


def test_what_was_told() -> None:
    made = score(1, model(2))
    reference = {"reference": model(1).key, "reference_model": model(1).model_digest}
    rows = night(1, made, replace(made, kind="comparison", against="last", **reference))
    told = told_models([*night(1, score(1, model(1))), *rows])[NODE]
    assert is_told(told, model(2)) and not is_told([], model(2))
    assert not is_told(told, model(1))  # it came back
    assert not is_told(told, model(2, weights=3))  # the very same answers, of another model
    again = model(2).model_copy(update={"generation": "gen-0009", "digest": "9" * 64})
    assert is_told(told, again)  # the same weights, measured again
    assert is_compared(rows, NODE, model(2), model(1))
    assert not is_compared(rows, NODE, model(2), model(3))
    assert not is_compared(rows, NODE, model(2), model(1, weights=3))
    unread = [replace(row, reason=f"{UNREAD}: Input/output error") for row in rows]
    assert not is_compared(unread, NODE, model(2), model(1))


def test_a_night_is_after_every_other_whatever_the_clock_says() -> None:
    first = datetime(2026, 10, 1, 3, tzinfo=UTC)
    assert time_of_night([], first) == first
    assert time_of_night(night(1), first + timedelta(days=1, microseconds=5)) == first + timedelta(days=1)
    for now in (first, first - timedelta(days=1)):
        assert time_of_night(night(1), now) == first + timedelta(seconds=1)


def test_tasks_take_turns_one_a_day() -> None:
    candidates = [("evaluation-base", "a"), ("evaluation-base", "b"), (NODE, "a")]
    rows: list[Row] = []
    turns = []
    for day in range(1, 6):
        turn = next_repetition(rows, candidates, date(2026, 10, day))
        assert turn is not None
        turns.append(turn)
        rows += night(day, Row("repeated", at(day), "run", node=turn[0], task=turn[1], verdict="identical"))
        assert next_repetition(rows, candidates, date(2026, 10, day)) is None
    assert turns == [*candidates, *candidates[:2]]
    assert next_repetition(rows, [], date(2026, 10, 9)) is None
