"""Held-out prompts: the split, what is said of them, by hand; and that training is the same with and without a look."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from smoltulu.schemas.common import scientific
from smoltulu.schemas.held_out import HeldOutSettings
from smoltulu.schemas.rlvr import PPOSettings, RLVRInputs, RLVRSettings
from smoltulu.tasks.training.held_out_record import Evaluation, Record, fall, falls, metrics_of, share_right
from smoltulu.tasks.training.held_out_rows import HeldOutRow, split_rows
from smoltulu.tasks.training.rlvr import train_rlvr
from smoltulu.tasks.verifiers.kinds import check_kind, kinds_of
from tests.rows_file import read_rows
from tests.small_ppo import SETTINGS, Run, differing, run, world
from tests.small_runs import turn, weights_of_checkpoint
from tests.tasks.training.test_grpo import arguments_of, prompts
from tests.tiny_model import build_tiny_model

HELD_OUT: dict[str, Any] = {"num_prompts": 4, "num_samples": 3, "every_steps": 4}
#: As many prompts as a fall needs.
FALL = HELD_OUT | {"num_prompts": 8, "max_drop": 0.3}


def row(number: int, text: str, verifier: str = "gsm8k", truth: str = "7") -> dict[str, Any]:
    return {"id": f"0:{number}", "prompt": [turn("user", text)], "verifier": verifier, "ground_truth": truth}


def constraint(kind: str) -> str:
    return json.dumps({"kind": kind})


# --- The split -------------------------------------------------------------------------------------------------------


def test_kinds_of_a_row() -> None:
    assert kinds_of("GSM8K@paper", "7") == ("gsm8k",)
    assert kinds_of("ifeval", '{"func_name": "validate_title", "N": null}') == ("ifeval", "validate_title")
    assert kinds_of("constraint", constraint("items")) == ("constraint", "items")
    assert kinds_of("ifeval", "no json") == ("ifeval",) == kinds_of("ifeval", '{"func_name": 3}')
    for kind in ("gsm8k", "ifeval", "validate_title", "items"):
        check_kind(kind)
    with pytest.raises(ValueError, match=r"unknown kind 'validate_tilte' \(did you mean 'validate_title'\?\)"):
        check_kind("validate_tilte")


def test_the_split_depends_on_seed_and_rows_alone() -> None:
    rows = [row(i, f"What is {i}?") for i in range(40)]
    first = split_rows(HeldOutSettings(num_prompts=8, every_steps=1), 1, rows)
    assert first == split_rows(HeldOutSettings(num_prompts=8, every_steps=9, num_samples=5), 1, rows)
    held_out = [one.number for one in first.held_out]
    assert held_out == sorted(set(held_out)) and len(held_out) == 8 == first.num_left_out
    assert sorted(held_out + first.trained) == list(range(40))
    assert [
        one.number for one in split_rows(HeldOutSettings(num_prompts=8, every_steps=1), 2, rows).held_out
    ] != held_out
    fewer = split_rows(HeldOutSettings(num_prompts=5, every_steps=1), 1, rows)
    assert {one.number for one in fewer.held_out} < set(held_out), "more prompts are the same ones and others"


def test_no_text_is_on_both_sides() -> None:
    """Every text twice, once with another verifier: 40 rows, of 20 texts."""
    rows = [row(i, f"What is {i % 20}?", "gsm8k" if i < 20 else "math") for i in range(40)]
    split = split_rows(HeldOutSettings(num_prompts=5, every_steps=1), 0, rows)
    asked = {one.row["prompt"][0]["content"] for one in split.held_out}
    assert len(asked) == 5 and split.num_left_out == 10 and len(split.trained) == 30
    assert not asked & {rows[line]["prompt"][0]["content"] for line in split.trained}


def test_another_spelling_is_no_other_question() -> None:
    """Each of 20 questions in four spellings, one beside a system message: 8 are held out in all of them."""
    rows = []
    for i in range(20):
        rows += [row(4 * i, f"What is {i}?"), row(4 * i + 1, f"what  is {i}? "), row(4 * i + 2, f"What\u00a0is {i}?\n")]
        rows.append(row(4 * i + 3, f"What is {i}?"))
        rows[-1]["prompt"].insert(0, turn("system", "Be brief."))
    split = split_rows(HeldOutSettings(num_prompts=8, every_steps=1), 0, rows)
    assert len({one.number // 4 for one in split.held_out}) == 8 and split.num_left_out == 32
    assert not {one.number // 4 for one in split.held_out} & {line // 4 for line in split.trained}


def test_held_out_kinds_are_not_trained_and_each_is_asked() -> None:
    """30 rows of items, 2 of starts_with, 20 of arithmetic; a row of arithmetic with the text of one of items."""
    rows = [row(i, f"List {i}", "constraint", constraint("items")) for i in range(30)]
    rows += [row(30 + i, f"Begin {i}", "constraint", constraint("starts_with")) for i in range(2)]
    rows += [row(32 + i, f"What is {i}?") for i in range(20)] + [row(52, "List 3")]
    settings = HeldOutSettings(num_prompts=6, every_steps=1, kinds=("items", "STARTS_WITH"))
    split = split_rows(settings, 0, rows)
    kinds = [one.kind for one in split.held_out]
    assert kinds[:6] == [None] * 6 and sorted(map(str, kinds[6:])) == ["items"] * 4 + ["starts_with"] * 2
    assert all(32 <= line < 52 for line in split.trained) and len(split.trained) == 14 and split.num_left_out == 39
    by_verifier = split_rows(settings.model_copy(update={"kinds": ("constraint",)}), 0, rows)
    assert by_verifier.trained == split.trained and {one.kind for one in by_verifier.held_out} == {None, "constraint"}


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_prompts": 40}, r"held_out\.num_prompts 40 of 40 different prompts leave none to train on"),
    ({"kinds": ["gsm8k"]}, r"held_out\.num_prompts 4 of 0 different prompts that are of no held-out kind"),
    ({"kinds": ["math"]}, r"held_out\.kinds: no row is of kind math; there are gsm8k"),
])  # fmt: skip
def test_a_split_that_leaves_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    rows = [row(i, f"What is {i}?") for i in range(40)]
    with pytest.raises(ValueError, match=said):
        split_rows(HeldOutSettings(**HELD_OUT | changes), 0, rows)


def test_a_fall_of_kinds_with_too_few_prompts_is_refused() -> None:
    rows = [row(i, f"What is {i}?") for i in range(40)]
    rows += [row(40 + i, f"List {i}", "constraint", constraint("items")) for i in range(7)]
    settings = HeldOutSettings(num_prompts=8, every_steps=1, kinds=("items",), max_kinds_drop=0.1)
    with pytest.raises(ValueError, match=r"max_kinds_drop is about the 7 different prompts of held-out kinds"):
        split_rows(settings, 0, rows)
    more = [*rows, row(47, "List 7", "constraint", constraint("items"))]
    assert len(split_rows(settings, 0, more).held_out) == 16


# --- What is said of the answers -------------------------------------------------------------------------------------


def evaluation(step: int, shares: Sequence[float | None], kinds: Sequence[float | None] = ()) -> Evaluation:
    of_prompts = {str(number): share for number, share in enumerate(shares)}
    return Evaluation(step, of_prompts, {str(100 + number): share for number, share in enumerate(kinds)}, 1.0, 3.0)


def test_share_right() -> None:
    assert share_right(["right", "wrong", "no_eos", "right"]) == 0.5
    assert share_right(["right", "could_not_grade"]) == 1.0
    assert share_right(["could_not_grade"]) is None


def test_accuracy_and_best_by_hand(tmp_path: Path) -> None:
    """Shares 1, 0, 0.5 and one that could not be graded: mean 0.5, sd 0.5, standard error 0.5 / sqrt 3."""
    first = evaluation(0, [1.0, 0.0, 0.5, None], [1.0, 1.0])
    score = first.score()
    assert (score.accuracy, score.kinds_accuracy, score.kinds_stderr) == (0.5, 1.0, 0.0)
    assert score.stderr == pytest.approx(0.5 / 3**0.5) and evaluation(0, [1.0]).score().kinds_accuracy is None
    record = Record([first, evaluation(4, [1, 1, 0.5, 0.5]), evaluation(8, [0.5, 0.5, 1, 1]), evaluation(9, [0.0])])
    assert record.best.step == 4, "of equal ones the earlier"
    record.save(tmp_path)
    assert Record.of(tmp_path) == record


def test_a_fall_by_hand() -> None:
    """Ten prompts from 1 to 0.5 and then, every other one, 0.5 or 1: means of 0.5 and 0.75, a fall by 0.375.

    All ten fell, so of 2^10 assignments of signs two are as extreme.
    """
    start, one = ({str(i): value for i in range(10)} for value in (1.0, 0.5))
    other: dict[str, float | None] = {number: 0.5 if int(number) % 2 else 1.0 for number in start}
    assert fall(start, [one, other], 0.3) == (pytest.approx(0.375), 2 / 1024)
    assert fall(start, [one, other], 0.4) is None and fall(one, [start, start], 0.1) is None
    # Two of ten prompts from 1 to 0 are a fall by 0.2, and of four assignments two are as extreme: noise.
    noise = {number: 0.0 if number in "01" else 1.0 for number in start}
    assert fall(start, [noise, noise], 0.1) is None
    # What could not be graded once does not count: eight are left, p = 2 / 2^8; then seven, p = 2 / 2^7.
    first, second = one | {"0": None}, other | {"1": None}
    found = fall(start, [first, second], 0.3)
    assert found is not None and found[1] == 2 / 256
    assert fall(start | {"2": None}, [first, second], 0.3) is None and fall(start, [dict.fromkeys(start)], 0.1) is None


def test_one_evaluation_is_no_fall_and_each_limit_looks_at_its_own() -> None:
    record = Record([evaluation(0, [1.0] * 8, [1.0] * 8), evaluation(1, [0.0] * 8, [1.0] * 8)])
    assert falls(record, 0.1, 0.1) == []
    record.evaluations.append(evaluation(2, [0.0] * 8, [0.0] * 8))
    said = falls(record, 0.1, 0.1)
    assert len(said) == 2 and said[0].startswith("accuracy on held-out prompts fell by 1.000 from 1.000 at the start")
    assert "accuracy on held-out kinds fell by 0.500" in said[1] and "held_out.max_kinds_drop is 0.1" in said[1]
    assert len(falls(record, None, 0.1)) == 1 and falls(record, None, None) == []


def test_what_is_logged_of_sources_verifiers_and_kinds() -> None:
    rows = [HeldOutRow(0, row(0, "a"), None), HeldOutRow(1, row(1, "b") | {"id": "1:1", "verifier": "math"}, None)]
    rows += [HeldOutRow(100, row(100, "c"), "items"), HeldOutRow(101, row(101, "d"), "title")]
    made = metrics_of(evaluation(4, [1.0, 0.0], [0.5, None]), rows)
    assert made == {
        "held_out/accuracy": 0.5, "held_out/stderr": 0.5, "held_out/kinds/accuracy": 0.5, "held_out/stopped": 1.0,
        "held_out/mean_length": 3.0, "held_out/could_not_grade": 0.25, "held_out/gsm8k": 1.0, "held_out/math": 0.0,
        "held_out/source_0": 1.0, "held_out/source_1": 0.0, "held_out/kinds/items": 0.5,
    }  # fmt: skip
    alone = metrics_of(evaluation(4, [1.0]), rows[:1])
    assert alone.keys() == {
        "held_out/accuracy", "held_out/stopped", "held_out/mean_length", "held_out/could_not_grade",
    }  # fmt: skip


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "said"), [
    ({"keep": "best"}, "keep best needs held-out prompts"),
    ({"held_out": HELD_OUT | {"every_steps": 13}}, r"held_out\.every_steps 13 is more than the run's 12 optimizer"),
    ({"held_out": HELD_OUT | {"max_kinds_drop": 0.1}}, "max_kinds_drop 0.1 is about held-out kinds, and kinds names"),
    ({"held_out": HELD_OUT | {"max_drop": 0.1}}, "need num_prompts of at least 8, and it is 4"),
    ({"held_out": FALL | {"every_steps": 12}},
     r"held_out\.max_drop would never end this run: .* there are 1 after the start; lower held_out\.every_steps \(12"),
    ({"held_out": FALL | {"every_steps": 6}, "keep": "best"}, "there are 2 after the start"),
    ({"held_out": HELD_OUT | {"num_prompts": 1}}, "greater than or equal to 2"),
    ({"keep": "newest"}, "'last' or 'best'"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RLVRSettings.model_validate(SETTINGS | changes)


def test_spelling_of_kinds_means_nothing() -> None:
    settings = HeldOutSettings(**HELD_OUT, kinds=("items", "Items ", "ends_with"))
    assert settings.kinds == ("ends_with", "items") and settings.most_answers() == 24
    # Of 12 steps: at 0, 4, 8 and 12; of 13 at 13 too.
    assert settings.num_evaluations(12) == 4 and settings.num_evaluations(13) == 5
    # In batches of three steps: at 0, 6, 12 and 13; with a warm-up of six at 0, 12 and 13.
    assert settings.every(3) == 6 and settings.num_evaluations(13, 3) == 4 and settings.num_evaluations(13, 3, 6) == 3
    assert settings.num_evaluations(1) == 2


def test_every_field_is_in_the_key() -> None:
    base: dict[str, Any] = {"held_out": FALL | {"kinds": ["items"]}}
    changed = [
        {"held_out": base["held_out"] | change}
        for change in (
            {"num_prompts": 9}, {"num_samples": 1}, {"every_steps": 8}, {"kinds": ["ends_with"]}, {"max_drop": 0.1},
            {"max_kinds_drop": 0.1},
        )
    ]  # fmt: skip
    every = [base, *changed, base | {"keep": "best"}, {}]
    keys = [json.dumps(scientific(RLVRSettings.model_validate(SETTINGS | one)), sort_keys=True) for one in every]
    assert len(set(keys)) == len(every) and "held_out" not in keys[-1] and "keep" not in keys[-1]


# --- In a training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLVRInputs:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def looked(inputs: RLVRInputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(inputs, tmp_path_factory.mktemp("looked"), {"held_out": HELD_OUT, "keep": "best"})


def accuracies(made: Run) -> dict[int, float]:
    return {one["step"]: one["held_out/accuracy"] for one in made.log("history") if "held_out/accuracy" in one}


def test_ppo_answers_before_on_the_way_and_at_the_end(looked: Run) -> None:
    found = accuracies(looked)
    assert list(found) == [0, 4, 8, 12]
    lines = looked.log("held_out")
    assert [line["step"] for line in lines] == [0, 4, 8, 12] and all(len(line["prompts"]) == 4 for line in lines)
    trained = [line for one in looked.log("prompts") for line in one["rows"]]
    assert max(trained) < 16, "of twenty rows sixteen are trained on"
    every = [one for one in looked.log("history") if "loss" in one]
    assert [one["step"] for one in every] == list(range(1, 13)), "no log is lost to a look"
    kept = looked.outputs.held_out.kept
    assert kept.accuracy == max(found.values()) == looked.metrics["held_out/accuracy"]
    assert kept.step == min(step for step, value in found.items() if value == kept.accuracy)
    assert (
        looked.metrics["kept_step"] == kept.step and f"the weights of step {kept.step}" in looked.outputs.held_out.why
    )


def test_a_look_changes_no_weight(inputs: RLVRInputs, looked: Run, tmp_path: Path) -> None:
    """keep last, asked after every batch, and after the last only: the same end; and what is kept is of its step."""
    often = run(inputs, tmp_path / "often", {"held_out": HELD_OUT | {"every_steps": 1}}, save_total_limit=9)
    seldom = run(inputs, tmp_path / "seldom", {"held_out": HELD_OUT | {"every_steps": 12}})
    assert differing(often.policy, seldom.policy) == differing(often.critic, seldom.critic) == []
    assert list(accuracies(often)) == [0, 4, 8, 12] and list(accuracies(seldom)) == [0, 12], "batches of four steps"
    assert accuracies(often) == accuracies(looked)
    step = looked.outputs.held_out.kept.step
    if step:
        saved = tmp_path / "often" / "work" / "checkpoints" / f"checkpoint-{step}"
        assert differing(looked.policy, weights_of_checkpoint(saved)) == []
        assert differing(looked.critic, weights_of_checkpoint(saved, "critic")) == []


def make_up(monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[int], float]) -> None:
    """Have the answers be as right as `accuracy` says of their step."""
    from smoltulu.tasks.training import held_out

    real = held_out.HeldOut._answer

    def answer(self: Any, step: int) -> Evaluation:
        made = real(self, step)
        return Evaluation(step, dict.fromkeys(made.prompts, accuracy(step)), {}, 1.0, 3.0)

    monkeypatch.setattr(held_out.HeldOut, "_answer", answer)


@pytest.mark.parametrize("best_step", [0, 4, 12])
def test_the_best_is_kept_with_its_critic_whatever_is_pruned(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_step: int
) -> None:
    """Accuracy is made up, so that it is highest after `best_step`; one checkpoint is kept."""
    make_up(monkeypatch, lambda step: float(step == best_step))
    settings = {"held_out": HELD_OUT | {"every_steps": 1}, "keep": "best"}
    made = run(inputs, tmp_path / "best", settings, save_total_limit=1)
    assert made.outputs.held_out.kept.step == best_step and made.outputs.num_steps == 12
    last = run(inputs, tmp_path / "last", settings | {"keep": "last"}, save_total_limit=9)
    if best_step:
        saved = tmp_path / "last" / "work" / "checkpoints" / f"checkpoint-{best_step}"
        policy, critic = (weights_of_checkpoint(saved, who) for who in ("model", "critic"))
    else:
        assert "those that the run started from" in made.outputs.held_out.why
        starts = (inputs.model, str(inputs.reward_model))
        policy, critic = (load_file(Path(folder) / "model.safetensors") for folder in starts)
    assert differing(made.policy, policy) == differing(made.critic, critic) == []
    assert (differing(made.policy, last.policy) == []) == (best_step == 12)
    folders = [path.name for path in (tmp_path / "best" / "work" / "best").iterdir()]
    assert f"step-{best_step}" in folders and len(folders) <= 2


def test_best_weights_that_are_gone_are_missed_before_training_goes_on(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is of step 4. From its own checkpoint it is written again; from a later one no step is made."""
    make_up(monkeypatch, {0: 0.1, 4: 0.5, 8: 0.2, 12: 0.3}.__getitem__)
    settings = {"held_out": HELD_OUT, "keep": "best"}
    whole = run(inputs, tmp_path, settings, save_steps=4, save_total_limit=3)
    checkpoints = tmp_path / "work" / "checkpoints"
    for name in ("work/best", "out", "work/checkpoints/checkpoint-12"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(ValueError, match=r"the weights of step 4, the best by held-out accuracy, are damaged"):
        run(inputs, tmp_path, settings, save_steps=4, save_total_limit=3)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    shutil.rmtree(checkpoints / "checkpoint-8")
    again = run(inputs, tmp_path, settings, save_steps=4, save_total_limit=3)
    assert differing(whole.policy, again.policy) == differing(whole.critic, again.critic) == []


FALLING = {0: 0.75, 4: 1.0, 8: 0.25, 12: 0.25, 16: 0.25}


def test_a_run_that_falls_fails_where_the_last_weights_would_be_kept(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, FALLING.__getitem__)
    settings = {"held_out": FALL, "num_episodes": 40}
    with pytest.raises(
        ValueError, match=r"at step 12 accuracy on held-out prompts fell by 0\.500 from 0\.750"
    ) as caught:
        run(inputs, tmp_path, settings)
    assert "the run would end here with the weights of step 4, whose accuracy is 1.000" in str(caught.value)
    assert not (tmp_path / "out" / "model").exists()


def test_a_run_that_falls_ends_with_the_best_weights(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, FALLING.__getitem__)
    settings = {"held_out": FALL, "num_episodes": 40, "keep": "best"}
    made = run(inputs, tmp_path, settings, save_steps=100)
    assert made.outputs.num_steps == 12 and made.outputs.held_out.kept.step == 4
    assert made.outputs.held_out.ended_early.startswith("at step 12 accuracy on held-out prompts fell by 0.500")
    # A kill before the artifact was whole: it goes on from the checkpoint of the end, and trains nothing.
    shutil.rmtree(tmp_path / "out")
    again = run(inputs, tmp_path, settings, save_steps=100)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "12\n"
    assert again.outputs.held_out == made.outputs.held_out and again.outputs.num_steps == 12
    assert differing(made.policy, again.policy) == differing(made.critic, again.critic) == []
    assert again.log("held_out") == made.log("held_out")


def test_grpo_ends_with_the_best_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch, lambda step: {0: 0.5, 1: 1.0}.get(step, 0.0))
    model = build_tiny_model(tmp_path / "model")
    settings = {"num_steps": 8, "keep": "best", "held_out": FALL | {"every_steps": 1}}
    config, inputs, context = arguments_of(tmp_path, model, settings, prompts(20), save_steps=1, save_total_limit=1)
    weights = []
    for _ in range(2):
        outputs, metrics = train_rlvr(config, RLVRInputs(**inputs.model_dump()), context)
        assert outputs.num_steps == 3 and outputs.held_out.kept.step == 1 and metrics["kept_step"] == 1
        weights.append(load_file(tmp_path / "out" / "model" / "model.safetensors"))
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "3\n" and differing(*weights) == []


