"""The held-out loss: by hand, against a plain loop in float64, and that training goes on as if nobody looked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from smoltulu.schemas.held_out_loss import HeldOutLoss, HeldOutLossSettings
from smoltulu.schemas.training import SFTSettings
from smoltulu.tasks.models.tokens import IGNORED
from smoltulu.tasks.stage import Diverged
from smoltulu.tasks.trainer.checkpoint import shard_name
from smoltulu.tasks.training.held_out_loss import RowLoss, best_of, mean_loss, num_stale
from tests.small_ppo import differing, killed
from tests.small_runs import Run, conversations, pairs, run, stage_arguments, two_processes
from tests.tasks.training.test_ppo_kills import die
from tests.tiny_model import build_tiny_model

STAGES = ["sft", "reward_model", "dpo"]
#: Six steps of two rows; five rows are held out, a number that no micro-batch of two divides.
SETTINGS: dict[str, Any] = {"effective_batch_size": 2, "max_steps": 6, "held_out": {"every_steps": 2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def rows_of(stage: str, count: int) -> list[dict[str, Any]]:
    return (conversations if stage == "sft" else pairs)(count)


def held_out_of(stage: str) -> list[dict[str, Any]]:
    """Five rows that are not among the trained ones; the last two are of another source."""
    rows = rows_of(stage, 17)[12:]
    return [{**row, "id": f"{int(number > 2)}:{number}"} for number, row in enumerate(rows)]


def trained(stage: str, folder: Path, base: Path, settings: dict[str, Any] | None = None, **compute: Any) -> Run:
    return run(stage, folder, base, rows_of(stage, 12), SETTINGS | (settings or {}),
               **{"held_out": held_out_of(stage)} | compute)  # fmt: skip


def losses(made: Run) -> list[tuple[int, float]]:
    return [(one.step, one.loss) for one in made.outputs.held_out_loss.losses]


# --- By hand ---------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_all_that_counts() -> None:
    """Two rows, of 1 and 3 tokens: (2 + 3) / 4, not (2 + 1) / 2."""
    found = mean_loss(7, [RowLoss(2.0, 1), RowLoss(3.0, 3)])
    assert (found.step, found.loss, found.accuracy) == (7, 1.25, None)
    # Residuals 2 - 1.25 and 3 - 3.75: both 0.75; sqrt(2 * 0.5625 * 2 / 1) / 4.
    assert found.stderr == pytest.approx(math.sqrt(2.25) / 4)
    of_pairs = mean_loss(0, [RowLoss(0.5, 1, True), RowLoss(1.0, 1, False), RowLoss(1.5, 1, True)])
    assert of_pairs.loss == 1.0 and of_pairs.accuracy == pytest.approx(2 / 3)
    assert of_pairs.stderr == pytest.approx(0.5 / math.sqrt(3)), "as of any mean: standard deviation 0.5"
    assert mean_loss(0, [RowLoss(2.0, 1)]).stderr is None
    with pytest.raises(Diverged, match="held-out loss is nan at step 3"):
        mean_loss(3, [RowLoss(math.nan, 1)])


def series(*values: float) -> list[HeldOutLoss]:
    return [HeldOutLoss(step=10 * number, loss=value) for number, value in enumerate(values)]


def test_the_best_and_how_long_nothing_was_lower() -> None:
    assert best_of(series(3, 1, 2, 1)).step == 10, "of two the earlier"
    assert [num_stale(series(*values)) for values in ([3], [3, 2], [3, 2, 2], [3, 2, 2, 2.5], [3, 2, 2, 1])] == [
        0, 0, 1, 2, 0,
    ]  # fmt: skip
    # Falls of 0.1 each: against 3.0 the third is the first that is lower by more than 0.25.
    assert num_stale(series(3, 2.9, 2.8), 0.25) == 2 and num_stale(series(3, 2.9, 2.8, 2.7), 0.25) == 0


def test_when_it_is_computed() -> None:
    tenth = HeldOutLossSettings()
    assert tenth.every(100) == 10 and tenth.num_evaluations(100) == 11, "at the start, 10, 20 ... 100"
    assert tenth.every(101) == 11 and tenth.every(5) == 1
    assert HeldOutLossSettings(every_share=0.5).num_evaluations(10) == 3
    assert HeldOutLossSettings(every_steps=4).num_evaluations(10) == 4, "0, 4, 8, 10"


@pytest.mark.parametrize(("given", "said"), [
    ({"every_steps": 3, "every_share": 0.5}, "two intervals; keep one"),
    ({"min_delta": 0.1}, "belongs to patience"),
    ({"keep": "first"}, "'last' or 'best'"),
])  # fmt: skip
def test_contradictions_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HeldOutLossSettings(**given)


def test_an_interval_beyond_the_run_is_refused() -> None:
    fields: dict[str, Any] = {"learning_rate": 1e-5, "effective_batch_size": 2, "max_length": 64, "max_steps": 6}
    with pytest.raises(ValidationError, match=r"held_out\.every_steps 7 is more than the run's 6 optimizer steps"):
        SFTSettings(**fields, held_out={"every_steps": 7})


# --- Against a plain loop in float64 ---------------------------------------------------------------------------------


def plain_sft(model: Any, row: dict[str, Any], _: Any) -> tuple[float, int]:
    logps = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    counted = [(at, label) for at, label in enumerate(row["labels"]) if at and label != IGNORED]
    return -sum(float(logps[at - 1, label]) for at, label in counted), len(counted)


def plain_reward_model(model: Any, row: dict[str, Any], _: Any) -> tuple[float, int]:
    chosen, rejected = (
        model(torch.tensor([row["prompt_ids"] + row[side]])).logits[0, 0] for side in ("chosen_ids", "rejected_ids")
    )
    return float(-logsigmoid(chosen - rejected)), 1


def plain_dpo(model: Any, row: dict[str, Any], reference: Any) -> tuple[float, int]:
    """sigmoid_norm, beta 5: log-ratios of a completion's tokens divided by their number."""

    def ratio(side: str) -> Any:
        ids, mask = row["prompt_ids"] + row[f"{side}_ids"], [0] * len(row["prompt_ids"]) + row[f"{side}_mask"]
        said = [at for at, counts in enumerate(mask) if counts]
        of_policy, of_reference = (one(torch.tensor([ids])).logits[0].log_softmax(-1) for one in (model, reference))
        return sum(of_policy[at - 1, ids[at]] - of_reference[at - 1, ids[at]] for at in said) / len(said)

    return float(-logsigmoid(5.0 * (ratio("chosen") - ratio("rejected")))), 1


