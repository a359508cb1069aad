"""SIGKILL while held-out prompts are answered, and around the writing of the best weights; what goes on ends the same.

Accuracy is made up in every process alike, so that it is highest in the middle of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.schemas.rlvr import RLVRInputs
from tests.small_ppo import Run, differing, killed, run, world
from tests.tasks.training.test_ppo_kills import die

#: Four batches of four steps; the second best is found at step 4, the best at step 12, and a checkpoint of every eighth
#: step and of the last is written.
SETTINGS: dict[str, Any] = {
    "num_episodes": 32, "keep": "best", "critic": {"initial": "policy"},
    "held_out": {"num_prompts": 4, "num_samples": 2, "every_steps": 4},
}  # fmt: skip
SAVED = {"save_steps": 8, "save_total_limit": 1}
ACCURACIES = {0: 0.25, 4: 0.5, 8: 0.25, 12: 1.0, 16: 0.75}


def made_up() -> None:
    from smoltulu.tasks.training import held_out
    from smoltulu.tasks.training.held_out_record import Evaluation

    real = held_out.HeldOut._answer
    if hasattr(real, "is_made_up"):
        return

    def answer(self: Any, step: int) -> Evaluation:
        made = real(self, step)
        return Evaluation(step, dict.fromkeys(made.prompts, ACCURACIES[step]), {}, made.stopped, made.mean_length)

    answer.is_made_up = True  # type: ignore[attr-defined]
    held_out.HeldOut._answer = answer  # type: ignore[method-assign]


def killed_while_answering() -> None:
    """The answers after step 12, by which the best was to be found."""
    from smoltulu.tasks.training import held_out

    real = held_out.scores_of
    number = [0]

    def scores(*args: Any) -> Any:
        number[0] += 1
        return die() if number[0] == 4 else real(*args)

    held_out.scores_of = scores


def killed_while_the_best_is_written() -> None:
    """The policy's weights of step 12 are there, the critic's are not."""
    from smoltulu.tasks.trainer import best_weights

    real = best_weights.save_file

    def save(weights: Any, file: Path) -> None:
        if file.parent.name == "step-12" and file.name.startswith("critic"):
            die()
        real(weights, file)

    best_weights.save_file = save


def killed_when_the_best_is_written() -> None:
    """Those of step 12 are whole; the newest checkpoint, of step 8, names step 4 as the best."""
    from smoltulu.tasks.trainer import best_weights

    real = best_weights.mark_complete

    def mark(folder: Path) -> None:
        real(folder)
        if folder.name == "step-12":
            die()

    best_weights.mark_complete = mark


def killed_after_training() -> None:
    """No step is left, and the best weights are still to be put in place."""
    from smoltulu.tasks.training import held_out

    held_out.HeldOut.restore_best = die  # type: ignore[method-assign]


#: What kills -> the step of the newest checkpoint that is left, and what lies beside it.
KILLS: dict[Callable[[], None], tuple[int, set[str]]] = {
    killed_while_answering: (8, {"step-4"}),
    killed_while_the_best_is_written: (8, {"step-4", "step-12"}),
    killed_when_the_best_is_written: (8, {"step-4", "step-12"}),
    killed_after_training: (16, {"step-4", "step-12"}),
}


def child(kill: Callable[[], None], inputs: RLVRInputs, folder: Path) -> None:
    made_up()
    kill()
    run(inputs, folder, SETTINGS, **SAVED)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLVRInputs:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(inputs: RLVRInputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    from smoltulu.tasks.training import held_out

    real = held_out.HeldOut._answer
    made_up()
    yield run(inputs, tmp_path_factory.mktemp("whole"), SETTINGS, **SAVED)
    held_out.HeldOut._answer = real  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_killed_run_keeps_the_same_weights(
    inputs: RLVRInputs, whole: Run, tmp_path: Path, kill: Callable[[], None]
) -> None:
    assert whole.outputs.held_out.kept.step == 12
    killed(child, kill, inputs, tmp_path)
    newest = newest_checkpoint(tmp_path / "work" / "checkpoints", full=True)
    step, beside = KILLS[kill]
    assert newest is not None and newest[0] == step
    assert {path.name for path in (tmp_path / "work" / "best").iterdir()} == beside

    resumed = run(inputs, tmp_path, SETTINGS, **SAVED)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == f"{step}\n"
    assert differing(whole.policy, resumed.policy) == differing(whole.critic, resumed.critic) == []
    assert resumed.outputs.held_out == whole.outputs.held_out
    for name in ("prompts", "samples", "held_out"):
        assert resumed.log(name) == whole.log(name)
    # Losses and all else, but for time and memory, are those of the unbroken run: every look is there once.
    measured = {"tokens_per_second", "peak_memory_gb"}
    for one, other in zip(whole.log("history"), resumed.log("history"), strict=True):
        assert {name: one[name] for name in one.keys() - measured} == {
            name: other[name] for name in other.keys() - measured
        }
