"""Metrics in the history and in every tracker: the same steps, each once, also after a resume; nothing sent."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState

import smoltulu.tasks.trainer.tracking
from smoltulu.artifacts.keys import folder_records
from smoltulu.tasks.trainer.tracking import numbers, peak_memory_bytes, require_trackers, trackers
from tests.small_runs import conversations, pairs, run
from tests.tiny_model import build_tiny_model

METRICS = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "num_tokens", "peak_memory_gb"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by name, as (step, value), of one folder of TensorBoard files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_every_metric_is_in_the_history_and_in_tensorboard_once_a_step_after_a_resume_too(
    stage: str, base: Path, tmp_path: Path
) -> None:
    rows = conversations(4) if stage == "sft" else pairs(5)[1:]
    settings = {"max_steps": 4, "effective_batch_size": 2}
    first = run(stage, tmp_path / "first", base, rows, settings)
    resumed = tmp_path / "resumed"
    (resumed / "work").mkdir(parents=True)
    shutil.copytree(tmp_path / "first" / "work", resumed / "work", dirs_exist_ok=True)
    shutil.rmtree(resumed / "work" / "checkpoints" / "checkpoint-4")
    second = run(stage, resumed, base, rows, settings)
    assert (resumed / "work" / "resumed.jsonl").read_text() == "3\n"
    for finished, folder in ((first, tmp_path / "first"), (second, resumed)):
        assert [row["step"] for row in finished.history] == [1, 2, 3, 4]
        assert [METRICS - row.keys() for row in finished.history] == [set()] * 4
        scalars = tensorboard(folder / "out" / "logs" / "tensorboard")
        for name in METRICS:
            steps, values = zip(*scalars[f"train/{name}"], strict=True)
            assert steps == (1, 2, 3, 4)
            assert list(values) == pytest.approx([row[name] for row in finished.history], rel=1e-6)
    tokens = [row["num_tokens"] for row in second.history]
    assert tokens == [row["num_tokens"] for row in first.history] == sorted(tokens) and tokens[0] > 0
    # What was logged before the resume is what the first run saw, speeds too.
    assert second.history[:3] == first.history[:3]


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers(("tensorboard",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to names wandb, .* pip install 'smoltulu\[tracking\]'"):
        require_trackers(("wandb",))


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def log(self, step: int, values: dict[str, float]) -> None:
            raise OSError("no space left")

        def finish(self) -> None: ...

    monkeypatch.setattr(smoltulu.tasks.trainer.tracking, "open_trackers", lambda *arguments: [Full()])
    made = trackers(("tensorboard",), tmp_path, tmp_path)
    made.on_train_begin(None, TrainerState(), None)
    with caplog.at_level(logging.WARNING, "smoltulu"):
        for _ in range(2):
            made.on_log(None, TrainerState(), None, logs={"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == ["Full takes no more metrics: no space left"]


def test_a_training_that_is_made_again_is_another_run_and_a_resumed_one_is_not(tmp_path: Path) -> None:
    first = smoltulu.tasks.trainer.tracking._run_id(tmp_path, "sft-0123")
    assert first.startswith("sft-0123-") and smoltulu.tasks.trainer.tracking._run_id(tmp_path, "sft-0123") == first
    (tmp_path / "run_id").unlink()  # with all of `work`, when the artifact is committed
    assert smoltulu.tasks.trainer.tracking._run_id(tmp_path, "sft-0123") != first


def test_only_numbers_are_tracked() -> None:
    assert numbers({"step": 3, "loss": 0.5, "num_tokens": 7, "text": "so", "none": None}) == {
        "loss": 0.5,
        "num_tokens": 7.0,
    }


def test_peak_memory_on_a_cpu_is_that_of_this_process() -> None:
    script = (
        "from smoltulu.tasks.trainer.tracking import peak_memory_bytes as peak; "
        "before = peak('cpu'); block = b'x' * (300 << 20); "
        "del block; print(before, peak('cpu'))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert before < 200 << 20 and after - before == pytest.approx(300 << 20, rel=0.05)
    assert peak_memory_bytes("cpu") > before


_TRACKED = """
import json, sys
from pathlib import Path
from tests.small_runs import conversations, run
name, folder, model = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
settings = {"max_steps": 3, "effective_batch_size": 2}
run("sft", folder, model, conversations(4), settings, report_to=["tensorboard", name])
"""


def tracked(name: str, folder: Path, base: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """A training of three steps in a process of its own, whose network is closed; its history."""
    import os

    # Whatever connects to anything but this machine fails loudly.
    closed = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HOME": str(folder / "home")}
    (folder / "home").mkdir(parents=True)
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    arguments = [sys.executable, "-c", _TRACKED, name, str(folder), str(base)]
    done = subprocess.run(arguments, env={**variables, **closed, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # All that was written is below the artifact's logs, as plain files.
    assert [path.name for path in (folder / "home").rglob("*") if path.is_file()] == []
    assert any(path.startswith(f"logs/{name}") for path in folder_records(folder / "out"))
    return [json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()]


def test_trackio_keeps_a_local_file(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="pip install 'smoltulu[tracking]'")
    history = tracked("trackio", tmp_path, base, {})
    with sqlite3.connect(tmp_path / "out" / "logs" / "trackio" / "smoltulu.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(row[0], row[1]) for row in rows] == [(rows[0][0], step) for step in (1, 2, 3)]
    for (_, _, metrics), expected in zip(rows, history, strict=True):
        kept = json.loads(metrics)
        assert all(kept[f"train/{name}"] == pytest.approx(expected[name]) for name in METRICS)


@pytest.mark.parametrize(
    "environment",
    [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}],
    ids=["no key is set", "nobody answers"],
)
def test_wandb_is_offline_where(environment: dict[str, str], base: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'smoltulu[tracking]'")
    tracked("wandb", tmp_path, base, environment)
    (run_file,) = (tmp_path / "out" / "logs" / "wandb").glob("offline-run-*/*.wandb")
    text = run_file.read_bytes()
    for name in METRICS:
        assert f"train/{name}".encode() in text
