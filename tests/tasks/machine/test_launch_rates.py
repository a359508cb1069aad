"""What a machine does in a second: what is measured, the arithmetic by hand, and what a plan makes of it (launch)."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoltulu.artifacts.store import Store
from smoltulu.flows.cli.rates import lines
from smoltulu.flows.machine import rates as kept
from smoltulu.flows.machine.rates import measure, rates_of
from smoltulu.flows.planning.plan import Plan, plan
from smoltulu.flows.planning.rate_costs import decode_seconds, rollout_seconds, train_seconds
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.machine import DecodeRate, MachineRates, TrainRate
from smoltulu.schemas.rlvr import GRPOSettings

H100 = MachineRates(
    device="cuda", name="a card", num_devices=8, memory_bytes=80 * 10**9, num_threads=1, host="h", torch="2.13.0",
    measured_at="2026-11-28T00:00:00+00:00", seconds=1.0,
    train=TrainRate(
        flops_per_second=4e14, precision="bfloat16", hidden_size=2048, num_parameters=10**8, num_tokens=8192
    ),
    decode=DecodeRate(seconds_per_parameter=2e-12, num_rows=16, num_parameters=10**8),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_training_seconds_by_hand() -> None:
    # 6 FLOPs x 1.7e9 parameters x 1e9 tokens at 4e14 a second: 25,500 s on one, an eighth of it on eight.
    assert train_seconds(6 * 1.7e9 * 1e9, H100, 1) == pytest.approx(25_500)
    assert train_seconds(6 * 1.7e9 * 1e9, H100, 8) == pytest.approx(3_187.5)
    assert train_seconds(1.0, H100.model_copy(update={"train": None}), 1) is None


@pytest.mark.parametrize(
    ("num_rows", "seconds"),
    [
        (1, 3.4),  # 1,000 steps of 1.7e9 x 2e-12 s: the weights are read once for all rows
        (16, 3.4),
        (400, 3.4),  # 2 x 1.7e9 x 400 / 4e14 = 3.4e-3 s a step: both alike
        (4_000, 34.0),  # the arithmetic counts
    ],
)
def test_decoding_seconds_by_hand(num_rows: int, seconds: float) -> None:
    assert decode_seconds(1_000, num_rows, 1_700_000_000, H100) == pytest.approx(seconds)


def test_decoding_that_nobody_measured_is_not_known() -> None:
    assert decode_seconds(1_000, 4, 10**9, H100.model_copy(update={"decode": None})) is None
    assert decode_seconds(1_000, 400, 10**9, H100.model_copy(update={"train": None})) is None


def test_rollouts_by_hand() -> None:
    settings = GRPOSettings.model_validate({
        "learning_rate": 1e-6, "effective_batch_size": 32, "num_steps": 10, "num_generations": 8,
        "max_prompt_length": 64, "max_completion_length": 100, "steps_per_generation": 2,
    })  # fmt: skip
    # 10 steps, two of which share a batch of 64 rollouts: five batches of 100 steps of 1e9 x 2e-12 s.
    assert rollout_seconds(settings, 10, 10**9, H100, 1) == pytest.approx(5 * 100 * 2e-3)
    assert rollout_seconds(settings, 9, 10**9, H100, 1) == pytest.approx(5 * 100 * 2e-3), "the last batch is whole"


# --------------------------------------------------------------------------------------------------------------- kept


def test_every_rate_has_a_line() -> None:
    whole = H100.model_copy(update={
        "copy_bytes_per_second": 1e12, "host_copy_bytes_per_second": 1e10,
        "matmul_flops_per_second": {"bfloat16": 6e14},
        "attention_flops_per_second": 3e14, "disk_write_bytes_per_second": 1e9, "disk_read_bytes_per_second": 2e9,
        "small_file_seconds": 0.001,
    })  # fmt: skip
    assert {name: value for name, value, _ in lines(whole)} == {
        "memory": "1 TB/s", "host to device": "10 GB/s", "matrix product": "600 TFLOP/s", "attention": "300 TFLOP/s",
        "training": "400 TFLOP/s", "decoding": "80,000 tokens/s", "disk, written": "1 GB/s", "disk, read": "2 GB/s",
        "small file": "1.00 ms",
    }  # fmt: skip
    assert [name for name, _, _ in lines(H100)] == ["training", "decoding"]


def test_rates_are_kept_by_device_and_found_again(tmp_path: Path) -> None:
    rates = measure(tmp_path / "home", tmp_path / "store", seconds=1.0, device="cpu")
    assert rates.name and rates_of(tmp_path / "home", "cpu") == rates == rates_of(tmp_path / "home", "auto")
    assert rates_of(tmp_path / "home", "cuda") is None and rates_of(tmp_path / "nowhere", "auto") is None
    folder = tmp_path / "home" / "rates"
    (folder / "cuda-a.json").write_text(H100.model_dump_json())
    (folder / "cuda-b.json").write_text(
        H100.model_copy(update={"name": "newer", "measured_at": "2027-01-01T00:00:00+00:00"}).model_dump_json()
    )
    (folder / "cuda-damaged.json").write_text('{"device": "cuda"')
    newest = rates_of(tmp_path / "home", "auto")
    assert newest is not None and newest.name == "newer"


def test_a_measurement_that_ends_without_a_result_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nothing was measured \(status 2\): .*invalid choice"):
        measure(tmp_path, tmp_path, seconds=1.0, device="tpu")
    monkeypatch.setattr(kept, "_MORE_SECONDS", 0.01)
    with pytest.raises(ValueError, match="the process hung"):
        measure(tmp_path, tmp_path, seconds=0.01)


# --------------------------------------------------------------------------------------------------------------- plan


def planned(tmp_path: Path, rates: MachineRates | None, **overrides: object) -> Plan:
    changes = {"base_model.num_parameters": 1_700_000_000, **overrides}
    return plan(load_recipe("smoltulu-1130", changes), None, [], Store(tmp_path), rates=rates)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_plan_takes_hours_and_memory_from_the_rates_of_the_machine(tmp_path: Path) -> None:
    rows = {row.node: row for row in planned(tmp_path, H100).rows}
    dpo, rlvr = rows["dpo"].estimate, rows["rlvr"].estimate
    assert rlvr.basis == "measured" and rlvr.flops is not None and rlvr.seconds is not None
    assert rlvr.seconds > rlvr.flops / 4e14, "writing is in it"
    assert dpo.seconds is None or dpo.basis == "measured"
    without = {row.node: row.estimate.seconds for row in planned(tmp_path, None).rows}
    assert without["rlvr"] is None
    notes = planned(tmp_path, H100).notes
    assert any("by the rates of a card" in note and "doctor --gpu" in note for note in notes)


def test_what_the_recipe_states_stands_above_what_was_measured(tmp_path: Path) -> None:
    rows = {row.node: row.estimate for row in planned(tmp_path, H100, **{"compute.device_tflops": 100.0}).rows}
    assert rows["rlvr"].basis == "stated"
    assert not any(
        "by the rates of" in note for note in planned(tmp_path, H100, **{"compute.device_tflops": 1.0}).notes
    )


def test_a_training_that_cannot_fit_into_the_measured_card_is_told(tmp_path: Path) -> None:
    small = H100.model_copy(update={"memory_bytes": 10 * 10**9})
    unstated = {"compute.device_memory_gb": None}
    notes = planned(tmp_path, small, **unstated).notes
    assert any(note.startswith("sft cannot run on the measured machine") and "one has 10 GB" in note for note in notes)
    assert not any("cannot run on the measured machine" in note for note in planned(tmp_path, H100, **unstated).notes)
    stated = planned(tmp_path, small, **{"compute.device_memory_gb": 80})
    assert not any("cannot run" in note for note in stated.notes), "what is stated counts"
