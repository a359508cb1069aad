"""benchmarks/rlvr.py: its clock and its means by hand, equal work on both sides, the whole on a minute model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from benchmarks import rlvr, rlvr_work
from benchmarks.rlvr import SETTINGS, Comparison, Measured, Setting
from benchmarks.rlvr_work import PHASES, Phases
from benchmarks.training_rows import SHAPES
from benchmarks.training_tools import Run
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.trainer import dropout
from smoltulu.tasks.training import grpo
from smoltulu.tasks.verifiers import verify
from tests.small_runs import turn

MINUTE = SHAPES["minute"]
TINY = ["--shapes", "minute", "--steps", "2", "--repeats", "1"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says, to be set."""
    now = [0.0]
    monkeypatch.setattr(rlvr_work.time, "monotonic", lambda: now[0])
    return now


def test_a_phase_within_a_phase_is_counted_once(clock: list[float]) -> None:
    phases = Phases(0)

    def spend(seconds: float, result: Any = None) -> Any:
        clock[0] += seconds
        return result

    write = phases.within("generation", lambda: spend(3, [[7, 8], [9]]), lambda made: sum(map(len, made)))

    def roll_out() -> None:
        spend(1)
        write()
        phases.within("scoring", spend)(2)
        spend(4)

    spend(100)  # before the training
    phases.begin()
    phases.within("look", roll_out)()
    spend(5)
    phases.end_step()
    spend(6)
    phases.end_step()
    assert phases.steps[0] == {"generation": 3, "scoring": 2, "look": 5, "update": 5}
    assert phases.steps[1] == {"generation": 0, "scoring": 0, "look": 0, "update": 6}
    assert phases.num_written == [3, 0]


def test_a_phase_ends_with_an_error_in_it(clock: list[float]) -> None:
    phases = Phases(0)

    def fails() -> None:
        clock[0] += 1
        raise KeyError

    with pytest.raises(KeyError):
        phases.within("scoring", fails)()
    clock[0] += 2
    phases.end_step()
    assert phases.steps == [{"generation": 0, "scoring": 1, "look": 0, "update": 2}]


def test_means_by_hand() -> None:
    """Two runs of a warm-up step and two that count; the second run is disturbed in its last one."""
    setting = Setting(3, 2, 5, 6, (1, 1), 1, 2, 2)

    def step(generation: float, scoring: float, look: float, update: float) -> dict[str, float]:
        return dict(zip(PHASES, (generation, scoring, look, update), strict=True))

    rest: dict[str, Any] = {"num_written": [99, 30, 20], "losses": [], "peaks": {"look": 7}, "left_by_generation": 1}
    first = rest | {"steps": [step(50, 50, 50, 50), step(4, 0.5, 1.5, 4), step(4, 0.5, 1.5, 4)]}
    second = rest | {"steps": [step(1, 1, 1, 1), step(4, 0.5, 1.5, 4), step(4, 0.5, 1.5, 24)], "peaks": {"look": 8}}
    one = Measured([first, second], setting, num_prompt_tokens=10)
    assert one.seconds == (10 + 20) / 2 and one.seconds_of_runs == [10, 20]
    assert one.prompts_per_second == 3 / 15
    assert [one.phase_seconds(phase) for phase in PHASES] == [4, 0.5, 1.5, 9]
    assert one.share("scoring") == 0.5 / 15
    assert one.num_written == 25 and one.num_trained == 25 + 6 * 10
    assert one.peak("look") == 8 and one.peak("update") == 0


def test_both_sides_reward_the_same() -> None:
    rows = rlvr.rlvr_rows(40, (4, 12), MINUTE)
    said = ["w11 w5 w99", "w7", "", "so w13", "w66 3", "39"]
    rewards = set()
    for row in rows:
        name, truth = row["verifier"], row["ground_truth"]
        ours = [verify(name, text, truth) for text in said]
        completions = [[turn("assistant", text)] for text in said]
        assert rlvr_work.plain_reward(completions, [name] * len(said), [truth] * len(said)) == ours
        rewards |= set(ours)
    assert rewards == {0.0, 1.0}


