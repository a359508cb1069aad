"""Measuring this machine, with what a machine with a GPU and little else has: no flow is imported."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from smoltulu.schemas.machine import MachineRates
from smoltulu.tasks.machine.measure import (
    _SHARES,
    SHAPES,
    Machine,
    attention_flops,
    fastest,
    measured,
    num_parameters,
    shape_for,
)


def test_flops_of_attention_by_hand() -> None:
    # 2 n^2 d heads rows for Q K^T, as many for its product with V, half of it causal; the backward pass 2.5 times that.
    assert attention_flops(num_tokens=8, head_size=4, num_heads=2, num_rows=1) == 3.5 * (2 * 2 * 64 * 4 * 2 / 2)


@pytest.mark.parametrize("rate", [1e9, 1e11, 1e13, 8e14])
def test_the_largest_step_that_ends_in_time_is_taken(rate: float) -> None:
    shape, num_tokens = shape_for(rate, 5.0)
    step = 6 * num_parameters(shape) * num_tokens / (rate / 4)
    assert step <= 5.0 or (shape, num_tokens) == (SHAPES[-1], 1024)
    if shape != SHAPES[0]:
        larger = SHAPES[SHAPES.index(shape) - 1]
        assert 6 * num_parameters(larger) * 1024 / (rate / 4) > 5.0, "not even one row of the next larger one does"


def test_parameters_of_a_shape_are_those_of_the_model() -> None:
    model = Machine("cpu")._model(SHAPES[-1])
    assert sum(one.numel() for one in model.parameters()) == num_parameters(SHAPES[-1])


def test_the_shares_are_the_whole_time() -> None:
    assert math.isclose(sum(_SHARES.values()), 1.0)


def test_the_fastest_repetition_counts() -> None:
    waits = iter([0.0, 0.03, 0.001, 0.02, *[0.02] * 100])
    assert fastest(lambda: time.sleep(next(waits)), lambda: None, 0.3) < 0.02


# ------------------------------------------------------------------------------------------------------- measurements


@pytest.fixture(scope="module")
def on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> MachineRates:
    return measured(tmp_path_factory.mktemp("disk"), "cpu", seconds=12.0)


def test_everything_that_a_cpu_has_is_measured(on_this_machine: MachineRates) -> None:
    rates = on_this_machine
    assert rates.not_measured == {"host copy": "there is no GPU"}
    assert rates.copy_bytes_per_second and rates.copy_bytes_per_second > 1e7
    assert rates.matmul_flops_per_second.keys() == {"float32"} and rates.attention_flops_per_second
    assert rates.train is not None and rates.train.precision == "float32" and rates.train.peak_memory_bytes is None
    assert rates.train.flops_per_second < 2 * max(rates.matmul_flops_per_second.values())
    assert rates.decode is not None and rates.disk_write_bytes_per_second and rates.small_file_seconds
    assert not list(Path(rates.folder).iterdir()), "nothing is left behind"


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    rates = measured(tmp_path / "not there", "cpu", seconds=2.0)
    assert "No such file" in rates.not_measured["disk"] and rates.disk_read_bytes_per_second is None
    assert rates.copy_bytes_per_second


def test_a_part_without_time_is_named(tmp_path: Path) -> None:
    rates = measured(tmp_path, "cpu", seconds=1e-9)
    assert set(rates.not_measured.values()) == {"the time was over"} and rates.train is None


@pytest.mark.gpu
def test_everything_that_a_gpu_has_is_measured(tmp_path: Path) -> None:
    rates = measured(tmp_path, "cuda", seconds=20.0)
    assert rates.not_measured == {} and rates.host_copy_bytes_per_second
    assert "bfloat16" in rates.matmul_flops_per_second and rates.train is not None and rates.train.peak_memory_bytes
