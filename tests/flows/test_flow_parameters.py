"""The flow's parameters as Prefect sees them: a form with descriptions and bounds, and what it lets through."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from smoltulu.flows.pipeline import smoltulu

SCHEMA: dict[str, Any] = smoltulu.parameters.model_dump()


def accepts(**parameters: Any) -> bool:
    """Whether the server would create a run with these parameters."""
    document = {**SCHEMA, "$defs": SCHEMA["definitions"]}
    return not list(jsonschema.Draft202012Validator(document).iter_errors(parameters))


def test_the_form_describes_every_parameter_and_every_field() -> None:
    assert list(SCHEMA["properties"]) == ["recipe", "overrides", "until", "refresh"]
    assert all(field.get("description") or field.get("title") for field in SCHEMA["properties"].values())
    definitions = SCHEMA["definitions"]
    assert {"Recipe", "ExtendingRecipe", "DPOSettings", "ComputeSettings"} <= definitions.keys()
    learning_rate = definitions["DPOSettings"]["properties"]["learning_rate"]
    assert learning_rate["exclusiveMinimum"] == 0 and learning_rate["exclusiveMaximum"] == 1
    assert definitions["DPOSettings"]["properties"]["loss_type"]["enum"][:2] == ["sigmoid_norm", "sigmoid"]


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
def test_wrong_types_are_refused_before_a_run_is_made(parameters: dict[str, Any]) -> None:
    assert not accepts(**parameters)
