"""Learning-rate schedules: hand-computed tables, transformers' own beside ours, properties, keys, and the trainer."""

from __future__ import annotations

import json
import math
import shutil
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from transformers import get_scheduler

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.schemas.common import StrictModel, science, scientific
from smoltulu.schemas.schedules import (
    SCHEDULE_KINDS,
    Budgets,
    ConstantSchedule,
    CosineSchedule,
    CyclicCosineSchedule,
    DecayShape,
    FinalDecay,
    LinearSchedule,
    PowerSchedule,
    ScheduleSettings,
    WSDSchedule,
    WSDSSchedule,
)
from smoltulu.schemas.training import SFTSettings
from smoltulu.tasks.trainer.schedules import decay, learning_rate_factor, power
from tests.golden_keys import made_up_commit
from tests.tasks.trainer import test_training as training

SHAPES: tuple[DecayShape, ...] = get_args(DecayShape)


def factors(schedule: Any, num_steps: int, until: int | None = None, tokens_per_step: int = 0) -> list[float]:
    steps = range(num_steps if until is None else until)
    return [learning_rate_factor(schedule, step, num_steps, step * tokens_per_step) for step in steps]


def near(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-6)


# --- Hand-computed tables ---------------------------------------------------------------------------------------------


def test_linear_by_hand() -> None:
    schedule = LinearSchedule(warmup_steps=2, min_lr_ratio=0.2)
    expected = [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2]
    assert factors(schedule, 10, until=13) == near(expected)
    assert factors(LinearSchedule(), 4) == near([1, 0.75, 0.5, 0.25])


def test_cosine_by_hand() -> None:
    expected = [1, 0.853553, 0.5, 0.146447, 0, 0]
    assert factors(CosineSchedule(), 4, until=6) == near(expected)
    assert factors(CosineSchedule(min_lr_ratio=0.1, warmup_steps=1), 5) == near([1, 1, 0.868198, 0.55, 0.231802])


def test_constant_by_hand() -> None:
    assert factors(ConstantSchedule(), 3, until=5) == [1.0] * 5
    assert factors(ConstantSchedule(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cyclic_cosine_by_hand() -> None:
    schedule = CyclicCosineSchedule(budgets=(5, 9), warmup_steps=1, min_lr_ratio=0.1)
    cycle = [1, 0.868198, 0.55, 0.231802]
    assert factors(schedule, 9, until=11) == near([1, *cycle, *cycle, 0.1, 0.1])


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"decay_shape": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"decay_shape": "cosine", "min_lr_ratio": 0.2}, [1, 0.882843, 0.6, 0.317157, 0.2]),
        ({"decay_shape": "1-sqrt", "min_lr_ratio": 0.2}, [1, 0.6, 0.434315, 0.307180, 0.2]),
        ({"decay_shape": "inverse", "min_lr_ratio": 0.2}, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        ({"decay_shape": "half-life", "half_life_steps": 2}, [1, 0.707107, 0.5, 0.353553, 0.25]),
        ({"decay_shape": "half-life", "half_life_steps": 1, "min_lr_ratio": 0.2}, [1, 0.5, 0.25, 0.2, 0.2]),
        ({"decay_shape": "exponential"}, [1, 0.650068, 0.377541, 0.165296, 0]),
        ({"decay_shape": "exponential", "min_lr_ratio": 0.5}, [1, 0.825034, 0.688770, 0.582648, 0.5]),
    ],
)
def test_wsd_by_hand(given_: dict[str, Any], expected: list[float]) -> None:
    schedule = WSDSchedule(decay_steps=4, warmup_steps=2, **given_)
    # Warm-up of 2, stable for 3, decay of 4; the fifth value of the decay would be that of the step after the last.
    assert factors(schedule, 9, until=11) == near([0.5, 1, 1, 1, 1, *expected, expected[-1]])


def test_wsd_s_by_hand() -> None:
    # f(p) = 1 / (10 p + 1 - p) = 1 / (1 + 9 p); 20 % of 10 and of 20.
    schedule = WSDSSchedule(budgets=(10, 20), decay_ratio=0.2, warmup_steps=2)
    assert schedule.decay_lengths() == (2, 4)
    first = [0.5, *[1] * 8, 1 / 5.5]
    second = [*[1] * 7, 1 / 3.25, 1 / 5.5, 1 / 7.75]
    assert factors(schedule, 20, until=22) == near([*first, *second, 0.1, 0.1])
    period = WSDSSchedule(budgets=(10, 20), decay_ratio=0.2, warmup_steps=2, decay_base="period")
    assert period.decay_lengths() == (2, 2)
    assert factors(period, 20) == near([*first, *[1] * 9, 1 / 5.5])


