"""Pass rates of a real, untrained model: pools, resume bit for bit, draws that nothing else changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import smoltulu.tasks.verifier_audit.pass_rates as stage
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.verifier_audit import PassRatesConfig, PassRatesInputs, PassRatesSettings, PoolCounts
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.evaluation.sampling import Completion
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.verifier_audit.pass_rates import draw, measure_pass_rates, pool_counts, pool_of, rates
from smoltulu.tasks.verifiers import grade_all
from tests.rows_file import write_rows
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

#: A random model writes random bytes: some have a comma, some a digit.
TRUTHS = [
    ("ifeval", json.dumps({"func_name": "validate_no_commas"})), ("format", "number"), ("exact_match", "never said"),
]  # fmt: skip


def prompts(num: int = 11) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{i % 2}:{i}", "prompt": [{"role": "user", "content": "so " * (i % 5) + f"What is {i} plus {i}?"}],
            "verifier": TRUTHS[i % 3][0], "ground_truth": TRUTHS[i % 3][1],
        }
        for i in range(num)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PART_PROMPTS", 4)


def config(**changes: Any) -> PassRatesConfig:
    settings = PassRatesSettings(**{"num_samples": 3, **changes})
    return PassRatesConfig(
        settings=settings, temperature=1.0, max_completion_length=12, must_stop=False, precision="float32",
        source_labels=("a.jsonl",),
    )  # fmt: skip


def measure(folder: Path, model: Path, rows: list[dict[str, Any]], batch: int = 8, **changes: Any) -> Any:
    """Outputs, metrics, and the lines of the file."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    file = write_rows(folder / "rows.parquet", rows)
    compute = ComputeSettings(device="cpu", num_threads=1, per_device_eval_batch_size=batch)
    inputs = PassRatesInputs(model=str(model), dataset=str(file), chat_template=TULU_TEMPLATE)
    context = StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)
    outputs, metrics = measure_pass_rates(config(**changes), inputs, context)
    return outputs, metrics, parquet.read_table(folder / "out" / outputs.file).to_pylist()


