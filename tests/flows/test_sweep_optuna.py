"""Cells of a sweep to an Optuna study and back, and studies that are none of this sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltulu.flows.sweeping.grid import load_sweep
from smoltulu.flows.sweeping.optuna_study import export_study, import_study
from smoltulu.flows.sweeping.states import states_of, sweep_folder, write_outcome
from smoltulu.schemas.sweep import SweepSettings
from tests.flows.test_sweep import BLOCK, SWEEP, evaluate, record
from tests.hand_store import HandStore

optuna = pytest.importorskip("optuna")

TASKS = [
    {"task": "tiny_arithmetic", "metric": "exact_match,strict-match", "task_class": "reasoning"},
    {
        "task": "tiny_arithmetic",
        "metric": "bits_per_byte,none",
        "task_class": "reasoning",
        "lower_is_better": True,
    },
]


def sweep(**changes: Any) -> SweepSettings:
    return load_sweep(SWEEP | {"tasks": TASKS} | changes)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Cells 0 and 1 have scores, 2 diverged, 3 failed, 4 waits; 5 has scores at another budget."""
    store = HandStore(tmp_path / "store")
    cells = [record(store, number) for number in range(5)] + [record(store, 5, max_tokens=512)]
    folder = sweep_folder(store.root, "small")
    (folder / "outcomes").mkdir(parents=True)
    evaluate(store, 0, [1.0, 0.0])
    evaluate(store, 1, [1.0, 1.0])
    evaluate(store, 5, [0.0, 0.0])
    write_outcome(folder, cells[2], "diverged", "loss is nan")
    write_outcome(folder, cells[3], "failed", "the disk is full")
    file = tmp_path / "study.journal"
    assert export_study(sweep(), store.root, states_of(store.root, folder, cells), file) == 5
    with pytest.raises(ValueError, match="is there already; name a new file"):
        export_study(sweep(), store.root, states_of(store.root, folder, cells), file)
    with pytest.raises(ValueError, match="no cell has ended yet"):
        export_study(sweep(), store.root, states_of(store.root, folder, cells[4:5]), tmp_path / "other")
    with pytest.raises(ValueError, match="is no folder"):
        export_study(sweep(), store.root, states_of(store.root, folder, cells), tmp_path / "no" / "study")
    return file