def test_power_by_hand() -> None:
    schedule = PowerSchedule(anchor_tokens=100, exponent=-0.5, decay_steps=2, warmup_steps=2, decay_shape="linear")
    tokens = [0, 60, 100, 400, 2500, 10_000, 10_000]
    found = [learning_rate_factor(schedule, step, 6, n) for step, n in enumerate(tokens)]
    assert found == near([0.5, 1, 1, 0.5, 0.2, 0.1 / 2, 0])
    # Goes on down the curve of another training: no rise, as there is no warm-up.
    later = PowerSchedule(anchor_tokens=100, exponent=-0.5, initial_tokens=400, decay_steps=1)
    assert [learning_rate_factor(later, step, 6, n) for step, n in enumerate([0, 2100, 9600])] == near([0.5, 0.2, 0.1])


def test_power_anchored_is_the_paper_s_curve() -> None:
    """min(0.02, 1024 * 4 * n^-0.51): the cap holds to 2.6e10 tokens (4.4e8 at 128 sequences): the anchor."""
    for sequences, anchor in ((1024, 2.6e10), (128, 4.4e8)):
        exact = (0.02 / (4 * sequences)) ** (1 / -0.51)
        assert exact == pytest.approx(anchor, rel=0.01)
        for tokens in (10**8, 10**10, 10**11, 10**13):
            paper = min(0.02, sequences * 4 * tokens**-0.51)
            assert 0.02 * power(tokens, round(exact), -0.51) == pytest.approx(paper, rel=1e-6)


def test_exponential_is_the_printed_form() -> None:
    for floor in (0.0, 0.1, 0.7):
        a, b = (1 - floor) * math.e / (math.e - 1), (floor * math.e - 1) / (math.e - 1)
        settings_ = WSDSchedule(decay_shape="exponential", min_lr_ratio=floor, decay_steps=1)
        for step in range(11):
            assert decay(settings_, step, 0, 10) == pytest.approx(a * math.exp(-step / 10) + b, abs=1e-12)


def test_half_life_is_minicpm_s_and_can_be_geometric() -> None:
    minicpm = WSDSchedule(decay_shape="half-life", half_life_steps=5000, decay_steps=16_610)
    assert decay(minicpm, 5000, 0, 16_610) == pytest.approx(0.5)
    assert decay(minicpm, 16_610, 0, 16_610) == pytest.approx(0.1, abs=1e-4)
    geometric = WSDSchedule(decay_shape="half-life", half_life_steps=100 / math.log2(1 / 0.03), decay_steps=100)
    assert decay(geometric, 25, 0, 100) == pytest.approx(0.03**0.25)


# --- Beside transformers ----------------------------------------------------------------------------------------------


def transformers_factors(name: str, warmup: int, num_steps: int, **special: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps, scheduler_specific_kwargs=special
    )
    found = []
    for _ in range(num_steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "schedule", "special"),
    [
        ("linear", LinearSchedule(), {}),
        ("cosine", CosineSchedule(), {}),
        ("constant_with_warmup", ConstantSchedule(), {}),
        *(
            (
                "warmup_stable_decay",
                WSDSchedule(decay_shape=cast(Any, shape), decay_steps=12, min_lr_ratio=floor),
                {"num_decay_steps": 12, "decay_type": shape, "min_lr_ratio": floor},
            )
            for shape in ("linear", "cosine", "1-sqrt")
            for floor in (0.0, 0.1)
        ),
    ],
)
def test_as_transformers(name: str, schedule: Any, special: dict[str, Any], warmup: int) -> None:
    theirs = transformers_factors(name, warmup, 40, **special)
    ours = factors(schedule.model_copy(update={"warmup_steps": warmup}), 40, until=41)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    # In warm-up ours is one step ahead: theirs spends step 0 at `min_lr_ratio`, which is 0 in most.
    if not special.get("min_lr_ratio"):
        assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-12)


