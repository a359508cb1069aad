"""Micro-batches by tokens: how a step is cut, and that the cut changes no loss, no weight and no row of a step."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError
from safetensors.torch import load_file

import smoltulu.tasks.engine.launch
from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings, StageCompute
from smoltulu.tasks.engine.child import OUT_OF_MEMORY_FILE
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.even_rows import is_blank
from smoltulu.tasks.trainer.token_budget import (
    CutStep,
    StepCollator,
    TokenBudget,
    batch_cost,
    budget_of,
    costliest,
    micro_batches,
    row_cost,
    row_costs,
)
from tests.small_runs import FUNCTIONS, MODULES, conversations, pairs, run, stage_arguments, trainer_of, two_processes
from tests.tasks.trainer.test_guards import rows_with_a_bad_one, with_a_poisonous_token
from tests.tasks.training.test_selection_weights import arguments, uneven
from tests.tasks.training.test_selection_weights import trained as trained_with_weights
from tests.tiny_model import build_tiny_experts, build_tiny_model

STAGE_NAMES = ("sft", "reward_model", "dpo")
#: 13 rows in steps of 4: the last of an epoch has one. A row has 17 to 60 tokens, so 1: every row alone; 150: some rows
#: a micro-batch; a million: a step.
NUM_ROWS, BUDGETS = 13, (1, 150, 10**6)
SETTINGS: dict[str, Any] = {"effective_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3}
#: Measured, or counted in micro-batches by transformers.
OTHER = {"tokens_per_second", "peak_memory_gb", "epoch"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def rows_of_stage(stage: str, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    # The first pair has the same answer twice.
    return conversations(count) if stage == "sft" else pairs(count + 1)[1:]


def one_is_enough(stage: str) -> list[Any]:
    """The stages, the others marked slow."""
    return [pytest.param(one, marks=[] if one == stage else pytest.mark.slow) for one in STAGE_NAMES]


# ------------------------------------------------------------------------------------------------------------- the cut


def test_micro_batches_by_hand() -> None:
    costs = [5, 3, 2, 9, 1, 4, 4]
    # 5 + 3 | 2 | 9 alone, though above 8 | 1 + 4 | 4, in their order.
    assert micro_batches(costs, 8, packing=True) == [[0, 1], [2], [3], [4, 5], [6]]
    # Longest first: 9 | 5 | 4 4 | 3 2 (2 x 3; a third row makes 9) | 1.
    assert micro_batches(costs, 8, packing=False) == [[3], [0], [5, 6], [1, 2], [4]]
    assert micro_batches(costs, 28, packing=True) == [list(range(7))] and micro_batches([], 8, packing=True) == []
    assert micro_batches(costs, 63, packing=False) == [[3, 0, 5, 6, 1, 2, 4]], "7 rows of 9 places"
    assert [batch_cost([5, 3, 2], packing) for packing in (True, False)] == [10, 15]


COSTS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 130), st.booleans())
def test_every_row_once_in_order_and_none_above_the_budget_unless_alone(
    costs: list[int], budget: int, packing: bool
) -> None:
    made = micro_batches(costs, budget, packing)
    order = [place for several in made for place in several]
    assert sorted(order) == list(range(len(costs)))
    assert order == sorted(order, key=lambda place: (0 if packing else -costs[place], place))
    for several in made:
        assert len(several) == 1 or batch_cost([costs[place] for place in several], packing) <= budget
    for one, other in pairwise(made):  # the next row had no room
        assert batch_cost([costs[place] for place in (*one, other[0])], packing) > budget


@given(COSTS, st.integers(1, 130), st.booleans(), st.integers(1, 5), st.integers(1, 9))
def test_ranks_make_equally_many_with_blanks_behind_the_rows(
    costs: list[int], budget: int, packing: bool, num_ranks: int, rows_of_rank: int
) -> None:
    """As the loader deals them: in every step each rank takes the next rows, and those that are none are blanks."""
    per_step = num_ranks * rows_of_rank
    seen = []
    for start in range(0, len(costs), per_step):
        places = range(start, min(start + per_step, len(costs)))
        dealt = [places[rank * rows_of_rank : (rank + 1) * rows_of_rank] for rank in range(num_ranks)]
        collate = StepCollator(lambda rows: {"rows": rows}, TokenBudget(budget, packing))
        cut = [collate([{"input_ids": [place] * costs[place]} for place in own]) for own in dealt]
        most = max(map(len, cut))
        assert 1 <= most <= rows_of_rank
        seen += [row["input_ids"][0] for own in cut for batch in own for row in batch["rows"]]
        # A rank without rows has one batch, of no row, which the blank collator fills.
        assert all(len(own) == 1 and not own[0]["rows"] for own, given in zip(cut, dealt, strict=True) if not given)
    assert sorted(seen) == list(range(len(costs)))


def test_costs_of_rows_are_lengths() -> None:
    row = {"prompt_ids": [1] * 5, "chosen_ids": [1] * 2, "rejected_ids": [1] * 4}
    assert row_cost({"input_ids": [1, 2, 3]}, packing=True) == row_cost({"input_ids": [1, 2, 3]}, packing=False) == 3
    assert (row_cost(row, packing=True), row_cost(row, packing=False)) == (11, 18)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("packing", [True, False])
def test_a_budget_counts_the_tokens_that_the_model_computes(
    base: Path, tmp_path: Path, stage: str, packing: bool
) -> None:
    trainer = trainer_of(stage, tmp_path, base, rows_of_stage(stage), SETTINGS, packing=packing, tokens_per_device=1)
    dataset = trainer.train_dataset
    costs = row_costs(dataset.data, packing)
    assert costs == [row_cost(row, packing) for row in dataset] and len(set(costs)) > 3
    for places in ([0], [3, 1, 4]):
        batch = trainer.data_collator([dataset[place] for place in places])
        # DPO leaves out the last token of every completion, and packed begins the second with the prompt's last.
        left_out = {True: 1, False: 2}[packing] * len(places) if stage == "dpo" else 0
        assert batch["input_ids"].numel() == batch_cost([costs[place] for place in places], packing) - left_out


def test_auto_is_as_many_tokens_as_the_longest_rows_of_a_fixed_batch() -> None:
    costs = [3, 9, 4, 8]

    def budget(**compute: Any) -> int:
        return budget_of(ComputeSettings(tokens_per_device="auto", **compute), costs)

    assert budget(per_device_train_batch_size=2) == 17 and budget(per_device_train_batch_size=9) == 24
    assert budget(per_device_train_batch_size=3, packing=False) == 27
    assert budget_of(ComputeSettings(tokens_per_device=7), costs) == 7
    assert budget_of(ComputeSettings(tokens_per_device="auto"), []) == 1


def test_the_costliest_micro_batch_of_a_budget_by_hand() -> None:
    costs = [3, 9, 4, 8, 1]
    assert costliest(costs, 20, 9, packing=True) == [1, 3, 0]  # 9 + 8, no room for 4, then 3
    assert costliest(costs, 20, 2, packing=True) == [1, 3] and costliest(costs, 5, 9, packing=True) == [1]
    assert costliest(costs, 18, 9, packing=False) == [1, 3]  # 2 x 9
    assert costliest(costs, 16, 9, packing=False) == [3, 2]  # 2 x 8 is more than 1 x 9 and 3 x 4
    assert costliest(costs, 16, 1, packing=False) == [1]
    assert costliest([], 20, 9, packing=True) == costliest([], 20, 9, packing=False) == []


@given(COSTS, st.integers(1, 130), st.booleans(), st.integers(1, 9))
def test_no_micro_batch_of_the_budget_is_costlier_by_a_whole_row(
    costs: list[int], budget: int, packing: bool, most: int
) -> None:
    chosen = costliest(costs, budget, most, packing)
    cost = batch_cost([costs[place] for place in chosen], packing)
    assert len(set(chosen)) == len(chosen) <= most and (cost <= budget or len(chosen) == 1)
    for start in range(len(costs)):
        several = micro_batches(costs[start : start + most], budget, packing)
        of_cut = max(batch_cost([costs[start + place] for place in one], packing) for one in several)
        assert of_cut < cost + max(costs) if packing else of_cut <= cost


# ------------------------------------------------------------------------------------------------- nothing else changes


@dataclass(frozen=True)
class Trained:
    """What was logged, the weights at the end, and the rows of every step, of each of its micro-batches."""

    history: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    steps: list[list[list[int]]]


def trained(stage: str, stage_arguments: Any, seed: int, **compute: Any) -> Trained:
    """By the stage's own trainer. Nothing is saved."""
    config, inputs, context = stage_arguments
    machines = context.compute.model_copy(update=compute)
    settings = config.model_copy(update={"seed": seed})
    trainer = MODULES[stage].build(
        settings, inputs, type(context)(context.folder, context.work, machines, context.report)
    )
    trainer.args.save_strategy = "no"
    steps: list[list[list[int]]] = []
    samples = trainer.get_batch_samples

    def get_batch_samples(*args: Any) -> Any:
        batches, num_items = samples(*args)
        each = [one for batch in batches for one in (batch if isinstance(batch, CutStep) else [batch])]
        steps.append([[] if is_blank(batch) else batch["row"].tolist() for batch in each])
        return batches, num_items

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    history = [{name: entry[name] for name in entry.keys() - OTHER} for entry in trainer.state.log_history[:-1]]
    return Trained(history, {name: value.detach() for name, value in trainer.model.named_parameters()}, steps)


