"""Suites: an entry of `evaluation.tasks` that stands for several."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from smoltulu.schemas.evaluation import EvaluationSettings
from smoltulu.schemas.suites import SUITES


def test_a_suite_stands_for_its_tasks_and_gives_the_same_settings_as_the_list() -> None:
    written = EvaluationSettings.model_validate({"tasks": SUITES["paper"]})
    assert EvaluationSettings.model_validate({"tasks": [{"suite": "paper"}]}) == written
    assert [task.name for task in written.tasks] == [
        "paper_arc", "paper_bbh", "paper_gsm8k", "paper_hellaswag", "paper_ifeval", "paper_mmlu_pro", "paper_piqa",
    ]  # fmt: skip
    assert EvaluationSettings.model_validate(written.model_dump()) == written


def test_a_suites_limit_holds_for_each_of_its_tasks() -> None:
    given = [{"name": "gsm8k", "metric": "exact_match,strict-match"}, {"suite": "paper", "limit": 20}]
    tasks = EvaluationSettings.model_validate({"tasks": given}).tasks
    assert tasks[0].limit is None and {task.limit for task in tasks[1:]} == {20} and len(tasks) == 8


def test_every_suite_is_a_list_of_valid_tasks() -> None:
    for name in SUITES:
        assert EvaluationSettings.model_validate({"tasks": [{"suite": name}]}).tasks


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"unknown suite 'papre'; there are: .*paper.*did you mean paper\?"):
        EvaluationSettings.model_validate({"tasks": [{"suite": "papre"}]})
    with pytest.raises(ValidationError, match="a suite has the field limit only; got num_fewshot"):
        EvaluationSettings.model_validate({"tasks": [{"suite": "paper", "num_fewshot": 0}]})
    with pytest.raises(ValidationError, match=r"unknown suite \['paper'\]"):
        EvaluationSettings.model_validate({"tasks": [{"suite": ["paper"]}]})


def test_a_form_offers_suites_beside_tasks() -> None:
    listed = EvaluationSettings.model_json_schema()["properties"]["tasks"]["items"]["anyOf"]
    assert [one["$ref"].rpartition("/")[2] for one in listed] == ["EvaluationTask", "Suite"]