def test_both_sides_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same prompts, rewards, optimizer: with the same rollouts, the same losses. It is the same work that is timed."""

    def with_rollouts_of_trl(trainer: type) -> Any:
        made = ours_of(trainer)
        del made._generate_single_turn
        return made

    ours_of = grpo._rollout_trainer
    monkeypatch.setattr(grpo, "_rollout_trainer", with_rollouts_of_trl)
    # TRL draws them from torch's generator, which ours sets at each step.
    monkeypatch.setattr(dropout, "by_rows", lambda trainer: TrainerCallback())
    run = Run(tmp_path, rlvr.parse([*TINY, "--steps", "4"]))
    comparison = Comparison(run, MINUTE)
    plain, ours = comparison._plain_job(), comparison._our_job("grpo")
    plain["settings"] |= {"logging_steps": 1, "learning_rate": 1e-2}
    ours["compute"] |= {"logging_steps": 1}
    ours["config"] |= {"learning_rate": 1e-2}
    [theirs], [made] = rlvr_work.plain_grpo([plain]), rlvr_work.our_rlvr([ours])
    assert len(theirs["steps"]) == len(made["steps"]) == 5
    assert theirs["num_written"] == made["num_written"] and min(made["num_written"]) > 32
    # Ours leaves at the end of the last step, before that one is logged.
    assert made["losses"] == pytest.approx(theirs["losses"][:4], rel=1e-4, abs=1e-7) and any(made["losses"])
    for one in (theirs, made):
        assert all(seconds > 0 for step in one["steps"] for seconds in step.values())


def test_equal_episodes_and_flops(tmp_path: Path) -> None:
    comparison = Comparison(Run(tmp_path, rlvr.parse(TINY)), MINUTE)
    group, ppo = (rlvr.RLVRSettings.model_validate(comparison.config(name)) for name in ("grpo", "ppo"))
    assert group.num_rollouts == ppo.num_rollouts == 8 and group.num_prompts == ppo.num_prompts == 2
    assert group.budget.max_steps == ppo.budget.max_steps == 3
    assert group.beta == ppo.beta > 0
    measured = Measured([{"num_written": [64, 64, 64]}], comparison.setting, 10)
    # Written, reference, trained on; PPO looks at policy and critic before, and trains both.
    num_tokens = 64 + 8 * 10
    assert comparison.step_flops("grpo", measured) == (2 + 2 + 6) * MINUTE.num_parameters * num_tokens
    assert comparison.step_flops("ppo", measured) == (2 + 6 + 6 + 6) * MINUTE.num_parameters * num_tokens


def test_every_setting_holds_whole_batches() -> None:
    for setting in SETTINGS.values():
        assert setting.num_episodes % setting.per_device == 0
        ComputeSettings(per_device_train_batch_size=setting.per_device)


def test_tables_and_goals_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, rlvr.parse(TINY))
    comparison = Comparison(run, MINUTE)

    def measured(update: float, scoring: float, left: int = 0) -> Measured:
        step = {"generation": 1.0, "scoring": scoring, "look": 1.0, "update": update}
        made: dict[str, Any] = {
            "steps": 3 * [step],
            "num_written": 3 * [64],
            "losses": [0.5],
            "left_by_generation": left,
        }
        return Measured([made | {"peaks": dict.fromkeys(PHASES, 2_000_000_000)}], comparison.setting, 10)

    # It has 22,688 parameters: 5 % of their float32 weights are 4,537 bytes.
    found = {"minute": {"trl": measured(6, 0), "grpo": measured(6, 1), "ppo": measured(15, 0.5, left=10_000)}}
    rlvr.against_trl(run, found)
    rlvr.where_the_time_goes(run, found)
    rlvr.ppo_against_grpo(run, found, {"minute": comparison})
    rlvr.memory(run, found)
    printed = capsys.readouterr().out
    assert "| minute | 0.25 (0.25–0.25) | 0.222 (0.222–0.222) | 0.889 | 0.5 / 0.5 |" in printed
    assert "| GRPO, ours, minute | 9 | 11.1% | 11.1% | 11.1% | 66.7% | 64 | 24 |" in printed
    assert "| minute | 9 | 17.5 | 1.94 |" in printed
    assert "| PPO, ours, minute | 2.0 | 2.0 | 2.0 | 2.0 | 0.00 |" in printed
    # Ratio; scoring of GRPO and PPO; PPO against GRPO; what generation leaves of GRPO and PPO.
    assert [is_met for *_, is_met in run.goals] == [False, False, True, True, True, False], run.goals


@pytest.mark.slow
def test_the_whole_on_a_minute_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    status = rlvr.main([*TINY, "--results", str(results)])
    printed = capsys.readouterr().out
    for name in ("| GRPO, same settings |", "| PPO, ours, minute |", "| equal episodes and beta |", "| goal |"):
        assert name in printed
    # Speeds of so small a model mean nothing: both outcomes are fine.
    assert status == int("| NO |" in printed)
    made = json.loads(results.read_text())["shapes"]["minute"]
    assert made.keys() == {"trl", "grpo", "ppo"}
    assert sum(made["ppo"]["share"].values()) == pytest.approx(1)


def test_a_training_that_fails_is_a_goal_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Comparison, "config", lambda *_: {"algorithm": "grpo"})
    assert rlvr.main([*TINY, "--no-against-trl", "--algorithms", "grpo"]) == 1
    captured = capsys.readouterr()
    assert "| minute runs | failed | NO |" in captured.out and "Field required" in captured.err
