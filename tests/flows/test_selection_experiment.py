"""An experiment with selection: what is refused before it runs, and its page and tables over cells written by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.flows.sweeping.checks import check_apart, check_selection
from smoltulu.flows.sweeping.extension import add
from smoltulu.flows.sweeping.gather import gather
from smoltulu.flows.sweeping.grid import cells_of, load_sweep
from smoltulu.flows.sweeping.results import export_table, recommend, up_to_date_page, write_page
from smoltulu.flows.sweeping.selection_results import experiment_of
from smoltulu.flows.sweeping.states import records_of
from smoltulu.schemas.sweep import Place, SweepSettings
from tests.hand_store import HandStore
from tests.planted_sweep import plant
from tests.schemas.test_selection_sweep import ARMS, BESIDE, MAIN, VALUES

#: Of four tasks: two that reason, two of patterns; one of them by bits per byte.
TASKS = [
    {"task": "skill_sorting", "metric": "exact_match,none", "task_class": "reasoning"},
    {"task": "skill_modular", "metric": "exact_match,none", "task_class": "reasoning"},
    {"task": "skill_copy", "metric": "bits_per_byte,none", "task_class": "pattern", "lower_is_better": True},
    {"task": "skill_copy", "metric": "exact_match,none", "task_class": "pattern"},
]
WEIGHTS_FILE: dict[str, str] = {}
KEPT = {"selected": 1000, "rds": 1004, "random": 1008, "longest": 996}


def sweep(**changes: Any) -> SweepSettings:
    return SweepSettings.model_validate(VALUES | {"tasks": TASKS} | changes)


def score(task: str, place: Place) -> float:
    """`selected` is better at both, `longest` at patterns; bits per byte are lower where that is."""
    gain = {"selected": 0.4, "longest": 0.4 if task == "skill_copy" else 0.0}.get(place.arm, 0.0)
    luck = 0.02 * ((place.seed * 7 + len(place.arm)) % 5 - 2)
    return 1 + gain + luck


def planted_score(task: str, place: Place) -> float:
    """The second score of a task is planted like its first: only the first decides."""
    return -score(task, place) if task == "skill_copy" else score(task, place)


def rows_of(store: HandStore, place: Place) -> Ref:
    """Tokenised rows, made of chosen ones but in the arm `full`."""
    if place.arm == "full":
        rows = store.make("dataset", "dataset-sft")
        counts = {"num_rows": 80, "num_tokens": 4000}
    else:
        kept = KEPT[place.arm]
        outputs = {
            "kind": "sft", "method": "random", "num_rows_read": 80, "num_rows": 20, "num_kept_tokens": kept,
            "weights_file": WEIGHTS_FILE.get(place.arm),
        }  # fmt: skip
        rows = store.make("selection", f"selected {place.arm} {place.seed}", outputs=outputs)
        counts = {"num_rows": 20, "num_tokens": 1000}
    return store.make("preflight", f"rows {place.arm} {place.seed}", {"dataset": rows}, outputs=counts)


def planted(root: Path, settings: SweepSettings) -> HandStore:
    return plant(root, settings, planted_score, num_items=12, noise=0.02, rows_of=rows_of)


# ------------------------------------------------------------------------------------------------- before anything runs


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ({"longest": {"overrides": {"selection.method": "random"}}}, "its role needs length, keep.order highest"),
        (
            {"longest": {"overrides": {"selection.method": "length", "selection.keep.order": "lowest"}}},
            "arm longest has selection.method length, keep.order lowest; its role needs length, keep.order highest",
        ),
        ({"random": ARMS["random"] | {"overrides": {"selection.method": "length"}}}, "its role needs random"),
        ({"selected": {"overrides": {"sft.weight_decay": 0.1}}}, "its role needs a method that scores rows"),
        ({"full": {"overrides": {"selection.method": "length"}}}, "its role needs none"),
    ],
)
def test_arms_that_are_not_what_their_roles_say_are_refused(arms: dict[str, Any], told: str) -> None:
    made = sweep(arms=ARMS | {"rds": {"overrides": {"selection.method": "perplexity"}}} | arms)
    with pytest.raises(ValueError, match=re.escape(told)):
        check_selection(made, cells_of(made))


@pytest.mark.parametrize("own", [{}, {"selection.method": "length"}, {"selection.over": "whole"}])
def test_the_arm_lowest_of_a_selection_is_the_other_end_of_the_first_selector(own: dict[str, Any]) -> None:
    """Else the page would call rows those that a selector ranks last which it does not."""
    roles = {"selectors": ["selected"], "lowest": "lowest"}
    blocks = [MAIN | {"arms": ["random", "longest", "selected", "lowest"]}]
    overrides = {"selection.method": "perplexity", "selection.keep.order": "lowest"}
    arms = {name: ARMS[name] for name in ("selected", "random", "longest")}
    for given in (overrides, overrides | own | ({} if own else {"selection.keep.order": "highest"})):
        made = sweep(selection=roles, blocks=blocks, arms=arms | {"lowest": {"overrides": given}})
        if given == overrides:
            check_selection(made, cells_of(made))
        else:
            with pytest.raises(ValueError, match="the rows that arm selected ranks last; give it the same block"):
                check_selection(made, cells_of(made))


@pytest.mark.parametrize(
    ("overrides", "own", "told"),
    [
        ({"selection.keep.share": 0.25}, {}, "not at equal tokens (random: share 0.25"),
        ({}, {"selection.keep.tokens": 900}, "not at equal tokens"),
        ({"selection.keep.tokens": 900, "selection.sets": ["rlvr"]}, {}, "there is no data.rlvr to select from"),
    ],
)
def test_arms_at_other_amounts_are_refused(overrides: dict[str, Any], own: dict[str, Any], told: str) -> None:
    keep = {"selection.keep.tokens": 1000} if not overrides else {}
    arms = {name: one | {"overrides": one["overrides"] | keep} for name, one in ARMS.items()}
    arms["rds"] = {"overrides": {"selection.method": "perplexity"} | (own or keep)}
    made = sweep(arms=arms, overrides=overrides)
    with pytest.raises(ValueError, match=re.escape(told)):
        check_selection(made, cells_of(made))


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_has_a_verdict_a_class_and_says_what_the_arms_kept(tmp_path: Path) -> None:
    settings = sweep()
    store = planted(tmp_path / "store", settings)
    page, lines = write_page(settings, store.root)
    text = page.read_text()
    verdicts = [line for line in lines if line.startswith("verdict")]
    assert [re.sub(r" \(.*", "", line) for line in verdicts] == [
        "verdict   selected, reasoning: beats random and longest",
        "verdict   selected, pattern: does not",
        "verdict   rds, reasoning: does not",
        "verdict   rds, pattern: does not",
    ]
    assert "tokens    kept tokens: 996 to 1,008 in all arms with chosen rows" in lines
    assert any(
        re.match(r"arm       selected, pattern: bits_per_byte -1\.\d+ ± 0\.\d+ \(5 seeds\), better", line)
        for line in lines
    )
    assert "reasoning: selected beats random and longest; pattern: no selector beats random and longest." in text
    # Beside it: the full set at equal tokens (1.02 epochs of 4,000 tokens) and at four times the tokens.
    assert "full at 4.1 epochs" in text and ">full<" in text
    assert text.count('class="chart drawn"') == 2 and "all 8 tests of this page (Holm)" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text
    rows = list(csv.DictReader((page.parent / "arms.csv").open()))
    assert {(row["task_class"], row["task"]) for row in rows} == {
        ("reasoning", ""), ("reasoning", "skill_sorting"), ("reasoning", "skill_modular"), ("pattern", ""),
        ("pattern", "skill_copy"),
    }  # fmt: skip
    chosen = next(row for row in rows if row["arm"] == "selected" and not row["task"])
    assert (chosen["num_kept_tokens"], chosen["num_rows"], chosen["num_seeds"]) == ("1000", "20", "5")
    assert float(chosen["low"]) < float(chosen["better_than_random"]) < float(chosen["high"])
    again, same = up_to_date_page(settings, store.root)
    assert again == page and same == lines
    assert export_table(settings, store.root, tmp_path / "cells.csv") == 26 * 4
    with pytest.raises(ValueError, match="compares chosen rows"):
        recommend(settings, store.root)
    with pytest.raises(ValueError, match="has no best place"):
        add(settings, store.root, edges=3)


def test_unequal_tokens_and_missing_seeds_have_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = sweep()
    monkeypatch.setitem(KEPT, "longest", 1100)
    store = planted(tmp_path / "store", settings)
    judged = experiment_of(gather(settings, store.root)).judged
    assert {one.word for one in judged} == {"no verdict"}
    assert "arm selected kept 1,000 and arm longest 1,100" in judged[0].reason
    monkeypatch.setitem(KEPT, "longest", 1000)

    def some(task: str, place: Place) -> Any:
        return "pending" if place.arm == "random" and place.seed > 2 else planted_score(task, place)

    fewer = plant(tmp_path / "fewer", settings, some, rows_of=rows_of)
    judged = experiment_of(gather(settings, fewer.root)).judged
    assert {one.reason for one in judged} == {"arm random has scores of 3 seeds, 5 are needed; run the rest"}
    nothing = plant(tmp_path / "nothing", settings, lambda task, place: "pending")
    page, lines = write_page(settings, nothing.root)
    assert lines == [] and "No arm has scores beside those of random yet." in page.read_text()


def test_an_arm_that_weighs_all_rows_of_a_selection_has_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps every row, and is trained on as many tokens."""
    settings = sweep()
    monkeypatch.setitem(KEPT, "selected", 4000)
    monkeypatch.setitem(WEIGHTS_FILE, "selected", "weights.parquet")
    experiment = experiment_of(gather(settings, planted(tmp_path / "store", settings).root))
    assert {one.word for one in experiment.judged} == {"beats random and longest", "does not"}
    cells = experiment.settings[0].cells["selected"]
    assert {one.num_kept_tokens for one in cells if one is not None} == {None}


