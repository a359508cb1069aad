"""A run whose rewards never differ ends with an error that shows why, not with a model."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.rlvr import RLVRInputs
from smoltulu.tasks.trainer.signal import Rollout, SignalWatch, share_with_signal, without_signal
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.rows_file import write_rows
from tests.tasks.training.test_grpo import arguments_of, prompts
from tests.tiny_model import build_tiny_model

NAN = math.nan
NEVER = "the colour of the sky"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("rewards", "group_size", "share"), [
    ([0, 0, 0, 0], 2, 0.0), ([0, 1, 0, 0], 2, 0.5), ([0, 0, 10, 10], 2, 0.0), ([0, 0, 10, 10], 4, 1.0),
    ([0, NAN, 1, 0], 2, 0.5), ([NAN, NAN], 2, 0.0), ([NAN, 1], 2, 0.0), ([], 2, 0.0), ([-10, -10, -10], 3, 0.0),
])  # fmt: skip
def test_share_of_groups_with_signal(rewards: list[float], group_size: int, share: float) -> None:
    assert share_with_signal(rewards, group_size) == share


@given(st.lists(st.sampled_from([0.0, 10.0, -10.0, NAN]), min_size=1, max_size=40), st.integers(1, 8))
def test_a_group_has_a_signal_where_its_advantages_are_not_all_zero(rewards: list[float], group_size: int) -> None:
    share = share_with_signal(rewards, group_size)
    groups = [rewards[first : first + group_size] for first in range(0, len(rewards), group_size)]
    moved = 0
    for group in groups:
        graded = [reward for reward in group if not math.isnan(reward)]
        moved += any(reward != sum(graded) / len(graded) for reward in graded)
    assert share == moved / len(groups)


def test_when_a_run_is_hopeless() -> None:
    watch = SignalWatch(max_rollouts=12)
    for _ in range(2):
        assert watch.add([0.0] * 4, 4) == 0 and not watch.is_hopeless(is_last=False)
    assert not watch.is_hopeless(is_last=True) and watch.is_warned(is_last=True) and not watch.is_warned(is_last=False)
    watch.add([0.0] * 4, 4)
    assert watch.num_rollouts == 12 and watch.is_hopeless(is_last=False)
    assert watch.add([0.0, 1.0] * 2, 4) == 1 and not watch.is_hopeless(is_last=True)
    watch.add([0.0] * 4000, 4)
    assert not watch.is_hopeless(is_last=True), "it asks about the first rollouts"
    off = SignalWatch(max_rollouts=0)
    off.add([0.0] * 4000, 4)
    assert not off.is_hopeless(is_last=True) and not off.is_warned(is_last=True)


@pytest.mark.parametrize(("num_rollouts", "is_last", "stops", "warns"), [
    (96, True, False, True), (96, False, False, False), (100, True, True, False), (100, False, False, False),
    (1000, False, True, False),
])  # fmt: skip
def test_a_whole_run_of_a_few_rollouts_is_a_trial(num_rollouts: int, is_last: bool, stops: bool, warns: bool) -> None:
    watch = SignalWatch(max_rollouts=1000)
    watch.add([0.0] * num_rollouts, 4)
    assert (watch.is_hopeless(is_last), watch.is_warned(is_last)) == (stops, warns)


@pytest.mark.parametrize("has_signal", [True, False])
def test_a_resumed_run_knows_what_was_before_though_nothing_was_logged(tmp_path: Path, has_signal: bool) -> None:
    watch = SignalWatch(100, 96, has_signal)
    watch.save(tmp_path)
    assert SignalWatch.of(100, tmp_path) == watch
    assert SignalWatch.of(100, None) == SignalWatch(100)
    (tmp_path / "signal.json").unlink()  # a checkpoint of an older version does not say
    assert SignalWatch.of(100, tmp_path).has_signal


def test_a_signal_before_a_resume_counts_whatever_the_logging_interval_is(model: Path, tmp_path: Path) -> None:
    """Right and wrong answers first, then none that is right: killed and gone on from, with nothing logged so far."""
    settings: dict[str, Any] = {"num_steps": 4, "max_rollouts_without_signal": 8, "learning_rate": 1e-6}
    arguments = arguments_of(tmp_path, model, settings, prompts(8), save_steps=1, logging_steps=100, save_total_limit=9)
    config, inputs, context = arguments[0], RLVRInputs(**arguments[1].model_dump()), arguments[2]
    train_rlvr(config, inputs, context)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "work" / "checkpoints" / f"checkpoint-{step}")
    assert json.loads((tmp_path / "work" / "checkpoints" / "checkpoint-2" / "signal.json").read_text()) == {
        "num_rollouts": 8, "has_signal": True,
    }  # fmt: skip
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    never = inputs.model_copy(update={"dataset": str(tmp_path / "never.parquet")})
    write_rows(tmp_path / "never.parquet", prompts(8, verifier="math", ground_truth=NEVER))
    train_rlvr(config, never, context)


def test_the_error_shows_rollouts_of_several_prompts() -> None:
    rollouts = [Rollout(f"q{i // 4}", f"a{i}", "gsm8k", f"truth {i // 4}", "wrong", 0.0) for i in range(8)]
    said = without_signal(SignalWatch(8, 8), rollouts)
    assert "in 8 rollouts" in said and said.count("ground truth") == 3
    assert "'q0' -> 'a0'; ground truth 'truth 0'; verifier gsm8k: wrong, reward 0" in said
    assert "'q1' -> 'a4'" in said and "'q0' -> 'a1'" in said
    long = without_signal(SignalWatch(8, 8), [Rollout("q" * 9000, "a" * 9000, "math", "t" * 9000, "wrong", 0.0)])
    assert len(long) < 2000


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_run_without_signal_stops(model: Path, tmp_path: Path, algorithm: str) -> None:
    """RLOO's rewards differ by their KL terms; what its verifier says never does."""
    settings = {
        "algorithm": algorithm, "beta": 0.5, "num_steps": 6, "max_rollouts_without_signal": 8, "learning_rate": 0.05,
        "non_stop_reward": None, "weight_decay": 0.5,
    }  # fmt: skip
    rows = prompts(8, verifier="math", ground_truth=NEVER)
    arguments = arguments_of(tmp_path, model, settings, rows, save_steps=1)
    with pytest.raises(ValueError, match=r"no reward differed .* in 8 rollouts") as caught:
        train_rlvr(arguments[0], RLVRInputs(**arguments[1].model_dump()), arguments[2])
    # With the verifier's reason.
    assert len(re.findall(rf"ground truth {NEVER!r}; verifier math: wrong \(.+\), reward 0", str(caught.value))) == 3
    assert "What is" in str(caught.value) and not (tmp_path / "out" / "model").exists()


