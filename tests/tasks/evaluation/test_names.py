"""Names of evaluation tasks and metrics: refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoltulu.flows.recipe import RecipeError, check_evaluation, load_recipe, preset_names
from smoltulu.schemas.evaluation import EvaluationTask
from smoltulu.tasks.evaluation import names
from smoltulu.tasks.evaluation.lm_eval import task_manager


def task(name: str, metric: str, **others: object) -> EvaluationTask:
    """With files where its definition ships here, as that needs them."""
    files = {"files": {"test": {"path": "rows.jsonl", "format": "text"}}} if name in names.shipped() else {}
    return EvaluationTask.model_validate({"name": name, "metric": metric, **files, **others})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_every_preset_names_tasks_and_metrics_that_exist() -> None:
    for name in preset_names():
        check_evaluation(load_recipe(name))


def test_the_shipped_names_are_those_of_lm_eval() -> None:
    assert set(names.shipped()) == set(task_manager(stock=False).all_tasks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (task("gsm8kk", "exact_match,strict-match"), "did you mean gsm8k"),
        (task("tiny_arithmetics", "exact_match,strict-match"), "did you mean tiny_arithmetic"),
        (task("gsm8k", "exact_match"), "has no metric 'exact_match'; it reports: exact_match,strict-match, "),
        (task("gsm8k", "acc,none"), "exact_match,flexible-extract"),
        (task("tiny_arithmetic", "exact_match,none"), "did you mean exact_match,strict-match?"),
        (task("arc_easy", "acc_nrom,none"), "did you mean acc_norm,none"),
        (task("local_arc_easy", "none"), "has no metric 'none'; it reports: acc,none"),
        (task("tiny_arithmetic", "exact_match,strict-match", files={}), "reads local files: give evaluation.tasks"),
        (task("piqa", "acc,none", files={"test": {"repository": "a/b", "format": "text"}}), "got the repository 'a/b'"),
        (task("tiny_arithmetic", "exact_match,strict-match", num_fewshot=3), "remove num_fewshot: 3"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(given: EvaluationTask, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        names.check_names((task("local_piqa", "acc,none"), given))
    assert message in str(caught.value) and "local_piqa" not in str(caught.value).partition(";")[0]


def test_all_wrong_names_are_in_one_message_of_a_recipe() -> None:
    wrong = [{"name": "gsm8kk", "metric": "acc,none"}, {"name": "piqa", "metric": "acc"}]
    with pytest.raises(RecipeError) as caught:
        check_evaluation(load_recipe("smoltulu-1130", {"evaluation.tasks": wrong}))
    assert "'gsm8kk'" in str(caught.value) and "task 'piqa' has no metric 'acc'" in str(caught.value)
    check_evaluation(load_recipe("tiny", {"evaluation": None}))


def test_a_held_out_kind_that_nobody_knows_is_refused_with_the_nearest() -> None:
    held_out = {"num_prompts": 8, "every_steps": 1, "kinds": ["validate_title"]}
    check_evaluation(load_recipe("tiny", {"evaluation": None, "rlvr.held_out": held_out}))
    wrong = load_recipe("tiny", {"evaluation": None, "rlvr.held_out": held_out | {"kinds": ["validate_tilte"]}})
    with pytest.raises(RecipeError, match=r"rlvr\.held_out\.kinds: unknown kind 'validate_tilte' \(did you mean 'vali"):
        check_evaluation(wrong)


@pytest.mark.parametrize("name", ["mmlu", "ifeval", "bbh_fewshot", "ai2_arc"])
def test_what_only_a_run_can_say_is_not_refused(name: str) -> None:
    """Groups, tags, and tasks whose own functions report their metrics."""
    names.check_names((task(name, "any,thing"),))


def test_the_index_is_built_once_and_shipped_names_need_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names.check_names((task("piqa", "acc,none"),))
    (file,) = (cache / "smoltulu").iterdir()

    def no_process(*arguments: object, **options: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(subprocess, "run", no_process)
    begin = time.perf_counter()
    names.check_names((task("piqa", "acc,none"),))
    assert time.perf_counter() - begin < 2
    names.check_names((task("tiny_arithmetic", "exact_match,strict-match"),))
    file.write_text("{")
    with pytest.raises(AssertionError, match="built again"):
        names.check_names((task("piqa", "acc,none"),))


def test_a_cache_that_cannot_be_written_and_an_index_that_cannot_be_built_refuse_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    built = {"piqa": [["acc,none"], False]}
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(built))
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    names.check_names((task("piqa", "acc,none"),))
    with pytest.raises(ValueError, match="'piqq' is neither"):
        names.check_names((task("piqq", "acc,none"),))
    for nonsense in ("", "nonsense", "[]", '{"piqa": 3}', '{"piqa": ["acc", false]}', '{"piqa": [1, 2, 3]}'):
        done.stdout = nonsense
        names.check_names((task("piqq", "acc,none"),))


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        ({"output_type": "multiple_choice"}, ["acc,none", "acc_norm,none"]),
        ({"metric_list": [{"metric": "f1"}], "filter_list": [{"name": "a"}, {"name": "b"}]}, ["f1,a", "f1,b"]),
        ({"metric_list": [{"metric": "!function utils.own"}]}, None),
        ({"metric_list": [{"metric": "/x/utils.own"}]}, None),
        ({"metric_list": [{}]}, None),
        ({"metric_list": [{"metric": "f1"}], "process_results": "!function utils.own"}, None),
        ({"output_type": "another"}, None),
        ({}, None),
    ],
)
def test_metrics_of_a_definition(definition: dict[str, object], expected: list[str] | None) -> None:
    assert names.metrics_of(definition) == expected


def test_the_check_imports_nothing_heavy() -> None:
    code = "import sys; from smoltulu.tasks.evaluation import names; names.shipped(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lm_eval", "datasets", "transformers"} & set(done.stdout.split())