def test_pools_by_hand() -> None:
    assert [pool_of(*counts) for counts in ((0, 0), (0, 3), (1, 3), (3, 3))] == [
        "ungraded", "never", "sometimes", "always",
    ]  # fmt: skip
    rows = [
        {"id": "0:0", "verifier": "gsm8k", "ground_truth": "7"},
        {"id": "1:0", "verifier": "gsm8k", "ground_truth": "x"},
    ]
    samples = [[Completion("7", True), Completion("7", False), Completion("8", True)], [Completion("7", True)] * 3]
    lines = rates(rows, samples, grade_all, must_stop=False)
    assert lines == [
        {
            "id": "0:0",
            "num_samples": 3,
            "num_right": 2,
            "num_could_not_grade": 0,
            "num_stopped": 2,
            "pool": "sometimes",
        },
        {"id": "1:0", "num_samples": 3, "num_right": 0, "num_could_not_grade": 3, "num_stopped": 3, "pool": "ungraded"},
    ]
    # Where the run pays an answer that does not end less, it is not right here either.
    assert rates(rows, samples, grade_all, must_stop=True)[0]["num_right"] == 1
    assert pool_counts(rows, lines, ["a"]) == (
        PoolCounts(
            verifier="gsm8k", source="0", label="a", num_prompts=1, mean_pass_rate=2 / 3,
            pools={"never": 0, "sometimes": 1, "always": 0, "ungraded": 0},
        ),
        PoolCounts(
            verifier="gsm8k", source="1", num_prompts=1,
            pools={"never": 0, "sometimes": 0, "always": 0, "ungraded": 1},
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="do not add up"):
        PoolCounts(verifier="gsm8k", source="1", num_prompts=2, pools={"never": 1})


def test_a_real_model_is_measured(tmp_path: Path, model: Path) -> None:
    rows = prompts()
    outputs, metrics, lines = measure(tmp_path, model, rows)
    assert [line["id"] for line in lines] == [row["id"] for row in rows] and outputs.num_measured == 11
    assert all(line["num_samples"] == 3 and line["num_right"] <= 3 for line in lines)
    pools = {line["id"]: line["pool"] for line in lines}
    assert {pools[row["id"]] for row in rows if row["verifier"] == "exact_match"} == {"never"}
    assert len(set(pools.values())) > 1
    assert metrics["never_share"] == sum(pool == "never" for pool in pools.values()) / 11
    assert metrics["pass_rate"] == pytest.approx(sum(line["num_right"] for line in lines) / 33)
    assert sum(group.num_prompts for group in outputs.counts) == 11
    assert {group.label for group in outputs.counts} == {"a.jsonl", ""}


def test_a_killed_stage_goes_on_and_ends_with_the_same_file(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, real = prompts(), stage.rates
    _, _, lines = measure(tmp_path / "whole", model, rows)
    calls: list[int] = []

    def killed(members: Any, *args: Any) -> Any:
        calls.append(len(members))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(members, *args)

    monkeypatch.setattr(stage, "rates", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "broken", model, rows)
    # A damaged part is made again, a whole one is not.
    torn = tmp_path / "broken" / "work" / "parts" / "000000" / "rates.parquet"
    torn.write_bytes(torn.read_bytes()[:-1])
    _, _, again = measure(tmp_path / "broken", model, rows)
    assert again == lines and calls == [4, 4, 3, 4, 3]
    whole, broken = (tmp_path / name / "out" / "pass_rates.parquet" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    # Parts of other settings do not count.
    measure(tmp_path / "broken", model, rows, seed=1)
    assert calls == [4, 4, 3, 4, 3, 4, 4, 3]


def test_what_a_prompt_is_answered_depends_on_no_other(tmp_path: Path, model: Path) -> None:
    rows = prompts()
    _, _, lines = measure(tmp_path / "all", model, rows)
    by_id = {line["id"]: line for line in lines}
    _, _, in_ones = measure(tmp_path / "ones", model, rows, batch=1)
    assert in_ones == lines
    _, _, few = measure(tmp_path / "few", model, rows, num_prompts=5)
    assert len(few) == 5 and all(line == by_id[line["id"]] for line in few)
    _, _, other = measure(tmp_path / "other", model, rows, seed=1)
    assert other != lines


def test_more_prompts_contain_fewer() -> None:
    rows = prompts(50)
    five, twenty = draw(rows, 5, 0), draw(rows, 20, 0)
    assert set(five) < set(twenty) and len(twenty) == 20 and sorted(twenty) == twenty
    assert draw(rows, None, 0) == draw(rows, 99, 0) == list(range(50))
    assert draw(rows, 5, 1) != five
    reversed_ids = {rows[::-1][number]["id"] for number in draw(rows[::-1], 5, 0)}
    assert reversed_ids == {rows[number]["id"] for number in five}


def test_bad_input(tmp_path: Path, model: Path) -> None:
    file = write_rows(tmp_path / "empty.parquet", [], kind="rlvr")
    context = StageContext(tmp_path, tmp_path, ComputeSettings(device="cpu"), lambda *args, **kwargs: None)
    inputs = PassRatesInputs(model=str(model), dataset=str(file), chat_template=TULU_TEMPLATE)
    with pytest.raises(ValueError, match="no RLVR rows to measure"):
        measure_pass_rates(config(), inputs, context)
    long = prompts(1)
    long[0]["prompt"][0]["content"] = "so " * 300
    with pytest.raises(
        ValueError, match=r"an answer up to 12 \(rlvr.max_completion_length\), but the model has 256 pos"
    ):
        measure(tmp_path / "long", model, long)


def test_two_processes_write_the_same_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PART_PROMPTS", 128)  # what a process of its own has
    rows = prompts(140)
    _, _, lines = measure(tmp_path / "one", model, rows)
    compute = ComputeSettings(
        device="cpu", num_threads=1, per_device_eval_batch_size=8, num_processes=2, launcher="warm"
    )
    inputs = PassRatesInputs(
        model=str(model), dataset=str(tmp_path / "one" / "rows.parquet"), chat_template=TULU_TEMPLATE
    )
    spec = Spec(stage="pass_rates", version=1, config=scientific(config()), inputs={}, externals={})
    (tmp_path / "two" / "output").mkdir(parents=True)
    job = Job("pass-rates", STAGES["pass_rates"], config(), compute, spec, inputs)
    run_child(job, tmp_path / "two", tmp_path / "two" / "output", logging.getLogger("test"))
    assert parquet.read_table(tmp_path / "two" / "output" / "pass_rates.parquet").to_pylist() == lines
    parts = [folder.name for folder in (tmp_path / "two" / "parts").iterdir() if folder.is_dir()]
    assert sorted(parts) == ["000000", "000001"]