def test_a_short_run_is_asked_at_its_end_and_again_after_a_resume(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 2, "max_rollouts_without_signal": 8}
    arguments = arguments_of(tmp_path, model, settings, prompts(8, verifier="math", ground_truth=NEVER), save_steps=1)
    config, inputs, context = arguments[0], RLVRInputs(**arguments[1].model_dump()), arguments[2]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no reward differed .* in 8 rollouts"):
            train_rlvr(config, inputs, context)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "1\n"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    outputs, metrics = train_rlvr(config.model_copy(update={"max_rollouts_without_signal": 0}), inputs, context)
    assert outputs.num_steps == 2 and metrics["reward"] == 0


def test_a_trial_without_signal_completes_with_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = arguments_of(tmp_path, model, {"num_steps": 2}, prompts(8, verifier="math", ground_truth=NEVER))
    outputs, _ = train_rlvr(arguments[0], RLVRInputs(**arguments[1].model_dump()), arguments[2])
    assert outputs.num_steps == 2 and caplog.text.count("no reward differed") == 1 and NEVER in caplog.text


def test_a_run_with_signal_goes_on(model: Path, tmp_path: Path) -> None:
    settings = {"num_steps": 3, "max_rollouts_without_signal": 4, "seed": 5, "effective_batch_size": 16}
    arguments = arguments_of(tmp_path, model, settings, prompts(24))
    outputs, metrics = train_rlvr(arguments[0], RLVRInputs(**arguments[1].model_dump()), arguments[2])
    assert outputs.num_steps == 3 and metrics["reward"] > 0