# --- Boundaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "num_steps", "text"),
    [
        (LinearSchedule(warmup_steps=11), 10, "11 steps of warm-up are more than all 10"),
        (ConstantSchedule(warmup_steps=2), 1, "2 steps of warm-up are more than all 1"),
        (WSDSchedule(warmup_steps=4, decay_steps=7), 10, "4 steps of warm-up and 7 of decay are more than all 10"),
        (WSDSchedule(warmup_ratio=0.5, decay_ratio=0.51), 100, "50 steps of warm-up and 51 of decay"),
        (PowerSchedule(anchor_tokens=1, decay_steps=11), 10, "0 steps of warm-up and 11 of decay"),
        (WSDSSchedule(budgets=(5, 10), decay_ratio=0.1), 11, "set max_steps .* to 10"),
        (WSDSSchedule(budgets=(5, 10), decay_ratio=0.1), 9, "has 9 steps and the last of budgets \\[5, 10\\]"),
        (CyclicCosineSchedule(budgets=(5, 10), warmup_steps=6), 10, "6 steps of warm-up do not fit into the first"),
    ],
)
def test_what_does_not_fit_is_refused(schedule: Any, num_steps: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        learning_rate_factor(schedule, 0, num_steps)


def test_warm_up_may_fill_the_whole_training() -> None:
    assert factors(LinearSchedule(warmup_steps=4), 4, until=5) == [0.25, 0.5, 0.75, 1, 0]
    assert factors(WSDSchedule(warmup_steps=2, decay_steps=2, decay_shape="linear"), 4) == [0.5, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "wsd"}, "give exactly one of them"),
        ({"kind": "wsd", "decay_steps": 3, "decay_ratio": 0.1}, "give exactly one of them"),
        ({"kind": "wsd", "decay_steps": 3, "decay_shape": "inverse"}, "set min_lr_ratio above it"),
        ({"kind": "wsd", "decay_steps": 3, "decay_shape": "half-life"}, "half_life_steps goes with"),
        ({"kind": "wsd", "decay_steps": 3, "half_life_steps": 4}, "half_life_steps goes with"),
        ({"kind": "wsd", "decay_steps": 3, "decay_shape": "geometric"}, "'linear', 'cosine', '1-sqrt', 'inverse'"),
        ({"kind": "linear", "warmup_steps": 3, "warmup_ratio": 0.1}, "two answers; give one"),
        ({"kind": "linear", "min_lr_ratio": 1.0}, "less than 1"),
        ({"kind": "wsd_s", "budgets": [], "decay_ratio": 0.1}, "at least 1 item"),
        ({"kind": "wsd_s", "budgets": [5, 5], "decay_ratio": 0.1}, r"budgets \[5, 5\] must rise"),
        ({"kind": "cyclic_cosine", "budgets": [0, 5]}, r"budgets \[0, 5\] must rise"),
        ({"kind": "wsd_s", "budgets": [10], "warmup_steps": 9, "decay_ratio": 0.2}, "2 steps .* 1 after the warm-up"),
        ({"kind": "wsd_s", "budgets": [90, 100], "decay_ratio": 0.2}, "before budget 100 is 20 steps .* 10 after 90"),
        ({"kind": "wsd_s", "budgets": [90, 100], "decay_ratio": 0.2, "warmup_ratio": 0.1}, "Extra inputs"),
        ({"kind": "power", "anchor_tokens": 10, "decay_steps": 1, "exponent": 0.5}, "less than 0"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        TypeAdapter(ScheduleSettings).validate_python(values)


# --- Properties -------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Any, int]:
    """A schedule and a number of steps that it fits into."""
    kind = draw(st.sampled_from(SCHEDULE_KINDS))
    warmup = draw(st.integers(0, 30))
    floor = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]))
    shape = draw(st.sampled_from(SHAPES))
    form: dict[str, Any] = {"decay_shape": shape, "min_lr_ratio": floor}
    if shape == "inverse":
        form["min_lr_ratio"] = floor or 0.1
    if shape == "half-life":
        form["half_life_steps"] = draw(st.floats(0.5, 100))
    if kind in ("cyclic_cosine", "wsd_s"):
        periods = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
        budgets = tuple(warmup + 1 + sum(periods[: i + 1]) for i in range(len(periods)))
        if kind == "cyclic_cosine":
            return CyclicCosineSchedule(budgets=budgets, warmup_steps=warmup, min_lr_ratio=floor), budgets[-1]
        ratio, base = draw(st.floats(0.01, 0.99)), draw(st.sampled_from(["cumulative", "period"]))
        try:
            made = WSDSSchedule(budgets=budgets, warmup_steps=warmup, decay_ratio=ratio, decay_base=base, **form)
        except ValidationError:
            # The decays are too long for these budgets: the shortest there are.
            made = WSDSSchedule(budgets=budgets, warmup_steps=warmup, decay_ratio=1e-6, **form)
        return made, budgets[-1]
    steps = draw(st.integers(1, 60))
    if kind == "wsd":
        return WSDSchedule(warmup_steps=warmup, decay_steps=steps, **form), warmup + steps + draw(st.integers(0, 40))
    if kind == "power":
        anchor = draw(st.integers(1, 2000))
        power_ = PowerSchedule(warmup_steps=warmup, decay_steps=steps, anchor_tokens=anchor, **form)
        return power_, warmup + steps + draw(st.integers(0, 40))
    if kind == "constant":
        return ConstantSchedule(warmup_steps=warmup), warmup + steps
    model = {"linear": LinearSchedule, "cosine": CosineSchedule}[kind]
    return model(warmup_steps=warmup, min_lr_ratio=floor), warmup + steps


