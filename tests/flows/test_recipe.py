"""Recipes: presets, inheritance, overrides, and the one error that lists everything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError, check_stage_names, load_recipe, preset_names, whole_path
from smoltulu.recipes import CHAT_TEMPLATES, PRESETS
from smoltulu.schemas.common import role_of, scientific
from smoltulu.schemas.contamination import ContaminationStageConfig
from smoltulu.schemas.critic import CriticSettings
from smoltulu.schemas.data import DatasetStageConfig
from smoltulu.schemas.evaluation import EvaluationStageConfig
from smoltulu.schemas.held_out import RolloutGuards
from smoltulu.schemas.publish import PublishStageConfig
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings, RLOOSettings
from smoltulu.schemas.sampled import SampledRowsConfig, SamplesConfig, SampleScoresConfig
from smoltulu.schemas.selection import SelectionConfig, SelectionHeadsConfig, SelectionScoresConfig
from smoltulu.schemas.verifier_audit import PassRatesConfig, VerifierAuditConfig


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def test_every_preset_is_valid() -> None:
    assert {"smoltulu-1130", "smoltulu-1207", "tulu3-8b", "tiny", "real-small", "real-135m"} <= set(preset_names())
    for name in preset_names():
        assert load_recipe(name).name == name


def test_1130_and_1207_differ_in_learning_rates_and_batch_sizes_only() -> None:
    first, second = (leaves(scientific(load_recipe(name))) for name in ("smoltulu-1130", "smoltulu-1207"))
    differing = {name: (first.get(name), second.get(name)) for name in first.keys() | second.keys()
                 if first.get(name) != second.get(name)}  # fmt: skip
    assert differing == {
        "sft.learning_rate": (9e-5, 3.1e-6),
        "sft.effective_batch_size": (8, 32),
        "reward_model.learning_rate": (4e-5, 7.5e-7),
        "reward_model.effective_batch_size": (4, 8),
        "dpo.learning_rate": (8e-7, 5e-7),
        "dpo.effective_batch_size": (12, 32),
    }


PAPER_PRESETS = ("smoltulu-1130", "smoltulu-1207", "tulu3-8b")
#: A mark, and the place in its source: a table or the abstract, a card and a line of it, a command or a file.
MARKS = (
    r"\[P\] (abstract|tables? \d+(, \d+)*( and \d+)?)\b",
    r"\[C\] SmolTulu-1\.7b-(Instruct|RM|Reinforced), [\w ]+",
    r"\[C\] SmolTulu-1\.7b-RM: made to initialise the value function",
    r"\[T\] docs/tulu3\.md, (SFT|DPO|RM|RLVR|3\.1) command\b",
    r"\[T\] open_instruct/\w+\.py( at [0-9a-f]{7})?[,:] \w+",
    r"\[ours\]",
)


def value_lines(preset: str) -> list[tuple[str, str, str]]:
    """(dotted block, line, comment) of the lines with a value that a source could have; data.rlvr is not looked at.

    The comment of a block stands for its lines.
    """
    found, stack = [], [(-1, "", "")]
    for line in (PRESETS / f"{preset}.yaml").read_text().splitlines():
        body, _, comment = line.partition(" #") if not line.lstrip().startswith("#") else ("", "", "")
        if not body.strip():
            continue
        indent, name = len(body) - len(body.lstrip(" -")), body.strip(" -").partition(":")[0]
        while stack[-1][0] >= indent:
            stack.pop()
        block = f"{stack[-1][1]}.{name}".lstrip(".")
        inherited = stack[-1][2] if "[" in stack[-1][2] else ""
        if body.rstrip().endswith(":"):
            stack.append((indent, block, comment if "[" in comment else inherited))
        elif not block.startswith(("name", "description", "extends", "compute", "data.rlvr")):
            found.append((block, line, comment if "[" in comment else inherited))
    return found


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_every_value_of_a_paper_preset_names_its_source_and_the_place_there(name: str) -> None:
    lines = value_lines(name)
    assert len(lines) > (5 if name == "smoltulu-1207" else 30)
    is_machinery_of_a_source = re.compile(r"\.(format|fields|subset|query_fields|name|metric)$")
    wrong = [
        line
        for block, line, comment in lines
        if not any(re.search(mark, comment) for mark in MARKS) and not is_machinery_of_a_source.search(block)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_marks_name_the_tables_that_hold_the_values(name: str) -> None:
    """arXiv 2412.08347: SFT's are in table 2, DPO's in table 5, the reward model's in table 7; tables 1, 4 and 13 are
    about contamination, 10 to 12 about languages."""
    tables = {"sft": {"2"}, "dpo": {"5"}, "reward_model": {"7"}, "contamination": {"1", "4", "13"}}
    tables["languages"] = {"10", "11", "12"}
    for block, line, comment in value_lines(name):
        if (match := re.search(r"\[P\] tables? ([\d, and]+)", comment)) is not None:
            assert set(re.findall(r"\d+", match[1])) <= tables[block.partition(".")[0]], line


def test_values_of_the_presets_are_the_published_ones() -> None:
    """Paper, cards of SmolTulu-1.7b-RM and -Reinforced, open-instruct's commands and defaults."""
    first, tulu = load_recipe("smoltulu-1130"), load_recipe("tulu3-8b")
    assert first.sft and first.reward_model and first.dpo and tulu.reward_model and tulu.dpo
    assert (first.sft.seed, first.reward_model.seed, first.dpo.seed) == (123, 1, 42)
    assert (tulu.reward_model.seed, tulu.dpo.seed) == (1, 42)
    assert (first.reward_model.weight_decay, first.dpo.weight_decay, first.sft.weight_decay) == (0.01, 0.0, 0.0)
    ppo = first.rlvr
    assert isinstance(ppo, PPOSettings) and isinstance(tulu.rlvr, GRPOSettings)
    assert ppo.model_dump(include={"learning_rate", "beta", "temperature", "reward_correct", "non_stop_reward",
                                   "effective_batch_size", "num_rollouts", "num_episodes", "num_ppo_epochs",
                                   "weight_decay", "max_prompt_length", "max_completion_length", "seed", "gamma",
                                   "gae_lambda", "epsilon", "num_samples_per_prompt", "reward_model_weight"}) == {
        "learning_rate": 3e-6, "beta": 0.05, "temperature": 1.0, "reward_correct": 10.0, "non_stop_reward": -10.0,
        "effective_batch_size": 32, "num_episodes": 64_000, "num_ppo_epochs": 4, "weight_decay": 0.01,
        "max_prompt_length": 2048, "max_completion_length": 2048, "seed": 3, "gamma": 1.0, "gae_lambda": 0.95,
        "epsilon": 0.2, "num_samples_per_prompt": 1, "reward_model_weight": 0.0,
    }  # fmt: skip
    assert ppo.num_rollouts == 32 and ppo.needs_reward_model
    assert ppo.critic == CriticSettings(initial="reward_model", warmup_steps=0, value_clip=0.2, value_coefficient=0.1)
    grpo = tulu.rlvr
    assert (grpo.effective_batch_size, grpo.steps_per_generation, grpo.num_rollouts, grpo.num_prompts) == (
        384,
        2,
        768,
        48,
    )
    assert (grpo.loss_type, grpo.kl_form, grpo.beta, grpo.learning_rate) == ("bnpo", "k3", 0.01, 5e-7)
    assert (grpo.weight_decay, grpo.non_stop_reward, grpo.reward_correct, grpo.seed) == (0.01, 0.0, 10.0, 1)