def test_of_an_adapter_the_best_is_kept_too(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda step: float(step == 4))
    settings = {"held_out": HELD_OUT, "keep": "best", "lora": {"r": 4}}
    best = run(inputs, tmp_path / "best", settings, save_total_limit=9)
    last = run(inputs, tmp_path / "last", settings | {"keep": "last"})
    saved = weights_of_checkpoint(tmp_path / "best" / "work" / "checkpoints" / "checkpoint-4")
    kept = load_file(tmp_path / "best" / "out" / "adapter" / "adapter_model.safetensors")
    assert differing(kept, {name.replace(".default.", "."): one for name, one in saved.items()}) == []
    assert differing(best.policy, last.policy) != []


def test_no_answer_is_asked_while_the_critic_is_alone(inputs: RLVRInputs, tmp_path: Path) -> None:
    made = run(inputs, tmp_path, {"held_out": HELD_OUT | {"every_steps": 1}, "critic": {"warmup_steps": 5}})
    assert list(accuracies(made)) == [0, 8, 12]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_grpo_and_rloo_are_measured_the_same_way(tmp_path: Path, algorithm: str) -> None:
    """Same seed and rows as another algorithm: the same prompts, and the same answers of the starting model."""
    model = build_tiny_model(tmp_path / "model")
    rows = prompts(20)

    def go(name: str, changes: dict[str, Any]) -> tuple[Any, Path]:
        settings = {"algorithm": algorithm, "num_steps": 4, "steps_per_generation": 2, "held_out": HELD_OUT} | changes
        config, inputs, context = arguments_of(tmp_path / name, model, settings, rows, save_steps=2)
        outputs, _ = train_rlvr(config, RLVRInputs(**inputs.model_dump()), context)
        return outputs, tmp_path / name

    outputs, folder = go("one", {"held_out": HELD_OUT | {"every_steps": 1}})
    _, seldom = go("two", {})
    weights = [load_file(one / "out" / "model" / "model.safetensors") for one in (folder, seldom)]
    assert differing(*weights) == [], "its sampling draws from torch's random numbers, which a look must not touch"
    history = [json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()]
    assert [one["step"] for one in history if "held_out/accuracy" in one] == [0, 2, 4]
    assert [one["step"] for one in history if "loss" in one] == [1, 2, 3, 4]
    ppo = {**SETTINGS, "critic": {"initial": "policy"}, "num_episodes": 8, "held_out": HELD_OUT, "reward_correct": 1.0}
    ppo |= {"non_stop_reward": None}
    _, inputs, context = arguments_of(tmp_path / "ppo", model, {}, rows)
    other, _ = train_rlvr(PPOSettings.model_validate(ppo), RLVRInputs(**inputs.model_dump()), context)
    assert other.held_out.start == outputs.held_out.start
    shutil.rmtree(tmp_path / "ppo")


def test_held_out_rows_are_cut_before_pools(tmp_path: Path, inputs: RLVRInputs) -> None:
    from smoltulu.tasks.training.audited import rows_to_train
    from tests.small_ppo import context

    config = PPOSettings.model_validate(SETTINGS | {"held_out": HELD_OUT})
    taken, split = rows_to_train(config, inputs, context(tmp_path))
    every = read_rows(Path(inputs.dataset))
    assert split is not None and [one["id"] for one in read_rows(Path(taken.dataset))] == [
        every[line]["id"] for line in split.trained
    ]
    assert torch.tensor(split.trained).numel() == 16
    crowded = PPOSettings.model_validate(SETTINGS | {"held_out": HELD_OUT | {"num_prompts": 14}})
    with pytest.raises(ValueError, match=r"held_out leaves 6 of 20 rows to train on, and a batch .* 8 different"):
        rows_to_train(crowded, inputs, context(tmp_path))