@given(schedules(), st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_rises_in_warm_up_and_falls_without_jumps_but_at_budgets(drawn: tuple[Any, int], tokens_per_step: int) -> None:
    schedule, num_steps = drawn
    found = factors(schedule, num_steps, until=num_steps + 3, tokens_per_step=tokens_per_step)
    warmup = schedule.num_warmup_steps(num_steps)
    assert all(0 < factor <= 1 for factor in found[:num_steps])
    floor = 0 if isinstance(schedule, PowerSchedule) else getattr(schedule, "min_lr_ratio", 1.0)
    assert all(factor >= floor - 1e-12 for factor in found[warmup:])
    if not isinstance(schedule, PowerSchedule):
        assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]
        assert found[warmup] == 1.0 or warmup == num_steps
    assert len(set(found[num_steps:])) == 1 or isinstance(schedule, PowerSchedule)

    budgets = schedule.budgets[:-1] if isinstance(schedule, Budgets) else ()
    for step, (before, after) in enumerate(pairwise(found), start=1):
        if step in budgets:
            assert after == 1.0
        elif step >= warmup:
            assert after <= before
            assert before - after <= steepest(schedule, step, num_steps, tokens_per_step) + 1e-12, step


def steepest(schedule: Any, step: int, num_steps: int, tokens_per_step: int) -> float:
    """The largest fall in one step that the schedule's formula has around `step`; falls steeper are jumps."""
    if isinstance(schedule, CyclicCosineSchedule):
        start = max((budget for budget in (0, *schedule.budgets) if budget < step), default=0)
        end = min(budget for budget in (*schedule.budgets, 10**9) if budget >= step)
        return math.pi / 2 / (end - max(start, schedule.warmup_steps)) if end < 10**9 else 0.0
    if isinstance(schedule, (LinearSchedule, CosineSchedule)):
        return math.pi / 2 / max(1, num_steps - schedule.num_warmup_steps(num_steps))
    if isinstance(schedule, ConstantSchedule):
        return 0.0
    lengths = schedule.decay_lengths() if isinstance(schedule, WSDSSchedule) else [schedule.num_decay_steps(num_steps)]
    # Linear and cosine are steepest in the middle, the others in their first step.
    fall = max(max(1 - decay(schedule, 1, 0, length), math.pi / 2 / length) for length in lengths)
    if isinstance(schedule, PowerSchedule):
        before, after = ((step - 1) * tokens_per_step, step * tokens_per_step)
        fall += 1 - power(after, schedule.anchor_tokens, -0.51) / power(before, schedule.anchor_tokens, -0.51)
    return fall