def test_a_recipe_that_takes_another_algorithm_loses_what_only_the_old_one_has() -> None:
    """Else no recipe could extend smoltulu-1130 and use GRPO: its PPO block has fields that GRPO refuses."""
    rlvr = {"algorithm": "grpo", "num_steps": 10, "num_generations": 8}
    recipe = load_recipe({"extends": "smoltulu-1130", "name": "mine", "rlvr": rlvr})
    assert isinstance(recipe.rlvr, GRPOSettings) and recipe.rlvr.learning_rate == 3e-6 and recipe.rlvr.beta == 0.05
    recipe = load_recipe({"extends": "tiny", "name": "mine", "rlvr": {"algorithm": "rloo", "num_steps": 36}})
    assert isinstance(recipe.rlvr, RLOOSettings) and recipe.rlvr.learning_rate == 1e-4
    same = load_recipe({"extends": "tiny", "name": "mine", "rlvr": {"algorithm": "ppo"}})
    assert isinstance(same.rlvr, PPOSettings) and same.rlvr.num_minibatches == 2
    with pytest.raises(RecipeError, match=r"rlvr.*gamma: no such field"):
        load_recipe({"extends": "tiny", "name": "mine", "rlvr": {"algorithm": "rloo", "gamma": 1}})


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)] if get_origin(annotation) else []