PLAIN: dict[str, Callable[[Any, dict[str, Any], Any], tuple[float, int]]] = {
    "sft": plain_sft, "reward_model": plain_reward_model, "dpo": plain_dpo,
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_that_of_a_plain_loop_in_float64(stage: str, base: Path, tmp_path: Path) -> None:
    """Of the weights that were saved, which are those of the last evaluation; padded, packed, and however cut."""
    from pyarrow import parquet
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    expected, near = None, 1e-5 if stage == "dpo" else 2e-6  # beta 5 times sums of log-probabilities
    for packing, size in ((True, 2), (False, 1)):
        made = trained(stage, tmp_path / f"{packing}{size}", base, packing=packing, per_device_train_batch_size=size)
        rows = parquet.read_table(
            tmp_path / f"{packing}{size}" / "held_out" / "preflight" / "out" / "rows.parquet"
        ).to_pylist()
        model = kind.from_pretrained(made.model, dtype=torch.float64)
        with torch.no_grad():
            plain = [PLAIN[stage](model, row, reference) for row in rows]
        total, count = sum(one for one, _ in plain), sum(number for _, number in plain)
        found = made.outputs.held_out_loss
        assert (found.num_rows, found.num_counted) == (5, count) and [step for step, _ in losses(made)] == [0, 2, 4, 6]
        assert found.last.loss == pytest.approx(total / count, rel=near)
        assert made.metrics["held_out/loss"] == found.last.loss and found.kept_step == 6
        looks = [row for row in made.history if "held_out/loss" in row]
        assert [(row["step"], row["held_out/loss"]) for row in looks] == losses(made)
        # Of the two sources, of three rows and of two.
        of_second = sum(one for one, _ in plain[3:]) / sum(number for _, number in plain[3:])
        assert looks[-1]["held_out/source_1"] == pytest.approx(of_second, rel=near)
        expected = expected or losses(made)
        assert losses(made) == [(step, pytest.approx(loss, rel=near)) for step, loss in expected]


def weights(made: Run) -> dict[str, torch.Tensor]:
    return load_file(made.model / "model.safetensors")


def test_nobody_notices_that_it_was_looked_at(base: Path, tmp_path: Path) -> None:
    """Dropout draws random numbers in training: as many, with and without held-out rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with_dropout = tmp_path / "with_dropout"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(with_dropout)
    for file in base.iterdir():
        if not (with_dropout / file.name).exists():
            (with_dropout / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(base)
    config.attention_dropout = 0.2
    config.save_pretrained(with_dropout)
    alone = trained("sft", tmp_path / "alone", with_dropout, {"held_out": None}, held_out=None, packing=False)
    seen = trained("sft", tmp_path / "seen", with_dropout, packing=False)
    assert alone.outputs.held_out_loss is None and differing(weights(alone), weights(seen)) == []
    kept = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate"}
    of_steps = [[{n: row[n] for n in kept} for row in one.history if "loss" in row] for one in (alone, seen)]
    assert of_steps[0] == of_steps[1] and len(of_steps[0]) == 6


@pytest.mark.slow
def test_two_processes_compute_what_one_does(base: Path, tmp_path: Path) -> None:
    """Five rows: three for one process, two for the other."""
    import json

    one = trained("sft", tmp_path / "one", base)
    work = two_processes("sft", tmp_path, base, rows_of("sft", 12), SETTINGS, held_out=held_out_of("sft"),
                         per_device_train_batch_size=1)("two")  # fmt: skip
    lines = map(json.loads, (work / "output" / "logs" / "history.jsonl").read_text().splitlines())
    looks = [(line["step"], line["held_out/loss"]) for line in lines if "held_out/loss" in line]
    assert looks == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one)]


# --- The best weights, and the end -----------------------------------------------------------------------------------


def test_the_best_weights_are_saved(base: Path, tmp_path: Path) -> None:
    """The best are those of the start."""
    settings = {"held_out": {"every_steps": 3, "keep": "best"}}
    made = made_up(trained, "sft", tmp_path, base, settings, said={0: 1.0, 3: 3.0, 6: 2.0})
    found = made.outputs.held_out_loss
    assert found.kept_step == 0 == made.metrics["kept_step"] and "those that the run started from" in found.why
    assert made.metrics["held_out/loss"] == 1.0 == found.start.loss and made.outputs.num_steps == 6
    started = load_file(base / "model.safetensors")
    assert differing({name: weights(made)[name] for name in started}, started) == []


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("last", 3)])
def test_the_run_ends_when_nothing_was_lower(keep: str, kept: int, base: Path, tmp_path: Path) -> None:
    """The run goes on from its checkpoint after the end: there is nothing left to do."""
    settings = {"held_out": {"every_steps": 1, "keep": keep, "patience": 2, "min_delta": 0.2}}
    said = {0: 5.0, 1: 4.0, 2: 4.5, 3: 4.1}
    made = made_up(trained, "sft", tmp_path, base, settings, said=said)
    found = made.outputs.held_out_loss
    assert losses(made) == list(said.items()) and made.outputs.num_steps == 3 and found.kept_step == kept
    assert "at step 3 of 6" in found.ended_early and "not been lower for 2 evaluations" in found.ended_early
    again = made_up(trained, "sft", tmp_path, base, settings, said={})
    assert again.outputs.held_out_loss == found and differing(weights(made), weights(again)) == []


@pytest.mark.parametrize(("stage", "stopped"), [
    ("sft", 5),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("sft", 3), ("reward_model", 3), ("reward_model", 5), ("dpo", 3), ("dpo", 5),
    )),
])  # fmt: skip
def test_a_broken_run_ends_as_an_unbroken_one(stage: str, stopped: int, base: Path, tmp_path: Path) -> None:
    """Stopped in a step: the loss of step 4 is the best. Before it, and after it, when only its weights know."""
    settings = {"held_out": {"every_steps": 2, "keep": "best"}}
    whole = made_up(trained, stage, tmp_path / "whole", base, settings, save_steps=1, save_total_limit=1)
    assert whole.outputs.held_out_loss.kept_step == 4

    def broken() -> None:
        made_up(trained, stage, tmp_path / "broken", base, settings, save_steps=1, save_total_limit=1, dies_at=stopped)

    with pytest.raises(KeyboardInterrupt):
        broken()
    again = made_up(trained, stage, tmp_path / "broken", base, settings, save_steps=1, save_total_limit=1)
    assert (tmp_path / "broken" / "work" / "resumed.jsonl").read_text() == f"{stopped - 1}\n"
    assert again.outputs.held_out_loss == whole.outputs.held_out_loss
    assert differing(weights(whole), weights(again)) == []


def made_up(
    function: Any, *arguments: Any, said: dict[int, float] | None = None, dies_at: int | None = None, **named: Any
) -> Any:
    """With these losses by step, else the lowest at step 4; Ctrl-C in step `dies_at`, before anything of it is kept."""
    from smoltulu.tasks.training import held_out_loss

    with pytest.MonkeyPatch.context() as patched:
        real, end = held_out_loss.mean_loss, held_out_loss.HeldOutLosses.on_step_end
        by_step = {0: 5.0, 2: 4.0, 4: 1.0, 6: 2.0} if said is None else said
        patched.setattr(
            held_out_loss, "mean_loss",
            lambda step, rows: real(step, rows).model_copy(update={"loss": by_step[step]}),
        )  # fmt: skip

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == dies_at:
                raise KeyboardInterrupt
            end(self, args, state, control, **more)

        patched.setattr(held_out_loss.HeldOutLosses, "on_step_end", on_step_end)
        return function(*arguments, **named)


def die_while_the_best_is_written() -> None:
    """Weights of step 4 are there, and not marked as whole; the checkpoint of step 3 names step 2, and may be whole."""
    from smoltulu.tasks.trainer import best_weights

    real = best_weights.mark_complete
    best_weights.mark_complete = lambda folder: die() if folder.name == "step-4" else real(folder)


def die_after_training() -> None:
    """No step is left, and the best weights are still to be put in place."""
    from smoltulu.tasks.training import held_out_loss

    held_out_loss.HeldOutLosses.restore_best = die  # type: ignore[method-assign]


BEST: dict[str, Any] = {"held_out": {"every_steps": 2, "keep": "best"}}


def child(kill: Callable[[], None], base: Path, folder: Path) -> None:
    kill()
    made_up(trained, "sft", folder, base, BEST, save_steps=1, save_total_limit=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "steps"), [(die_while_the_best_is_written, "23"), (die_after_training, "6")])
def test_a_killed_run_keeps_the_same_weights(kill: Callable[[], None], steps: str, base: Path, tmp_path: Path) -> None:
    whole = made_up(trained, "sft", tmp_path / "whole", base, BEST, save_steps=1, save_total_limit=1)
    killed(child, kill, base, tmp_path / "killed")
    again = made_up(trained, "sft", tmp_path / "killed", base, BEST, save_steps=1, save_total_limit=1)
    assert (tmp_path / "killed" / "work" / "resumed.jsonl").read_text().strip() in set(steps)
    assert again.outputs.held_out_loss == whole.outputs.held_out_loss and whole.outputs.held_out_loss.kept_step == 4
    assert differing(weights(whole), weights(again)) == []


def test_a_damaged_best_is_refused_before_hours_of_training(base: Path, tmp_path: Path) -> None:
    settings = {"held_out": {"every_steps": 2, "keep": "best"}}
    with pytest.raises(KeyboardInterrupt):
        made_up(trained, "sft", tmp_path, base, settings, save_steps=1, dies_at=6)
    (tmp_path / "work" / "best" / "step-4" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"step 4, the best by held-out loss, are damaged.*\(refresh sft\)"):
        made_up(trained, "sft", tmp_path, base, settings, save_steps=1)


def test_an_older_checkpoint_has_its_best_weights_too(base: Path, tmp_path: Path) -> None:
    """Checkpoint 2 names those of step 1, checkpoint 4 those of step 3. Step 5 is better; then checkpoint 4 breaks."""
    settings = {"held_out": {"every_steps": 1, "keep": "best"}}
    said = {0: 9.0, 1: 8.0, 2: 8.5, 3: 7.0, 4: 7.5, 5: 6.0, 6: 6.5}
    whole = made_up(trained, "sft", tmp_path / "whole", base, settings, said=said, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        made_up(trained, "sft", tmp_path / "broken", base, settings, said=said, save_steps=2, dies_at=6)
    work = tmp_path / "broken" / "work"
    assert sorted(path.name for path in (work / "best").iterdir()) == ["step-1", "step-3", "step-5"]
    (work / "checkpoints" / "checkpoint-4" / shard_name(0, 1)).write_bytes(b"no weights")
    again = made_up(trained, "sft", tmp_path / "broken", base, settings, said=said, save_steps=2)
    assert (work / "resumed.jsonl").read_text() == "2\n"
    assert again.outputs.held_out_loss == whole.outputs.held_out_loss
    assert differing(weights(whole), weights(again)) == []


def test_without_held_out_rows_nothing_is_added(base: Path, tmp_path: Path) -> None:
    config, inputs, _ = stage_arguments("sft", tmp_path, base, conversations(2), {})
    assert config.held_out is None and inputs.held_out is None
