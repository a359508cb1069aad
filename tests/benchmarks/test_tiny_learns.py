"""The verdict of the control arms, by hand."""

from __future__ import annotations

import pytest

from benchmarks.tiny_learns import Arm, judged
from smoltulu.tasks.comparison.paired import PairedTest


def one(difference: float, p_value: float, greedy: float = 0.0) -> Arm:
    return Arm(PairedTest(1000, 1000, difference, 0.005, difference - 0.01, difference + 0.01, p_value, 0, 0), greedy)


@pytest.mark.parametrize(
    ("reward", "arms", "verdict"),
    [
        ("verified", [one(0.045, 1e-9), one(0.078, 1e-9)], ("samples +6.2 in the mean: ok", True)),
        ("verified", [one(0.045, 1e-9), one(0.05, 1e-9)], ("samples +4.8 in the mean: FAILS", False)),
        ("verified", [one(0.09, 0.06), one(0.09, 1e-9)], ("samples +9.0 in the mean: FAILS", False)),
        ("verified", [one(0.09, 1e-9, greedy=-0.011)], ("samples +9.0 in the mean: FAILS", False)),
        ("constant", [one(0.0, 1.0)], ("samples +0.0 in the mean: within noise", True)),
        ("random", [one(-0.02, 1e-9), one(0.01, 0.2)], ("samples -0.5 in the mean: no gain, loses", True)),
        ("random", [one(-0.02, 1e-9), one(0.01, 0.001)], ("samples -0.5 in the mean: GAINS", False)),
        ("format_only", [one(0.05, 1e-9)], ("samples +5.0 in the mean", True)),
    ],
)
def test_verdicts_by_hand(reward: str, arms: list[Arm], verdict: tuple[str, bool]) -> None:
    assert judged(reward, arms) == verdict


def test_what_an_arm_says() -> None:
    assert str(one(0.123, 0.5, greedy=-0.02)) == "samples +12.3 ± 0.5 (p = 0.5), greedy -2.0"