def all_fields(model: type[BaseModel], seen: set[type[BaseModel]]) -> dict[str, str]:
    if model in seen:
        return {}
    seen.add(model)
    roles = {}
    for name, field in model.model_fields.items():
        roles[f"{model.__name__}.{name}"] = role_of(field)
        for inner in models_in(field.annotation):
            roles.update(all_fields(inner, seen))
    return roles


def test_every_field_is_marked_and_the_machinery_is_exactly_this() -> None:
    seen: set[type[BaseModel]] = set()
    roles: dict[str, str] = {}
    configs = (
        ContaminationStageConfig,
        EvaluationStageConfig,
        PublishStageConfig,
        VerifierAuditConfig,
        PassRatesConfig,
        SamplesConfig,
        SampleScoresConfig,
        SampledRowsConfig,
        SelectionHeadsConfig,
        SelectionScoresConfig,
        SelectionConfig,
    )
    for model in (Recipe, DatasetStageConfig, *configs):
        roles.update(all_fields(model, seen))
    machinery = {name for name, role in roles.items() if role == "machinery"}
    compute = {name for name in roles if name.startswith(("ComputeSettings.", "StageCompute."))}
    assert compute <= machinery
    assert machinery - compute == {
        "Recipe.name",
        "Recipe.description",
        "Recipe.compute",
        "Recipe.preflight",
        "PreflightSettings.max_overlong_share",
        "PreflightSettings.max_unstable_share",
        "PreflightSettings.max_faulty_share",
        "PreflightSettings.dry_run",
        "SFTSettings.gate",
        "DPOSettings.gate",
        "PPOSettings.gate",
        "GRPOSettings.gate",
        "RLOOSettings.gate",
        "PPOSettings.guards",
        "GRPOSettings.guards",
        "RLOOSettings.guards",
        *(f"RolloutGuards.{name}" for name in RolloutGuards.model_fields),
        "PPOSettings.rollout_batch_size",
        "PPOSettings.max_rollouts_without_signal",
        "GRPOSettings.max_rollouts_without_signal",
        "RLOOSettings.max_rollouts_without_signal",
        "SelectionSettings.gate",
        "SelectionHeadsConfig.gate",
        "SelectionConfig.labels",
        "DataSet.expected_rows",
        "CriticSettings.path",
        "CriticSettings.offload_optimizer",
        "GateSettings.num_prompts",
        "GateSettings.max_new_tokens",
        "GateSettings.min_stopped_share",
        "BaseModelConfig.num_threads",
        "DataSource.path",
        "ModelSource.path",
        "ModelSource.num_parameters",
        "PublishSettings.repository",
        "PublishSettings.branch",
        "PublishSettings.private",
        "PublishStageConfig.recipe",
        "VerifierAuditSettings.min_gold_share",
        "VerifierAuditSettings.max_ungradable_share",
        "VerifierAuditSettings.max_hack_share",
        "VerifierAuditSettings.chance_level",
        "VerifierAuditSettings.known_faults",
        "VerifierAuditConfig.source_labels",
        "PassRatesConfig.source_labels",
        "SampledSettings.max_length_ratio",
        "SamplesConfig.writer",
        "SampledRowsConfig.writer",
        "SelectionRules.max_length_ratio",
    }


def test_a_per_device_batch_that_does_not_divide_is_lowered() -> None:
    """Gradient accumulation is derived from it: it changes no result, so it is no reason to refuse a recipe."""
    asked = load_recipe("smoltulu-1130", {"compute.per_device_train_batch_size": 8, "compute.stages": {}})
    assert asked.batch_notes() == [
        f"{block}: per_device_train_batch_size 8 does not divide effective_batch_size {effective}: "
        f"lowered to {size}, which changes no result"
        for block, effective, size in (("reward_model", 4, 4), ("dpo", 12, 6))
    ]
    graph = Graph(asked, unresolved="keep", resolve=lambda reference: "0" * 40)
    sizes = {name: graph.compute_of(node).per_device_train_batch_size for name, node in graph.nodes.items()}
    assert (sizes["sft"], sizes["dpo"], sizes["reward-model"]) == (8, 6, 4)
    for name, node in graph.nodes.items():
        if node.stage.is_training:
            assert node.config.effective_batch_size % sizes[name] == 0  # type: ignore[attr-defined]
    assert load_recipe("tiny").batch_notes() == []