@given(schedules(), st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_only_the_share_of_the_way_counts(drawn: tuple[Any, int], times: int) -> None:
    """All lengths times a number: the same values at steps times that number."""
    schedule, num_steps = drawn
    if isinstance(schedule, (PowerSchedule, WSDSSchedule)):
        return  # tokens, and decays that are rounded to whole steps
    values = schedule.model_dump()
    for name in ("warmup_steps", "decay_steps", "half_life_steps"):
        if values.get(name):
            values[name] *= times
    if "budgets" in values:
        values["budgets"] = [budget * times for budget in values["budgets"]]
    longer = type(schedule)(**values)
    for step in range(schedule.num_warmup_steps(num_steps), num_steps + 1):
        stretched = learning_rate_factor(longer, step * times, num_steps * times)
        assert stretched == pytest.approx(learning_rate_factor(schedule, step, num_steps), abs=1e-12)


@given(schedules(), st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_a_larger_budget_leaves_the_past_as_it_was(drawn: tuple[Any, int], more: int) -> None:
    """What is to be extended one day: budgets can be appended, and stable phases are the same for every length."""
    schedule, num_steps = drawn
    if isinstance(schedule, Budgets):
        values = schedule.model_dump()
        values["budgets"] = [*schedule.budgets, schedule.budgets[-1] + 40 + more]
        try:
            longer = type(schedule)(**values)
        except ValidationError:
            return  # the cumulative decay is longer than the new period
        assert factors(longer, longer.budgets[-1])[:num_steps] == factors(schedule, num_steps)
    elif isinstance(schedule, FinalDecay):
        stable = num_steps - schedule.num_decay_steps(num_steps)
        assert factors(schedule, num_steps + more, stable, 50) == factors(schedule, num_steps, stable, 50)


# --- Recipes and keys -------------------------------------------------------------------------------------------------

WSD = {"kind": "wsd", "decay_ratio": 0.25}
USED = {"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "schedule": WSD}


def test_a_schedule_that_is_not_set_is_not_in_the_key_and_one_that_is_is() -> None:
    plain = {"learning_rate": 1e-4, "effective_batch_size": 8, "max_length": 64}
    assert "schedule" not in scientific(SFTSettings(**plain)) and "schedule" not in scientific(
        SFTSettings(**plain, schedule=None)
    )
    config = scientific(SFTSettings(**plain, schedule=WSDSchedule(decay_ratio=0.25)))
    assert config["schedule"] == {
        "kind": "wsd", "decay_ratio": 0.25, "decay_steps": 0, "warmup_steps": 0, "warmup_ratio": 0.0,
        "decay_shape": "1-sqrt", "min_lr_ratio": 0.0, "half_life_steps": None,
    }  # fmt: skip


def test_absent_means_exactly_that_value() -> None:
    class Old(StrictModel):
        first: int = science(1)

    class New(Old):
        nothing: int | None = science(None, absent=None)
        number: bool | int = science(5, absent=0)  # the default moved on later; what is absent did not
        text: str = science("", absent="")

    assert scientific(Old()) == {"first": 1}
    assert scientific(New(number=0)) == scientific(Old())
    assert scientific(New()) == {"first": 1, "number": 5}
    assert scientific(New(nothing=0, number=False, text="x")) == {
        "first": 1,
        "nothing": 0,
        "number": False,
        "text": "x",
    }
    with pytest.raises(AssertionError):
        science([], absent=cast(Any, []))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "rlvr"])
def test_a_schedule_changes_the_key_of_its_stage_and_of_what_follows(stage: str) -> None:
    def keys(**changes: Any) -> dict[str, str]:
        recipe = load_recipe(
            {"extends": "tiny", stage: {"lr_scheduler_type": "linear", "warmup_ratio": 0.0, **changes}}
        )
        return Graph(recipe, resolve=made_up_commit).keys()

    without, with_it = keys(), keys(schedule=WSD)
    assert without == keys(schedule=None)
    changed = {name for name in without if without[name] != with_it[name]}
    node = stage.replace("_", "-")
    assert node in changed and not {"world", "base-model", "dataset-sft"} & changed
    assert "rlvr" in changed, "PPO's critic is made of the reward model"
    assert keys(schedule=WSD | {"decay_shape": "linear"})[node] != with_it[node]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"schedule": WSD},
            "sft: lr_scheduler_type cosine, warmup_ratio 0.03 and a schedule of kind wsd are two answers",
        ),
        (USED | {"warmup_ratio": 0.1}, "warmup_ratio 0.1 and a schedule of kind wsd are two answers"),
        (USED | {"schedule": {"decay_ratio": 0.1}}, "sft.schedule: kind is missing; give one of linear, cosine, const"),
        (USED | {"schedule": {"kind": "wds"}}, "sft.schedule: Input tag 'wds' .*'linear', 'cosine', 'constant'"),
        (
            {"lr_scheduler_type": "constant"},
            "sft: lr_scheduler_type constant has no warm-up, .* warmup_ratio 0.03; set",
        ),
        ({"warmup_ratio": 1}, "sft.warmup_ratio: .* less than 1"),
        (USED | {"max_steps": 10, "schedule": {"kind": "wsd", "decay_steps": 11}}, "sft: schedule: 0 steps of warm-up"),
        (USED | {"schedule": {"kind": "cyclic_cosine", "budgets": [5, 10]}}, "needs max_steps 10"),
        (
            USED | {"max_steps": 9, "schedule": {"kind": "cyclic_cosine", "budgets": [5, 10]}},
            r"the training has 9 steps .* \[5, 10\] .* set max_steps",
        ),
    ],
)
def test_the_recipe_says_what_is_wrong(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        load_recipe({"extends": "tiny", "sft": changes})


def test_a_recipe_with_a_schedule_survives_being_written_and_read() -> None:
    recipe = load_recipe({"extends": "tiny", "dpo": {"warmup_ratio": 0.0, "schedule": WSD}})
    assert load_recipe(json.loads(recipe.model_dump_json())) == recipe


# --- The trainer ------------------------------------------------------------------------------------------------------

world = training.world
NUM_STEPS = 6
POWER = PowerSchedule(anchor_tokens=150, decay_steps=2, warmup_steps=1)
STAGE_SCHEDULES: dict[str, Any] = {
    "sft": POWER,
    "reward_model": WSDSSchedule(budgets=(4, 6), decay_ratio=0.5, decay_base="period", warmup_steps=2),
    "dpo": WSDSchedule(warmup_steps=2, decay_ratio=0.5, decay_shape="half-life", half_life_steps=1),
    "rlvr": POWER,
}


def train(stage: str, world: Path, folder: Path, schedule: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """History and weights of a stage of `tests.tasks.trainer.test_training` with a schedule."""
    function, config, _ = training.STAGES[stage]
    values = config.model_dump() | {"warmup_ratio": 0.0, "schedule": schedule}
    if stage != "rlvr":
        values["max_steps"] = NUM_STEPS
    inputs = training.inputs_of(stage, world, folder)
    function(type(config)(**values), inputs, training.context(folder))
    history = [json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()]
    return history, load_file(folder / "out" / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", STAGE_SCHEDULES)
def test_logged_learning_rates_are_the_pure_function_s_also_after_a_resume(
    stage: str, world: Path, tmp_path: Path
) -> None:
    schedule = STAGE_SCHEDULES[stage]
    history, unbroken = train(stage, world, tmp_path / "unbroken", schedule)
    # GRPO logs the count only where it wrote new rollouts.
    tokens = [0, *accumulate((int(row.get("num_tokens", 0)) for row in history), max)]
    expected = [1e-3 * learning_rate_factor(schedule, step, NUM_STEPS, tokens[step]) for step in range(NUM_STEPS)]
    assert [row["learning_rate"] for row in history] == expected
    assert len(set(expected)) > 2
    if schedule is POWER:
        assert tokens[3] > tokens[1] > schedule.anchor_tokens, "the power law was not reached"

    if stage in ("sft", "rlvr"):
        shutil.copytree(tmp_path / "unbroken" / "work", tmp_path / "resumed" / "work")
        (tmp_path / "resumed" / "work" / "checkpoints" / "checkpoint-6" / CHECKPOINT_MARKER).unlink()
        resumed_history, resumed = train(stage, world, tmp_path / "resumed", schedule)
        assert (tmp_path / "resumed" / "work" / "resumed.jsonl").read_text() == "4\n"
        assert [row["learning_rate"] for row in resumed_history] == expected
        assert unbroken.keys() == resumed.keys()
        assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []


def test_a_schedule_that_does_not_fit_the_epochs_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    function, config, _ = training.STAGES["sft"]
    values = config.model_dump() | {"warmup_ratio": 0.0, "schedule": WSDSchedule(decay_steps=7)}
    inputs = training.inputs_of("sft", world, tmp_path)
    with pytest.raises(ValueError, match="0 steps of warm-up and 7 of decay are more than all 6"):
        function(type(config)(**values), inputs, training.context(tmp_path))
    assert not (tmp_path / "work" / "history.jsonl").exists()