def flat(step: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(step))


def assert_same(found: Trained, fixed: Trained) -> None:
    """Loss to 1e-5 a step, weights to 1e-4, the rows of each step."""
    assert len(found.history) == len(fixed.history) == 8
    for one, other in zip(found.history, fixed.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["num_tokens"] == other["num_tokens"]
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    for name, value in fixed.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=1e-4)
    for cut, whole in zip(found.steps, fixed.steps, strict=True):
        assert sorted(flat(cut)) == sorted(flat(whole))


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_no_budget_changes_a_loss_or_a_weight(base: Path, tmp_path: Path, stage: str) -> None:
    """Two seeds, one packed and one padded; fixed rows and three budgets each."""
    made = stage_arguments(stage, tmp_path, base, rows_of_stage(stage), SETTINGS)
    before = load_file(base / "model.safetensors")
    for seed, packing in ((1, True), (2, False)):
        fixed = trained(stage, made, seed, packing=packing)
        assert (
            max(float((value - before[name]).abs().max()) for name, value in fixed.weights.items() if name in before)
            > 1e-3
        )
        sizes = set()
        for budget in BUDGETS:
            found = trained(stage, made, seed, packing=packing, tokens_per_device=budget)
            assert_same(found, fixed)
            sizes.add(tuple(map(len, found.steps)))
            if packing:
                assert [flat(step) for step in found.steps] == [flat(step) for step in fixed.steps]
        assert len(sizes) == 3 and tuple([4, 4, 4, 1] * 2) in sizes and (1,) * 8 in sizes