def test_a_training_runs_on_as_many_ranks_as_divide_its_batch_and_says_so() -> None:
    """Batches of 8, 12 and 4 on eight processes."""
    recipe = load_recipe("smoltulu-1130", {"compute.num_processes": 8, "compute.stages": {}})
    graph = Graph(recipe, unresolved="keep", resolve=lambda reference: "0" * 40)
    ranks = {name: node.stage.num_ranks(graph.compute_of(node)) for name, node in graph.nodes.items()}
    assert (ranks["sft"], ranks["dpo"], ranks["reward-model"], ranks["reference-logps"]) == (8, 6, 4, 8)
    assert [note for note in recipe.batch_notes() if "runs on" in note] == [
        f"{block}: effective_batch_size {size} is not a multiple of num_processes 8: runs on {ranks}, which changes no "
        f"result; compute.stages.{block}.num_processes: {ranks} says that this is meant"
        for block, size, ranks in (("reward_model", 4, 4), ("dpo", 12, 6))
    ]
    meant = {"compute.stages": {"dpo": {"num_processes": 6}, "reward_model": {"num_processes": 4}}}
    silent = load_recipe("smoltulu-1130", {"compute.num_processes": 8} | meant)
    assert not [note for note in silent.batch_notes() if "runs on" in note]


@pytest.mark.parametrize(("changes", "said"), [
    ({"sft.lora": {}}, "sft: compute.parallel fsdp2 cannot train a LoRA .* set compute.stages.sft.parallel to ddp"),
    ({"dpo.lora": {}, "compute.stages.sft.parallel": "ddp"}, "dpo: compute.parallel fsdp2 cannot train a LoRA adapter"),
    ({"rlvr.critic.offload_optimizer": True}, "rlvr: critic.offload_optimizer keeps .* set one of them only"),
    ({"compute.parallel": "fsdp"}, "compute.parallel: Input should be 'ddp' or 'fsdp2'"),
    ({"compute.stages.sft.parallel": True}, "compute.stages.sft.parallel: Input should be 'ddp' or 'fsdp2'"),
])  # fmt: skip
def test_what_cannot_be_sharded_is_refused_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    asked = {"compute.num_processes": 4, "compute.parallel": "fsdp2"}
    with pytest.raises(RecipeError, match=said):
        load_recipe("tiny", asked | changes)
    if "lora" in said:  # one process has nothing to divide, and DDP can
        load_recipe("tiny", changes | {"compute.parallel": "fsdp2"})
        load_recipe("tiny", changes | {"compute.num_processes": 4})


def test_sharding_enters_no_key_and_one_process_says_that_it_does_nothing() -> None:
    plain, sharded = load_recipe("tiny"), load_recipe("tiny", {"compute.parallel": "fsdp2", "compute.num_processes": 2})
    assert Graph(plain).keys() == Graph(sharded).keys()
    halved = "sft: per_device_train_batch_size 16 on 2 processes does not divide effective_batch_size 16: lowered to 8"
    assert sharded.batch_notes()[0].startswith(halved) and not any("parallel" in one for one in sharded.batch_notes())
    alone = load_recipe("tiny", {"compute.parallel": "fsdp2"}).batch_notes()
    assert "sft: compute.parallel fsdp2 does nothing here: it runs on one process" in alone


