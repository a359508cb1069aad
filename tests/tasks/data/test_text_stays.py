"""A ground truth reaches the reward function as the text that was written, whatever it looks like."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
from smoltulu.schemas.preflight import PreflightConfig, PreflightInputs, PreflightSettings
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.data.stage import build_dataset
from smoltulu.tasks.preflight.stage import run_preflight
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.grpo import build
from tests import ROOT
from tests.hub_double import HubDouble
from tests.tasks.training.test_grpo import SETTINGS
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

#: Each is a date, a number, nothing or a truth value to a reader that guesses.
TRUTHS = [
    "2024-05-01",
    "007",
    "1e5",
    "NaN",
    "true",
    "null",
    "1_000",
    "2024-05-01T10:00:00Z",
    "0.50",
    "None",
    "-0",
    "inf",
]


def context(folder: Path) -> StageContext:
    for name in ("out", "work/checkpoints"):
        (folder / name).mkdir(parents=True)
    compute = ComputeSettings(device="cpu", per_device_train_batch_size=4, num_threads=1)
    return StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)


def rows_of(truths: list[Any]) -> list[dict[str, Any]]:
    return [{"question": f"What is {place}?", "answer": truth} for place, truth in enumerate(truths)]


def separated(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = {
        ".jsonl": lines, ".lines": lines, ".json": json.dumps(rows), ".csv": separated(rows),
        ".tsv": separated(rows, "\t"),
    }[Path(file.name.removesuffix(".gz")).suffix].encode()  # fmt: skip
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def dataset_of(folder: Path, source: DataSource) -> Path:
    """The rows file that the stage makes."""
    config = DatasetStageConfig(kind="rlvr", data=DataSet(sources=(source,), max_malformed_share=0.5))
    outputs, _ = build_dataset(config, DatasetInputs(), where := context(folder))
    return where.folder / outputs.file


def truths_of(file: Path) -> list[str]:
    return [row["ground_truth"] for row in stored_rows(file)]


def source(**place: Any) -> DataSource:
    fields = {"prompt": "question", "ground_truth": "answer"}
    return DataSource(format="rlvr", fields=fields, verifier="math", **place)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("truths", [TRUTHS, TRUTHS[:1] * 3, TRUTHS[1:2] * 3], ids=["mixed", "dates", "numbers"])
def test_of_local_files(tmp_path: Path, name: str, truths: list[str]) -> None:
    file = write(tmp_path / name, rows_of(truths))
    assert truths_of(dataset_of(tmp_path / "made", source(path=str(file)))) == truths


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.json", "train.csv", "train.tsv", "train.jsonl.gz", "train.parquet"]
)
@pytest.mark.parametrize("truths", [TRUTHS, TRUTHS[:1] * 3, TRUTHS[1:2] * 3], ids=["mixed", "dates", "numbers"])
def test_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, truths: list[str]) -> None:
    """A repository's layout on disk, which `datasets` reads as it reads one of the Hub; it guesses types by itself."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "repository" / name, rows_of(truths))
    of_hub = source(repository=str(tmp_path / "repository"), revision="f" * 40)
    assert truths_of(dataset_of(tmp_path / "made", of_hub)) == truths


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "split", ["train[:3]", "train[2:]", "train[-2:]", "train[25%:75%]", "train+test", "test[1:]+train[:1]", "all"]
)
def test_of_a_part_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, split: str) -> None:
    """Against `datasets`, which slices rows whose text it cannot mistake."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dates = [f"2024-05-{day:02d}" for day in range(1, 9)]
    for kind, prefix in (("repository", ""), ("safe", "text ")):
        write(tmp_path / kind / f"train{suffix}", rows_of([prefix + date for date in dates]))
        write(tmp_path / kind / f"test{suffix}", rows_of([prefix + truth for truth in ("007", "1e5", "2024-06-01")]))
    expected = datasets.load_dataset(str(tmp_path / "safe"), split=split)["answer"]
    of_hub = source(repository=str(tmp_path / "repository"), revision="f" * 40, split=split)
    assert truths_of(dataset_of(tmp_path / "made", of_hub)) == [text.removeprefix("text ") for text in expected]


@pytest.mark.parametrize("split", ["valid", "train[:3", "train[a:b]", "valid[:3]", "train+valid", ""])
def test_a_split_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "repository" / "train.jsonl", rows_of(TRUTHS))
    of_hub = source(repository=str(tmp_path / "repository"), revision="f" * 40, split=split)
    with pytest.raises(ValueError, match="Give a `subset` and a `split` that the dataset has"):
        dataset_of(tmp_path / "made", of_hub)


def test_lines_on_the_hub_that_are_called_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = write(tmp_path / "repository" / "train.lines", rows_of(TRUTHS))
    lines.rename(lines.with_suffix(".json"))
    of_hub = source(repository=str(tmp_path / "repository"), revision="f" * 40, limit=5)
    assert truths_of(dataset_of(tmp_path / "made", of_hub)) == TRUTHS[:5]


def test_numbers_of_json_become_the_text_that_they_were_written_as(tmp_path: Path) -> None:
    written = ["7", "1e5", "0.50", "-0.0", "12345678901234567890123", "0.1234567890123456789", "true", "1E+2"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"question": "What is {i}?", "answer": {text}}}\n' for i, text in enumerate(written)))
    assert truths_of(dataset_of(tmp_path / "made", source(path=str(file)))) == written


def test_as_the_reward_function_sees_them(tmp_path: Path) -> None:
    """Through the dataset stage, the preflight, the training's rows and TRL's trainer."""
    model = build_tiny_model(tmp_path / "model")
    file = write(tmp_path / "a.jsonl", rows_of(TRUTHS))
    rows = dataset_of(tmp_path / "made", source(path=str(file)))
    checks = PreflightSettings(dry_run=False)
    config = PreflightConfig(kind="prompts", max_length=100, overlong="drop", settings=checks)
    outputs, _ = run_preflight(
        config, PreflightInputs(model=str(model), dataset=str(rows), chat_template=TULU_TEMPLATE),
        flown := context(tmp_path / "preflight"),
    )  # fmt: skip
    kept = flown.folder / outputs.file
    assert truths_of(kept) == TRUTHS
    settings = RLVRSettings.model_validate(
        SETTINGS | {"effective_batch_size": 4 * len(TRUTHS), "max_rollouts_without_signal": 0}
    )
    inputs = TrainingInputs(model=str(model), dataset=str(kept), chat_template=TULU_TEMPLATE)
    trainer = build(settings, inputs, context(tmp_path / "training"))
    seen: dict[str, str] = {}

    def reward(prompts: Any, ground_truth: list[str], **columns: Any) -> Any:
        seen.update((prompt[0]["content"], truth) for prompt, truth in zip(prompts, ground_truth, strict=True))
        return trainer.reward(prompts=prompts, ground_truth=ground_truth, **columns)

    trainer.reward_funcs[0] = reward
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert seen == {f"What is {place}?": truth for place, truth in enumerate(TRUTHS)}


_READ = """
import sys
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.sources import read_rows
print([row["answer"] for row in read_rows(DataSource(repository="me/data", revision=sys.argv[1], format="text"))])
"""


def test_over_the_network_and_again_without(tmp_path: Path) -> None:
    """A pinned data set that was read once is read again without a network, as before."""
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(TRUTHS[:1] * 3)).encode()
    with HubDouble() as hub:
        commit = hub.add("dataset", "me/data", {"train.jsonl": lines})
        place = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path)}
        for offline in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", _READ, commit], cwd=ROOT, capture_output=True, text=True, check=False,
                env=os.environ | place | {"HF_HUB_OFFLINE": offline},
            )  # fmt: skip
            assert done.stdout.strip() == str(TRUTHS[:1] * 3), done.stderr
