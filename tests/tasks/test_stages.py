"""Stages describe themselves: what must be known of one follows from its contracts, and nobody goes by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from smoltulu.flows.recipe import stage_order
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DatasetKind
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.schemas.training import RowRules, SFTSettings, TrainingInputs, TrainingSettings
from smoltulu.tasks.report.text import title
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.stages import STAGES
from tests import ROOT

TWO = ComputeSettings(num_processes=2)
SMALLEST: dict[str, Any] = {"learning_rate": 1e-5, "effective_batch_size": 8}
LENGTHS = {"max_length": 64, "max_prompt_length": 64, "max_completion_length": 8, "num_steps": 4}


def settings_of(stage: Stage) -> TrainingSettings:
    """The settings of a training with nothing given that has a default."""
    fields = (GRPOSettings if stage.name == "rlvr" else stage.config).model_fields
    given = SMALLEST | {name: value for name, value in LENGTHS.items() if name in fields}
    settings = stage.config.model_validate(given)
    assert isinstance(settings, TrainingSettings)
    return settings


TRAININGS = [stage for stage in STAGES.values() if issubclass(stage.config, TrainingSettings)]


def test_the_trainings_are_these() -> None:
    assert [stage.name for stage in TRAININGS] == ["sft", "reward_model", "dpo", "rlvr"]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_traits_follow_from_the_config(stage: Stage) -> None:
    assert stage.is_training == issubclass(stage.config, TrainingSettings)
    assert stage.num_ranks(ComputeSettings()) == 1
    block = stage.block or stage.name
    if not stage.is_training:
        assert stage.batch_setting in (None, "per_device_eval_batch_size")
        return
    assert stage.build is not None, "the dry run cannot try it"
    assert stage.num_ranks(TWO) == 2 and stage.batch_setting == "per_device_train_batch_size"
    assert stage.makes(ModelOutputs) and issubclass(stage.inputs, TrainingInputs)
    assert block == stage.name and block in Recipe.model_fields and title(block) != block
    settings = settings_of(stage)
    assert stage.flops(settings) >= 6
    assert isinstance(settings.row_rules(), RowRules)
    assert settings.starts_from is None or settings.starts_from in STAGES


def test_what_the_stages_say_of_themselves() -> None:
    def which(trait: str) -> list[str]:
        return [name for name, stage in STAGES.items() if getattr(stage, trait)]

    assert which("distributed") == ["samples", "sample_scores", "selection_scores", "reference_logps", "pass_rates"]
    assert which("eval_batch") == [
        "samples", "sample_scores", "selection_heads", "selection_scores", "reference_logps", "pass_rates",
        "evaluation_cell", "evaluation",
    ]  # fmt: skip
    assert which("keeps_rows") == ["contamination", "near_duplicates", "preflight"]
    assert which("copies_model") == ["publish"]
    assert set(STAGES) - set(which("grows_with_model")) == {
        "mixture", "held_out_rows", "near_duplicates", "preflight", "verifier_audit", "sample_scores",
        "sampled_rows", "selection",
    }  # fmt: skip
    blocks = {name: stage.block for name, stage in STAGES.items() if stage.block}
    assert blocks == {
        "dataset": "data", "mixture": "data", "held_out_rows": "data",
        "benchmark_index": "contamination", "preflight": "trainings",
        "reference_logps": "dpo", "samples": "sampled", "sample_scores": "sampled", "sampled_rows": "sampled",
        "selection_heads": "selector", "selection_scores": "selector", "selection": "selector",
    }  # fmt: skip
    assert all(hasattr(Recipe, block) or block in Recipe.model_fields for block in blocks.values())


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        ("sft", {}, 6), ("reward_model", {}, 6), ("dpo", {}, 6), ("rlvr", {}, 8),
        ("rlvr", {"num_iterations": 2, "beta": 0.1}, 16),
    ],
)  # fmt: skip
def test_flops_of_a_parameter_and_token(stage: str, options: dict[str, Any], expected: int) -> None:
    """Forward 2, backward 4; RLVR writes its rollouts first (2), and goes forward through a reference (2)."""
    assert STAGES[stage].flops(settings_of(STAGES[stage]).model_copy(update=options)) == expected


def test_titles() -> None:
    assert [title(name) for name in ("sft", "reward_model", "dpo", "rlvr", "base_model", "unheard_of")] == [
        "SFT", "Reward model", "DPO", "RLVR", "Base model", "Unheard of",
    ]  # fmt: skip


def test_rows_of_a_training_as_its_settings_have_them() -> None:
    rlvr, sft = settings_of(STAGES["rlvr"]), settings_of(STAGES["sft"])
    assert isinstance(rlvr, GRPOSettings) and isinstance(sft, SFTSettings)
    assert rlvr.model_copy(update={"max_prompt_length": 99}).row_rules() == RowRules(
        kind="prompts", max_length=99, overlong="drop"
    )
    assert sft.model_copy(update={"overlong": "drop"}).row_rules() == RowRules(
        kind="conversations", max_length=64, overlong="drop"
    )


def test_outputs_tell_of_what_stage_they_are() -> None:
    """The report reads what it finds by the outputs' model: no stage's outputs may pass for those of another."""
    models = {stage.outputs for stage in STAGES.values()}
    for written in models:
        for read in models - {written}:
            needed = {name for name, field in read.model_fields.items() if field.is_required()}
            assert not needed <= set(written.model_fields) <= set(read.model_fields), (written, read)
    with pytest.raises(ValidationError):
        ModelOutputs.model_validate({"folder": "model", "num_parameters": 1, "file": "rows.jsonl"})


def test_the_order_of_a_run_is_that_of_the_list_unless_one_starts_from_a_later_one() -> None:
    from smoltulu.flows.recipe import load_recipe

    order = list(STAGES)
    assert stage_order(load_recipe("tiny")) == tuple(order)
    order.remove("reward_model")
    order.insert(order.index("dpo") + 1, "reward_model")
    assert stage_order(load_recipe("tiny", {"reward_model.start_from": "dpo"})) == tuple(order)


# --- Nobody goes by a stage's name ------------------------------------------------------------------------------------

#: Graphs lay out stages, so they name them. A ladder compares blocks of recipes; some are called as a stage is.
GO_BY_NAME = ("flows/graphs/recipe_graph.py", "flows/graphs/audit_graph.py", "flows/sweeping/ladder.py")
#: Fields that hold other things which are called as a stage is: a kind of score, of rows, of a repository.
OTHER_WORDS = ("kind",)
_DATA_KINDS = set(get_args(DatasetKind))


def own_module(stage: Stage) -> str:
    function: Any = getattr(stage.function, "func", stage.function)  # of a partial
    return str(function.__module__).removeprefix("smoltulu.").replace(".", "/") + ".py"


def literals(node: ast.expr) -> set[str]:
    """Texts that a literal holds: itself, or the members of a tuple, list or set, or the keys of a dict.

    None where a member holds none: a row of a table is no list of names.
    """
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    members = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    found = [literals(member) for member in members if member is not None]
    return set().union(*found) if all(found) else set()


def decisions_by_name(path: Path) -> Iterator[str]:
    """Comparisons with stage names, literals that list them, and constants that are called otherwise and hold one."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: set[str] = set()
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            names = set() if words & set(OTHER_WORDS) else {name for side in sides for name in literals(side)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = literals(node.value) if isinstance(node.value, ast.Constant) else set()
        elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            listed = literals(node) & STAGES.keys()
            names = listed if len(listed) > 1 and listed - _DATA_KINDS else set()
        for name in sorted(names & STAGES.keys()):
            yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    "path", sorted(path for top in ("flows", "tasks", "artifacts") for path in (ROOT / top).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)  # fmt: skip
def test_no_file_decides_by_a_stages_name(path: Path) -> None:
    """What it decides belongs on `Stage`, in the stage's own module, or follows from its contracts."""
    name = str(path.relative_to(ROOT))
    if name not in GO_BY_NAME and name not in {own_module(stage) for stage in STAGES.values()}:
        assert not list(decisions_by_name(path))


@pytest.mark.parametrize(
    "code",
    [
        'node.stage.name == "sft"', 'if stage in ("sft", "dpo"): pass', 'A = ("rlvr", "base_model")',
        'B = {"dpo": f, "sft": g}', '"publish" != row.stage',
        'for block, needs in (("sft", "sft"), ("dpo", "preference")): pass', '_SCORES = "evaluation"',
    ],
)  # fmt: skip
def test_such_a_decision_is_seen(tmp_path: Path, code: str) -> None:
    (tmp_path / "file.py").write_text(code)
    assert list(decisions_by_name(tmp_path / "file.py"))