def test_one_error_lists_every_problem_with_its_path() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"extends": "tiny", "dpo": {"learning_rte": 1, "beta": -1}, "sft": {"seed": "many"}})
    text = str(caught.value)
    assert "recipe tiny has 3 problems" in text
    assert "dpo.learning_rte: no such field (did you mean 'learning_rate'?); allowed: learning_rate," in text
    assert "dpo.beta: Input should be greater than 0; given: -1" in text
    assert "sft.seed: Input should be a valid integer" in text and "given: 'many'" in text


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("smoltulu-1103", {}, "no recipe is called 'smoltulu-1103' (did you mean 'smoltulu-1130'?)"),
        ("missing/one.yaml", {}, "recipe file missing/one.yaml does not exist"),
        ("tiny", {"dpo.learning_rte": 1}, "dpo.learning_rte: no such field (did you mean 'learning_rate'?)"),
        ("tiny", {"dop.beta": 1}, "dop: no such field (did you mean 'dpo'?)"),
        ("tiny", {"name.first": 1}, "'first' goes through a value that has no fields"),
        ("tiny", {"contamination.benchmarks.7.name": "x"}, "does not point into a list of 3 items"),
        ({"extends": "tinny"}, {}, "extends 'tinny' (did you mean 'tiny'?)"),
        ({"extends": "smoltulu-1207"}, {}, "which itself extends smoltulu-1130"),
        ({"extends": "tiny", "world": None}, {}, "generated data needs a world block"),
        ({"extends": "tiny", "sft": None}, {}, "dpo: starts from the model of sft; add a block sft"),
        (
            {"extends": "tiny", **dict.fromkeys(("sft", "reward_model", "dpo", "rlvr"))},
            {},
            "publish: would publish the base",
        ),
        ("tiny", {"compute.stages.stf": {}}, "compute.stages: no stage is called 'stf' (did you mean 'sft'?)"),
        (
            "tiny",
            {"compute.stages.sft.save_step": 1},
            "sft.save_step: no such field (did you mean 'save_steps'?); allow",
        ),
        ({"extends": "tiny", "rlvr": {"num_episodes": 100}}, {}, "100 is not a multiple of the rollout batch 256"),
    ],
)
def test_bad_recipes(recipe: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert message in str(caught.value)


def test_overrides_and_inline_recipes() -> None:
    assert load_recipe("tiny", {"dpo.learning_rate": 5e-7}).dpo.learning_rate == 5e-7  # type: ignore[union-attr]
    assert (
        load_recipe("tiny", {"compute.stages.sft.per_device_train_batch_size": 4})
        .compute.of("sft")
        .per_device_train_batch_size
        == 4
    )
    inline = load_recipe({"extends": "tiny", "name": "mine", "dpo": {"beta": 2}})
    assert (inline.name, inline.dpo.beta, inline.dpo.max_length) == ("mine", 2.0, load_recipe("tiny").dpo.max_length)  # type: ignore[union-attr]


def test_unreadable_yaml(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,")
    with pytest.raises(RecipeError, match="not readable YAML"):
        load_recipe(str(path))
    path.write_text("- 1")
    with pytest.raises(RecipeError, match="holds a list"):
        load_recipe(str(path))
    path.write_text(yaml.safe_dump({"extends": "tiny", "name": "from-file"}))
    assert load_recipe(str(path)).name == "from-file"


# --- paths -----------------------------------------------------------------------------------------------------------


def test_relative_paths_of_a_file_start_at_its_folder_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "extends": "tiny",
                "base_model": {"scratch": None, "path": "../models/base"},
                "chat_template": "own.jinja",
                "data": {
                    "sft": {
                        "sources": [
                            {"path": "data/a.jsonl", "format": "messages", "fields": {"messages": "b.jsonl"}},
                            {"path": "${DATA:-data}/b.jsonl", "format": "messages"},
                            {"path": "/data/c.jsonl", "format": "messages"},
                            {"path": "~/d.jsonl", "format": "messages"},
                        ]
                    }
                },
                "evaluation": {"tasks": [], "sampled": None},
                "compute": {"store": "store", "remote": "s3://bucket/folder"},
            }
        )
    )
    for called_from, given in ((tmp_path, "own/mine.yaml"), (folder, "./mine.yaml")):
        monkeypatch.chdir(called_from)
        recipe = load_recipe(given)
        assert recipe.data.sft is not None
        assert [source.path for source in recipe.data.sft.sources] == [
            f"{folder}/data/a.jsonl", "${DATA:-data}/b.jsonl", "/data/c.jsonl", "~/d.jsonl"
        ]  # fmt: skip
        assert recipe.data.sft.sources[0].fields == {"messages": "b.jsonl"}
        assert Path(str(recipe.base_model.path)).resolve() == tmp_path / "models" / "base"
        assert recipe.chat_template == f"{folder}/own.jinja"
        assert (recipe.compute.store, recipe.compute.remote) == (f"{folder}/store", "s3://bucket/folder")


def test_inline_recipes_and_overrides_keep_their_paths() -> None:
    """They have no folder: what is relative starts at the working folder, as in a shell."""
    source = {"path": "a.jsonl", "format": "messages"}
    inline = load_recipe({"extends": "tiny", "data": {"sft": {"sources": [source]}}})
    overridden = load_recipe("tiny", {"data.sft.sources": [source], "compute.store": "store"})
    for recipe in (inline, overridden):
        assert recipe.data.sft is not None and recipe.data.sft.sources[0].path == "a.jsonl"
    assert overridden.compute.store == "store"