def test_twenty_one_runs_of_random_are_told_as_pairs(tmp_path: Path) -> None:
    more = MAIN | {"name": "more", "arms": ["random"], "seeds": list(range(5, 21))}
    settings = sweep(blocks=[MAIN, BESIDE, more])
    store = planted(tmp_path / "store", settings)
    (at,) = experiment_of(gather(settings, store.root)).settings
    assert at.null is not None and at.null.num_pairs == 210
    assert f"{at.null.num_found} of 210 pairs of its 21 runs differ" in at.null_text


def test_several_rates_are_judged_each_by_itself(tmp_path: Path) -> None:
    blocks = [{**block, "log2_learning_rate": {"low": -10, "high": -9}} for block in (MAIN, BESIDE)]
    settings = sweep(blocks=blocks)
    store = planted(tmp_path / "store", settings)
    experiment = experiment_of(gather(settings, store.root))
    assert [one.name for one in experiment.settings] == [
        "rate 0.000977, batch 8, 4,096 tokens", "rate 0.00195, batch 8, 4,096 tokens",
    ]  # fmt: skip
    assert len(experiment.judged) == 2 * 2 * 2 and experiment.num_tests == 16


def test_arms_on_other_items_are_no_experiment_with_selection(tmp_path: Path) -> None:
    settings = sweep()
    store = planted(tmp_path / "store", settings)
    found = gather(settings, store.root)
    from dataclasses import replace

    other = [replace(one, items=("another", *one.items[1:])) for one in found.scores["rds"]]
    with pytest.raises(ValueError, match="have other items of skill_sorting"):
        experiment_of(replace(found, scores={**found.scores, "rds": other}))