def test_the_loss_of_experts_is_a_mean_over_the_micro_batches_of_a_budget(tmp_path: Path) -> None:
    """A budget that cuts into single rows is the training by single rows."""
    made = stage_arguments(
        "sft", tmp_path, build_tiny_experts(tmp_path / "base"), rows_of_stage("sft"), SETTINGS | {"num_train_epochs": 1}
    )
    fixed, found = (
        trained("sft", made, 1, packing=True, **way)
        for way in ({"per_device_train_batch_size": 1}, {"tokens_per_device": 1})
    )
    assert [flat(step) for step in found.steps] == [flat(step) for step in fixed.steps]
    for one, other in zip(found.history, fixed.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5) and one["aux_loss"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_no_budget_changes_a_loss_or_a_weight_of_any_seed_packed_or_padded(
    base: Path, tmp_path: Path, stage: str
) -> None:
    made = stage_arguments(stage, tmp_path, base, rows_of_stage(stage), SETTINGS)
    for seed, packing in product((1, 2), (True, False)):
        fixed = trained(stage, made, seed, packing=packing)
        for budget in (*BUDGETS, "auto"):
            assert_same(trained(stage, made, seed, packing=packing, tokens_per_device=budget), fixed)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_no_budget_changes_anything_with_weights_of_rows(base: Path, tmp_path: Path, packing: bool) -> None:
    """Rows and spans of other weights, two rows of none; at a budget of 1 these are blank micro-batches."""
    made = arguments(tmp_path, base, uneven)
    fixed = trained("sft", made, 5, packing=packing)
    for budget in (1, 150):
        found = trained("sft", made, 5, packing=packing, tokens_per_device=budget)
        assert_same(found, fixed)
        assert budget > 1 or any([] in step for step in found.steps)
    plain = trained("sft", arguments(tmp_path / "plain", base, None), 5, packing=packing, tokens_per_device=150)
    assert abs(plain.history[0]["loss"] - fixed.history[0]["loss"]) > 1e-3


@pytest.mark.slow  # through the launcher; the other stages: tests/tasks/trainer/test_sharded.py
def test_two_ranks_train_as_one_with_a_budget(base: Path, tmp_path: Path) -> None:
    """11 rows in steps of 6: each rank takes three rows, and of the last five the second takes two.

    The ranks cut their rows into different numbers of micro-batches, so one of them has blank ones.
    """
    stage = "dpo"
    rows, settings = rows_of_stage(stage, 11), SETTINGS | {"effective_batch_size": 6}
    fixed = run(stage, tmp_path / "one", base, rows, settings, per_device_train_batch_size=2, save_steps=100)
    two = two_processes(stage, tmp_path, base, rows, settings, tokens_per_device=110, save_steps=100)("two")
    logged = [json.loads(line) for line in (two / "output" / "logs" / "history.jsonl").open()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for expected, found in zip(fixed.history, logged, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        for name in expected.keys() - OTHER:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
        assert found["num_tokens"] == expected["num_tokens"]
    for name, value in load_file(fixed.model / "model.safetensors").items():
        other = load_file(two / "output" / "model" / "model.safetensors")[name]
        torch.testing.assert_close(other, value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one_with_a_budget_and_weights(base: Path, tmp_path: Path) -> None:
    stage = arguments(tmp_path / "one", base, uneven, settings=SETTINGS)
    history, weights = trained_with_weights(*stage)
    two = two_processes(
        "sft", tmp_path, base, conversations(14), SETTINGS, weights=stage[1].weights, tokens_per_device=90
    )("two")
    logged = [json.loads(line) for line in (two / "output" / "logs" / "history.jsonl").open()]
    assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in history], abs=1e-5)
    for name, value in load_file(two / "output" / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_rank_with_fewer_micro_batches_of_a_budget_adds_blank_ones(
    base: Path, tmp_path: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("sft", tmp_path, base, rows_of_stage("sft"), SETTINGS, tokens_per_device=10**6)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", num_ranks)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, own * 0 + 3]))
    batches = StepCollator(trainer.data_collator, trainer.token_budget)([trainer.train_dataset[0]])
    (step,), num_items = trainer.get_batch_samples(iter([batches]), 1, torch.device("cpu"))
    assert [is_blank(batch) for batch in step] == [False, True, True]
    assert int(num_items) % int((batches[0]["labels"][:, 1:] != -100).sum()) == 0 and num_items > 0


@pytest.mark.parametrize("stage", one_is_enough("sft"))
def test_a_resume_goes_on_bit_for_bit_and_to_the_same_with_another_budget(
    base: Path, tmp_path: Path, stage: str
) -> None:
    """Killed while it wrote its last checkpoint, a training goes on from step 3 of 4 of the first epoch."""
    kept = {"save_steps": 3, "save_total_limit": 9}
    config, inputs, context = stage_arguments(
        stage, tmp_path, base, rows_of_stage(stage), SETTINGS, tokens_per_device=120, **kept
    )
    FUNCTIONS[stage](config, inputs, context)
    weights = load_file(context.folder / "model" / "model.safetensors")
    for number, compute in enumerate(({}, {"tokens_per_device": 40}, {"tokens_per_device": "none"})):
        again = tmp_path / str(number)
        shutil.copytree(context.work, again / "work")
        for step in (6, 8):
            (again / "work" / "checkpoints" / f"checkpoint-{step}" / CHECKPOINT_MARKER).unlink()
        (again / "out").mkdir()
        machines = context.compute.model_copy(update=compute)
        FUNCTIONS[stage](config, inputs, replace(context, folder=again / "out", work=again / "work", compute=machines))
        assert (again / "work" / "resumed.jsonl").read_text() == "3\n"
        resumed = load_file(again / "out" / "model" / "model.safetensors")
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0 if not compute else 1e-4)


def test_held_out_rows_go_by_the_budget_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for budget in ("none", 100):
        config, inputs, context = stage_arguments(
            "sft", tmp_path / str(budget), base, conversations(4), SETTINGS | {"max_steps": 1}, save_steps=100,
            held_out=conversations(9)[4:], tokens_per_device=budget,
        )  # fmt: skip
        sizes: list[int] = []
        losses_of = MODULES["sft"].row_losses

        def row_losses(model: Any, batch: Any, rows: Any, sizes: list[int] = sizes, losses_of: Any = losses_of) -> Any:
            sizes.append(batch["input_ids"].shape[1])
            return losses_of(model, batch, rows)

        with monkeypatch.context() as patch:
            patch.setattr(MODULES["sft"], "row_losses", row_losses)
            outputs, _ = FUNCTIONS["sft"](config, inputs, context)
        lengths = [len(row["input_ids"]) for row in parquet.read_table(inputs.held_out).to_pylist()]
        found.append([one.loss for one in outputs.held_out_loss.losses])
    assert sum(sizes) == 2 * sum(lengths) and max(sizes) <= max(100, *lengths) and len(sizes) < 2 * len(lengths)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("setting", "asked", "sizes"),
    [
        ("tokens_per_device", 301, [301, 150, 75]),
        ("tokens_per_device", 10**6, [10**6, 200, 100]),  # the micro-batch had 400
        ("per_device_train_batch_size", 4, [4, 2]),
    ],
)
def test_out_of_memory_halves_the_budget_and_remembers_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    setting: str, asked: int, sizes: list[int],
) -> None:  # fmt: skip
    """`auto` is made of the fixed batch, and is halved with it."""
    tried: list[int] = []

    def run_once(asked: Job, compute: ComputeSettings, *_: Any) -> str | None:
        tried.append(getattr(compute, setting))
        said = {"message": ""} | ({"num_tokens": 400} if tried[-1] == 10**6 else {})
        (tmp_path / OUT_OF_MEMORY_FILE).write_text(json.dumps(said))
        return "CUDA out of memory" if tried[-1] > sizes[-1] else None

    monkeypatch.setattr(smoltulu.tasks.engine.launch, "_run_once", run_once)
    compute = {"tokens_per_device": "auto"} | {setting: asked}
    config, inputs, context = stage_arguments("sft", tmp_path, base, rows_of_stage("sft"), SETTINGS, **compute)
    spec = Spec(stage="sft", version=1, config=scientific(config), inputs={}, externals={})
    job = Job("sft", STAGES["sft"], config, context.compute, spec, inputs)
    (tmp_path / "output").mkdir()
    with caplog.at_level(logging.INFO, "test"):
        for _ in range(2):
            run_child(job, tmp_path, tmp_path / "output", logging.getLogger("test"))
    assert tried == [*sizes, sizes[-1]]
    assert f"out of memory with {setting} {asked}: goes on with {sizes[1]}, same effective batch" in caplog.text
    assert f"begins with {setting} {sizes[-1]}, which fitted into memory before" in caplog.text


def test_one_row_without_memory_is_an_error_that_no_smaller_budget_is_tried_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_step(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof")

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    several = trainer_of("sft", tmp_path / "several", base, rows_of_stage("sft"), SETTINGS, tokens_per_device=10**6)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        several.train()
    assert 2 < raised.value.num_tokens < 4000  # of the micro-batch, from which the budget is halved
    alone = trainer_of("sft", tmp_path / "alone", base, rows_of_stage("sft"), SETTINGS, tokens_per_device=1)
    said = r"out of memory with one row alone \(row \d+\), .*activation_checkpointing, .* It said: CUDA out .* 2 GiB$"
    with pytest.raises(ValueError, match=said):
        alone.train()


def test_a_bad_row_is_named_without_the_others_of_its_step(base: Path, tmp_path: Path) -> None:
    model, settings = with_a_poisonous_token(base, tmp_path / "model", "~"), SETTINGS | {"effective_batch_size": 12}
    with pytest.raises(ValueError, match=r"loss is nan at step 1; .* Its rows: row 5 ") as raised:
        run("sft", tmp_path, model, rows_with_a_bad_one(5), settings, tokens_per_device=1)
    assert str(raised.value).count("row ") == 1


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", "4096", [512], {}, float("inf")])
@pytest.mark.parametrize("kind", [ComputeSettings, StageCompute])
def test_bad_budgets_are_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValidationError, match="allowed are auto, none, or a whole number of tokens above 0") as caught:
        kind(tokens_per_device=value)
    assert caught.value.error_count() == 1 and "tokens_per_device" in str(caught.value)


def test_a_recipe_with_a_bad_budget_says_what_is_allowed() -> None:
    with pytest.raises(RecipeError, match=r"compute\.tokens_per_device.* is -5; allowed are auto, none, or"):
        load_recipe("tiny", {"compute.tokens_per_device": -5})


def test_a_budget_of_one_stage_and_null() -> None:
    compute = ComputeSettings(tokens_per_device="auto", stages={"dpo": StageCompute(tokens_per_device="none")})
    assert compute.of("dpo").tokens_per_device == "none" and compute.of("sft").tokens_per_device == "auto"
    assert ComputeSettings(tokens_per_device=None).tokens_per_device == "none" and not ComputeSettings().by_tokens
    assert StageCompute(tokens_per_device=None).tokens_per_device is None


def test_a_budget_enters_no_key_and_rlvr_says_that_it_has_none() -> None:
    plain, asked = load_recipe("tiny"), load_recipe("tiny", {"compute.tokens_per_device": 4096})
    assert plain.batch_notes() == []
    configs = [{name: scientific(node.config) for name, node in Graph(one).nodes.items()} for one in (plain, asked)]
    assert configs[0] == configs[1]
    (note,) = asked.batch_notes()
    assert note.startswith("rlvr: compute.tokens_per_device 4096 does nothing here")
    silent = {"compute.tokens_per_device": 4096, "compute.stages.rlvr.tokens_per_device": "none"}
    assert load_recipe("tiny", silent).batch_notes() == []


def test_a_budget_with_processes_that_do_not_divide_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="effective_batch_size 4 is not a multiple of num_processes 3"):
        trainer_of("sft", tmp_path, base, rows_of_stage("sft"), SETTINGS, num_processes=3, tokens_per_device=100)