def test_a_recipe_extends_a_file_one_level_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    base = {**yaml.safe_load((PRESETS / "tiny.yaml").read_text()), "compute": {"store": "store"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "more" / "My second_run.yaml").write_text("extends: ../base.yaml\ndpo: {beta: 2}\n")
    monkeypatch.chdir("/")
    recipe = load_recipe(str(tmp_path / "more" / "My second_run.yaml"))
    assert recipe.dpo is not None and recipe.dpo.beta == 2
    # The path is the base's, and so is the folder that it starts at; the name is that of the file, as none is given.
    assert (recipe.name, Path(recipe.compute.store).resolve()) == ("my-second-run", tmp_path / "store")

    (tmp_path / "third.yaml").write_text("extends: ./more/My second_run.yaml\n")
    with pytest.raises(RecipeError, match=r"which itself extends \.\./base\.yaml; extend that one instead"):
        load_recipe(str(tmp_path / "third.yaml"))
    (tmp_path / "fourth.yaml").write_text("extends: ./missing.yaml\n")
    with pytest.raises(RecipeError, match=rf"recipe file {tmp_path}/missing.yaml does not exist"):
        load_recipe(str(tmp_path / "fourth.yaml"))
    # An inline recipe has no file to be named after.
    monkeypatch.chdir(tmp_path)
    assert load_recipe({"extends": "./base.yaml"}).name == "tiny"


def test_whole_paths_for_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert whole_path("mine.yaml") == f"{tmp_path}/mine.yaml"
    assert whole_path("below/mine") == f"{tmp_path}/below/mine"
    for kept in ("tiny", "/a/b.yaml", '{"extends": "./base.yaml"}'):
        assert whole_path(kept) == kept


def test_until_and_refresh_must_be_stages_that_the_recipe_has() -> None:
    recipe = load_recipe({"extends": "tiny", "rlvr": None})
    check_stage_names(recipe, "dpo", ["sft"])
    with pytest.raises(RecipeError, match="until: recipe tiny has no stage 'rlvr'; it has: world, dataset"):
        check_stage_names(recipe, "rlvr", [])
    with pytest.raises(RecipeError, match=r"refresh: no stage is called 'dop' \(did you mean 'dpo'\?\)"):
        check_stage_names(recipe, None, ["dop"])


def test_unknown_stages_of_compute_stand_in_the_one_list() -> None:
    wrong = {"extends": "tiny", "sft": {"learning_rate": 5}, "compute": {"stages": {"stf": {}, "dpoo": {}}}}
    with pytest.raises(RecipeError, match=r"has 3 problems(?s:.*)learning_rate(?s:.*)'stf'(?s:.*)'dpoo'"):
        load_recipe(wrong)
    with pytest.raises(RecipeError, match=r"'stf'(?s:.*)'dpoo'"):
        load_recipe(wrong | {"sft": {}})


def test_a_relative_path_behind_a_link_means_what_the_system_means(tmp_path: Path) -> None:
    (tmp_path / "real" / "recipes").mkdir(parents=True)
    (tmp_path / "real" / "base.jinja").write_text((CHAT_TEMPLATES / "tulu.jinja").read_text())
    (tmp_path / "real" / "recipes" / "mine.yaml").write_text("extends: tiny\nchat_template: ../base.jinja\n")
    (tmp_path / "other").symlink_to(tmp_path / "real" / "recipes")
    assert Path(load_recipe(str(tmp_path / "other" / "mine.yaml")).chat_template).is_file()


def test_a_file_without_suffix_is_a_recipe_and_json_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("extends: tiny\n")
    assert load_recipe("mine").name == "mine" and whole_path("mine") == str(tmp_path / "mine")
    assert whole_path('"dir/mine.yaml"') == '"dir/mine.yaml"' and whole_path("tiny") == "tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        {"compute.num_threads": 9, "compute": {"num_threads": 3}},
        {"compute": {"num_threads": 3}, "compute.num_threads": 9},
        {"data.sft.sources.0.limit": 9, "data.sft.sources.00.limit": 3},
    ],
)
def test_overrides_of_which_one_would_undo_the_other_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="set the same field; keep one"):
        load_recipe("tiny", overrides)
    load_recipe("tiny", {"compute.num_threads": 2, "compute.num_processes": 1, "sft.seed": 1})