def test_random_draws_are_cells_of_their_own_and_other_arms_share_their_rows() -> None:
    made = load_sweep(VALUES | {"arms": {**ARMS, "rds": {"overrides": {"selection.method": "perplexity",
                                                                  "selection.by": "turn"}}}})  # fmt: skip
    cells = list(cells_of(made))
    assert len({record.training for record in records_of(cells)}) == len(cells)
    check_selection(made, cells)
    check_apart(made, records_of(cells))


@pytest.mark.slow
def test_an_experiment_with_selection_really_runs(tmp_path: Path) -> None:
    """Two skills, a base model that learned little, eleven cells of some steps: from the command to the verdict."""
    from tests.flows.cli.test_sweep_command import started

    sources = [{"generated": f"mixed_{skill}.jsonl", "format": "messages"} for skill in ("sorting", "copy")]
    evaluated = [
        {"name": f"skill_{skill}", "metric": "exact_match,none",
         "files": {"test": {"generated": "eval_skills.jsonl", "format": "text"}}} for skill in ("sorting", "copy")
    ]  # fmt: skip
    values = VALUES | {
        "overrides": {
            "selection.keep.token_share": 0.25,
            "selection.max_length": 128,
            "sft.max_length": 128,
            "world.num_pretrain": 200,
            "world.skills": {"num_sft": 8, "num_eval": 10, "mixed": {"num_rows": 40}},
            "base_model.scratch.num_steps": 20,
            "data.sft.sources": sources,
            "evaluation.tasks": evaluated,
        },
        "num_workers": 1,
        "selection": {"selectors": ["selected"]},
        "arms": {name: ARMS[name] for name in ("selected", "random", "longest")},
        "blocks": [
            MAIN | {"arms": ["random"], "max_tokens": [2048]},
            MAIN | {"name": "others", "arms": ["longest", "selected"], "max_tokens": [2048], "seeds": [0, 1, 2]},
        ],
        "tasks": [task for task in TASKS if task["task"] != "skill_modular"],
    }
    file = tmp_path / "chosen.yaml"
    file.write_text(json.dumps(values))
    process = started(str(file), store=tmp_path / "store")
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert "cells     sweep chosen: 11 done" in output
    assert re.search(r"verdict   selected, reasoning: (beats random and longest|does not) \(against random: ", output)
    assert re.search(r"arm       selected, pattern: bits_per_byte \d", output) and "tokens    kept tokens: " in output
    page = (tmp_path / "sweeps" / "chosen" / "report.html").read_text()
    assert "Does a selector beat its controls?" in page