def opened(file: Path, name: str) -> optuna.study.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def test_a_study_holds_what_the_cells_came_to(journal: Path) -> None:
    for line in journal.read_text().splitlines():
        json.loads(line)  # nothing of it is pickled
    study = opened(journal, "small 2048 base main")
    assert [one.name for one in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["tiny_arithmetic exact_match,strict-match", "tiny_arithmetic bits_per_byte,none"]
    assert study.user_attrs["max_tokens"] == 2048 and study.user_attrs["classes"] == {"tiny_arithmetic": "reasoning"}
    first, second, diverged, failed = study.trials
    assert first.values == [0.5, 1.5] and second.values == [1.0, 1.0]
    assert first.params == {"learning_rate": 2.0**-9, "effective_batch_size": 8}
    assert [one.state.name for one in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert (diverged.user_attrs["state"], diverged.user_attrs["message"]) == ("diverged", "loss is nan")
    assert failed.user_attrs["state"] == "failed" and first.user_attrs["seed"] == 0
    assert len(opened(journal, "small 512 base main").trials) == 1


def test_cells_come_back_as_they_went(journal: Path) -> None:
    before = journal.read_bytes()
    accuracy, bits = import_study(sweep(), journal)
    assert accuracy.cells.log2_lr.tolist() == [-9, -8, -7, -4] and accuracy.cells.log2_batch.tolist() == [3] * 4
    assert accuracy.cells.log2_tokens.tolist() == [11, 11, 11, 9]
    assert accuracy.cells.diverged.tolist() == [False, False, True, False]
    assert accuracy.cells.items[[0, 1, 3], 0].tolist() == [0.5, 1.0, 0.0] and np.isnan(accuracy.means[2])
    assert bits.cells.items[[0, 1], 0].tolist() == [-1.5, -1.0] and bits.means[:2].tolist() == [1.5, 1.0]
    (only, _) = import_study(sweep(), journal, "small 512 base main")
    assert only.cells.log2_lr.tolist() == [-4]
    assert journal.read_bytes() == before, "a look writes nothing"


def made(file: Path, trials: list[dict[str, Any]], **attributes: Any) -> Path:
    """A study of a sampler's."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    wanted = attributes.pop("directions", ["maximize", "minimize"])
    study = optuna.create_study(storage=storage, study_name="mine", directions=wanted)
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    for params in trials:
        spaces = {
            name: optuna.distributions.FloatDistribution(-1, 1e6)
            if isinstance(value, float)
            else optuna.distributions.IntDistribution(-1, 1 << 20)
            for name, value in params.items()
        }
        values = [0.5] * len(wanted)
        study.add_trial(optuna.trial.create_trial(values=values, params=params, distributions=spaces))
    return file


GOOD = {"learning_rate": 1e-3, "effective_batch_size": 8}


def test_a_samplers_trials_are_judged(tmp_path: Path) -> None:
    """Repeats of the same parameters are seeds."""
    file = made(tmp_path / "a", [GOOD, GOOD, GOOD | {"learning_rate": 2e-3}], max_tokens=4096)
    accuracy, _ = import_study(sweep(), file)
    assert accuracy.cells.seed.tolist() == [0, 1, 0] and accuracy.cells.items.shape == (3, 1)
    assert np.allclose(2**accuracy.cells.log2_lr, [1e-3, 1e-3, 2e-3])


@pytest.mark.parametrize(
    ("trials", "attributes", "told"),
    [
        ([GOOD | {"weight_decay": 0.1}], {}, r"has the parameters .*weight_decay.*; a sweep has learning_rate and"),
        ([{"lr": 1e-3, "effective_batch_size": 8}], {}, r"trial 0 has the parameters \['effective_batch_size', 'lr'\]"),
        ([GOOD], {"directions": ["maximize"]}, r"has the directions \['maximize'\]; those of the sweep's tasks"),
        ([GOOD], {"directions": ["minimize", "maximize"]}, r"has the directions \['minimize', 'maximize'\]"),
        ([GOOD], {"max_tokens": None}, "does not say its budget; study.set_user_attr"),
        ([GOOD], {"max_tokens": -5}, "does not say its budget; study.set_user_attr"),
        ([GOOD], {"size": "7b"}, "is of size '7b'; those of small are base"),
        ([GOOD | {"learning_rate": 0.0}], {}, r"learning rate 0.0 and batch 8 must be above 0"),
        ([GOOD | {"effective_batch_size": 0}], {}, r"and batch 0 must be above 0"),
        ([], {}, "no trial of mine is complete; nothing can be judged"),
    ],
)
def test_a_study_of_something_else_is_refused(
    tmp_path: Path, trials: list[dict[str, Any]], attributes: dict[str, Any], told: str
) -> None:
    file = made(tmp_path / "a", trials, **{"max_tokens": 4096} | attributes)
    with pytest.raises(ValueError, match=told):
        import_study(sweep(), file)


@pytest.mark.parametrize(
    "content", [b"\x80\x04\x95", b"{}\n{}\n", b"[1]\n", b'{"op_code": 99}\n', b"not json\nnot json\n", b"\xff\xfe\n\n"]
)
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/a: "):
        import_study(sweep(), tmp_path / "a")
    with pytest.raises(ValueError, match="is no file; name the journal file"):
        import_study(sweep(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_unknown_study_names_those_that_are_there(journal: Path) -> None:
    with pytest.raises(
        ValueError, match="it has no study 'mine'; its studies: small 2048 base main, small 512 base main"
    ):
        import_study(sweep(), journal, "mine")


def test_another_sweeps_metrics_are_refused(journal: Path) -> None:
    other = [TASKS[0], TASKS[1] | {"metric": "perplexity,none"}]
    with pytest.raises(
        ValueError, match=r"has the metrics .*bits_per_byte.*; those of the sweep, in their order, are .*perplexity"
    ):
        import_study(sweep(tasks=other, blocks=[BLOCK]), journal)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("values", [0.5]),
        ("values", [0.5, 0.5, 0.5]),
        ("values", ["a", "b"]),
        ("values", [float("inf"), 0.5]),
        ("params", {"learning_rate": float("inf"), "effective_batch_size": 8}),
        ("params", {"learning_rate": 1e-300, "effective_batch_size": 8}),
        ("user_attrs", {"seed": 10**30}),
        ("user_attrs", {"seed": True}),
        ("user_attr", {"max_tokens": 10**400}),
    ],
)
def test_a_journal_that_somebody_made_up_is_told(journal: Path, field: str, value: Any) -> None:
    """Optuna itself checks none of it."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows:
        if field in row and (field != "user_attr" or "max_tokens" in row[field]) and row.get("state", 1) == 1:
            row[field] = value
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"study\.journal: study 'small .*(numbers|whole number|does not say its budget)"
    ):
        import_study(sweep(), journal)


def test_a_journal_without_an_end_is_none(journal: Path) -> None:
    journal.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="no journal of an Optuna study"):
        import_study(sweep(), journal)


def test_an_export_that_is_cut_off_leaves_no_journal(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    store = HandStore(journal.parent / "store")
    folder = sweep_folder(store.root, "small")
    cells = [record(store, number) for number in range(5)]
    monkeypatch.setattr("smoltulu.flows.sweeping.optuna_study._trials", killed)
    before = sorted(journal.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_study(sweep(), store.root, states_of(store.root, folder, cells), journal.parent / "second")
    assert sorted(journal.parent.iterdir()) == before
