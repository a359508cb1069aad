"""benchmarks/gpu_session.sh: its plan without a GPU, its smallest slice on a CPU, its verdicts by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_session import ABLATIONS, gains, not_as_unbroken, outside_the_band
from smoltulu.schemas.machine import MachineRates
from tests import ROOT

FALLING = [10 - 0.1 * step for step in range(50)]
PARTS = ("1-tests", "2-bfloat16", "3-resume", "4-speed", "5-rates", "6-ablations", "7-rollouts")


def session(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), *arguments]
    variables = os.environ | {"OUT": str(folder / "results"), "PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_without_a_gpu_the_plan_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    done = session(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.startswith("torch finds no CUDA device; the plan:\n")
    lines = done.stdout.splitlines()[1:]
    assert [line.partition(",")[0] for line in lines] == list(PARTS)
    # With half a minute for wheels: ten minutes in all.
    assert 30 + sum(int(line.split()[3]) for line in lines) <= 600
    # Only files that have tests for a GPU: the others import what need not be there.
    assert "tests/tasks/trainer/test_packing.py" in lines[0] and "tests/flows" not in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    done = session(tmp_path, PYTHON="/bin/false")
    assert done.returncode == 0 and done.stdout.startswith("/bin/false cannot be used; the plan:\n")


@pytest.mark.slow
def test_the_smallest_slice_runs_on_a_cpu(tmp_path: Path) -> None:
    """Where the package is not installed: with the environment's libraries, from the checkout alone."""
    done = session(tmp_path, "--slice", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout
    results = tmp_path / "results"
    for part in PARTS:
        assert f"\n{part}: passed after " in (results / "session.txt").read_text(), done.stdout
    curves = json.loads((results / "2-bfloat16.json").read_text())
    assert len(curves["float32"]) == len(curves["bfloat16"]) == 50 and curves["wrong"] == []
    resumed = json.loads((results / "3-resume.json").read_text())
    assert resumed["bitwise"] and resumed["resumed at"] == ["8"] and len(resumed["resumed"]) == 24
    speed = json.loads((results / "4-speed.json").read_text())
    assert speed["cases"]["SFT minute, 32"]["tokens_per_second"] > 0
    ablations = json.loads((results / "6-ablations.json").read_text())
    assert ablations["wrong"] == [] and ablations["seconds"].keys() == ABLATIONS.keys()
    rates = MachineRates.model_validate_json((results / "5-rates.log").read_text().splitlines()[-1])
    assert rates.device == "cpu" and rates.train is not None
    assert len(list(results.iterdir())) == 12


def test_what_each_way_adds_to_the_one_before_by_hand() -> None:
    assert gains({"padded": 3.0, "packed": 2.0, "budget": 1.6}) == pytest.approx({"packed": 0.5, "budget": 0.25})


@pytest.mark.parametrize(("half", "wrong"), [
    ([loss * 1.0004 for loss in FALLING], []),
    (FALLING, ["same to the last bit"]),
    ([FALLING[0] * 1.001, *FALLING[1:]], ["first losses are 1.00e-03 apart, more than 0.0005"]),
    ([*FALLING[:24], FALLING[24] * 0.99, *FALLING[25:]], ["at step 25 they are 1.00e-02 apart, more than 0.005"]),
    ([*FALLING[:40], *(loss * 1.003 for loss in FALLING[40:])], ["last ten are 3.00e-03 apart, more than 0.002"]),
    ([*FALLING[:30], float("nan"), *FALLING[31:]], ["a loss is not finite"]),
])  # fmt: skip
def test_the_band_by_hand(half: list[float], wrong: list[str]) -> None:
    found = outside_the_band(FALLING, half)
    assert len(found) == len(wrong) and all(part in text for part, text in zip(wrong, found, strict=True))


def test_a_loss_that_stands_still_is_no_comparison() -> None:
    assert "too little to compare" in outside_the_band([5.0] * 50, [5.001] * 50)[0]


@pytest.mark.parametrize(("again", "resumed", "wrong"), [
    ([4.0, 2.0], [4.0, 2.0], None),
    # Where two unbroken runs are equal to the last bit, a resumed one is too.
    ([4.0, 2.0], [4.0, 2.00001], "at step 2 the resumed loss is 5.00e-06 away; two unbroken runs are 0.00e+00 apart"),
    ([4.0, 2.002], [4.0, 2.005], None),
    ([4.0, 2.002], [4.0, 2.009], "at step 2"),
    ([4.0, 2.0], [4.0], "logged 1 losses, the unbroken one 2"),
])  # fmt: skip
def test_resumed_beside_unbroken_by_hand(again: list[float], resumed: list[float], wrong: Any) -> None:
    found = not_as_unbroken([[4.0, 2.0], again], resumed)
    assert wrong in found[0] if wrong else found == []
