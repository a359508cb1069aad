"""The flow's parameters as Prefect sees them: a form with descriptions and bounds, and what it lets through."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from smoltulu.flows.audit import audit_data
from smoltulu.flows.evaluation import nightly_evaluation
from smoltulu.flows.ladder import smoltulu_ladder
from smoltulu.flows.pipeline import smoltulu
from smoltulu.flows.recipe import check_stage_names, load_recipe, preset_names, recipe_stages, stage_descriptions
from smoltulu.recipes import PREFECT_YAML
from smoltulu.tasks.stages import STAGES

SCHEMA: dict[str, Any] = parameter_schema(smoltulu).model_dump()  # as `prefect deploy` makes it


def accepts(**parameters: Any) -> bool:
    """Whether the server would create a run with these parameters."""
    document = {**SCHEMA, "$defs": SCHEMA["definitions"]}
    return not list(jsonschema.Draft202012Validator(document).iter_errors(parameters))


def test_the_form_describes_every_parameter_and_every_field() -> None:
    assert list(SCHEMA["properties"]) == ["recipe", "overrides", "until", "refresh"]
    assert all(field["description"] for field in SCHEMA["properties"].values())
    for flow in (nightly_evaluation, audit_data, smoltulu_ladder):
        assert all(field["description"] for field in parameter_schema(flow).model_dump()["properties"].values())
    definitions = SCHEMA["definitions"]
    assert {"Recipe", "ExtendingRecipe", "DPOSettings", "ComputeSettings"} <= definitions.keys()
    learning_rate = definitions["DPOSettings"]["properties"]["learning_rate"]
    assert learning_rate["exclusiveMinimum"] == 0 and learning_rate["exclusiveMaximum"] == 1
    assert definitions["DPOSettings"]["properties"]["loss_type"]["enum"][:2] == ["sigmoid_norm", "sigmoid"]


def test_no_run_makes_the_schema_of_a_recipe() -> None:
    """Prefect makes it from the function when the flow is imported: 0.2 s of every run."""
    assert "definitions" not in smoltulu.parameters.model_dump() or not smoltulu.parameters.definitions
    assert list(smoltulu.parameters.properties) == list(SCHEMA["properties"])


def test_presets_and_stages_are_select_boxes_with_descriptions() -> None:
    fields = SCHEMA["properties"]
    preset, path, *_ = fields["recipe"]["anyOf"]
    assert preset["enum"] == preset_names() and "enum" not in path
    stages = fields["refresh"]["items"]["enum"]
    assert fields["until"]["anyOf"][0]["enum"] == stages
    assert set(recipe_stages(load_recipe("tiny"))) <= set(stages) <= STAGES.keys()
    for name in preset_names():
        assert f"- `{name}`: {load_recipe(name).description}" in fields["recipe"]["description"]
    for name, purpose in stage_descriptions().items():
        assert purpose and f"- `{name}`: {purpose}" in fields["until"]["description"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"recipe": 7}, "recipe: give a preset's name, the path of a YAML file, or an object; given: 7"),
        ({"recipe": {"name": "x"}}, "base_model: is missing; add it"),
        ({"overrides": [1]}, "overrides: give an object"),
        ({"until": 3}, "until: give the name of a stage; given: 3"),
        ({"until": "rlhf"}, "until: no stage is called 'rlhf'"),
        ({"refresh": "sft"}, "refresh: give a list of stages"),
    ],
)
def test_wrong_parameters_get_a_message_of_ours(parameters: dict[str, Any], message: str) -> None:
    """Prefect does not check them (prefect.yaml): `... is not valid under any of the given schemas` helps nobody."""
    given = {"recipe": "tiny", "overrides": {}, "until": None, "refresh": [], **parameters}
    with pytest.raises(ValueError) as caught:
        check_stage_names(load_recipe(given["recipe"], given["overrides"]), given["until"], given["refresh"])
    assert message in str(caught.value)
    listed = yaml.safe_load(PREFECT_YAML.read_text())["deployments"]
    assert all(one["enforce_parameter_schema"] is False for one in listed)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"recipe": "tiny"},
        {"recipe": {"extends": "tiny", "name": "mine", "dpo": {"beta": 2}}},
        {"recipe": "tiny", "overrides": {"dpo.learning_rate": 5e-7}, "until": "dpo", "refresh": ["sft"]},
    ],
)
def test_what_the_readme_writes_is_let_through(parameters: dict[str, Any]) -> None:
    assert accepts(**parameters)


@pytest.mark.parametrize(
    "parameters", [{"recipe": 7}, {"refresh": "sft"}, {"overrides": [1]}, {"recipe": {"name": "x"}}]
)
def test_wrong_types_are_refused_by_the_form(parameters: dict[str, Any]) -> None:
    assert not accepts(**parameters)
