"""The file of published figures: what stands in it, and what is refused of one that was edited wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from math import sqrt
from typing import Any

import pytest

from smoltulu.flows.reading import read_file
from smoltulu.recipes import PUBLISHED
from smoltulu.schemas.published import Definition
from smoltulu.tasks.comparison.paired import holm
from smoltulu.tasks.tables.published import load_published, parse_published
from smoltulu.tasks.tables.significance import Figure, unpaired_p


def test_the_shipped_file_is_whole() -> None:
    published = load_published()
    assert set(published.tables) >= {"3", "6", "8", "9"}
    for name in ("3", "6", "8", "9"):
        table = published.tables[name]
        for one in table.models:
            assert set(published.models[one].figures) >= set(table.rows), f"{one} has gaps in table {name}"
    assert parse_published(read_file(PUBLISHED), "again") == published  # no key twice, within bounds


#: RewardBench: pairs that each model ranks right, of chat 358, hard 456, safety 740, maths 447, code 984.
CORRECT = {"rm-1130": (337, 199, 559, 226, 841), "rm-1207": (299, 204, 478, 257, 511)}


@pytest.mark.parametrize("name", CORRECT)
def test_reward_models_figures_are_whole_numbers_of_pairs(name: str) -> None:
    figures = load_published().models[name].figures
    chat, hard, safety, maths, code = CORRECT[name]
    assert figures["rb_chat"] == round(100 * chat / 358, 2)
    assert figures["rb_chat_hard"] == round(100 * hard / 456, 2)
    assert figures["rb_safety"] == round(100 * safety / 740, 2)
    assert figures["rb_reasoning"] == pytest.approx(50 * (maths / 447 + code / 984), abs=0.00501)
    assert figures["rb_average"] == round(100 * (chat + hard + safety + maths + code) / 2985, 2)


def test_numbers_of_items() -> None:
    rows = load_published().rows
    sums = {name: sum(row.num_items) for name, row in rows.items()}
    assert sums["bbh"] == 6511 and len(rows["bbh"].num_items) == 27
    assert (sums["arc"], sums["gsm8k"], sums["hellaswag"], sums["ifeval"]) == (3548, 1319, 10042, 541)
    assert (sums["mmlu_pro"], sums["piqa"], sums["rb_average"]) == (12032, 1838, 2985)
    assert sum(sums[name] for name in ("rb_chat", "rb_chat_hard", "rb_safety", "rb_reasoning")) == 2985
    assert rows["ufb"].num_items == () and rows["ufb"].stderr(73.17) is None


def test_sampling_error_by_hand() -> None:
    def definition(*num_items: int) -> Definition:
        return Definition(title="t", task="t", metric="m", num_items=num_items)

    assert definition(100).stderr(50) == pytest.approx(5)
    assert definition(1319).stderr(51.6) == pytest.approx(100 * sqrt(0.516 * 0.484 / 1319))
    # The mean of two members of 100 and 25 items: sqrt(.25 / 100 + .25 / 25) / 2 = 0.0559
    assert definition(100, 25).stderr(50) == pytest.approx(5.590, abs=1e-3)
    assert definition(100).stderr(0) == 0


def test_what_the_unpaired_test_sees_of_the_papers_table_9() -> None:
    """As docs/tables.md says: of 21 pairs of columns, those that differ at 5 %, all of a row together."""
    published = load_published()
    columns = [name for name in published.tables["9"].models if "paper" in published.models[name].sources]
    assert len(columns) == 7
    seen = {}
    for row in published.tables["9"].rows:
        figures = [published.models[name].figures[row] for name in columns]
        made = [Figure(figure, published.rows[row].stderr(figure)) for figure in figures]
        p_values = [unpaired_p(one, other) for one, other in combinations(made, 2)]
        seen[row] = sum(value < 0.05 for value in holm([value for value in p_values if value is not None]))
    assert seen == {"arc": 17, "bbh": 8, "gsm8k": 11, "hellaswag": 17, "ifeval": 11, "mmlu_pro": 16, "piqa": 2}


def test_rows_are_those_of_suite_paper() -> None:
    """The suite's own list of tasks and headline metrics."""
    suites = pytest.importorskip("smoltulu.schemas.suites")
    rows = load_published().rows.values()
    named = {(row.task, row.metric) for row in rows if row.task.startswith("paper_")}
    assert named == {(task["name"], task["metric"]) for task in suites.SUITES["paper"]}


def test_rows_of_table_8_are_what_rewardbench_reports() -> None:
    rewardbench = pytest.importorskip("smoltulu.tasks.evaluation.rewardbench")
    rows = load_published().rows
    for name in ("rb_chat", "rb_chat_hard", "rb_safety", "rb_reasoning"):
        assert sum(rows[name].num_items) == sum(rewardbench.SECTIONS[rows[name].metric].values())
    assert sum(rows["rb_average"].num_items) == sum(rewardbench.SUBSETS.values())


def _edit(*place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for name in place[:-1]:
            values = values[name]
        values[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _edit("models", "sft-1130", "figures", "arc", value=510),
            r"models.sft-1130.figures.arc: Input should be less",
        ),
        (
            _edit("models", "sft-1130", "figures", "arc", value="51,0"),
            r"models.sft-1130.figures.arc: Input should be a",
        ),
        (
            _edit("models", "sft-1130", "figures", "arc", value=float("nan")),
            r"models.sft-1130.figures.arc: Input should",
        ),
        (
            _edit("models", "sft-1130", "figures", "arc", value=51.03),
            "models.sft-1130.figures.arc: 51.03 has more decimals than the row, 1",
        ),
        (
            _edit("models", "sft-1130", "figures", "acr", value=51.0),
            "models.sft-1130.figures: no row is called 'acr'; did you mean 'arc'?",
        ),
        (
            _edit("models", "sft-1130", "sources", value=["blog"]),
            "models.sft-1130.sources: no source is called 'blog'; there are paper, card-instruct",
        ),
        (
            _edit("models", "sft-1130", "sources", value=[]),
            "models.sft-1130.sources: Tuple should have at least 1 item",
        ),
        (_edit("rows", "arc", "num_fewshots", value=3), "rows.arc.num_fewshots: Extra inputs are not permitted"),
        (_edit("rows", "arc", "num_items", value=[0]), "rows.arc.num_items.0: Input should be greater than or equal"),
        (
            _edit("tables", "3", "models", value=["sft-1130", "sft-1131"]),
            "tables.3.models: no model is called 'sft-1131'; did you mean 'sft-1130'?",
        ),
        (
            _edit("tables", "3", "models", value=["sft-1130", "sft-1130"]),
            "tables.3.models: 'sft-1130' is named twice; keep one of them",
        ),
        (
            _edit("tables", "8", "models", value=["sft-1130"]),
            "tables.8.models: 'sft-1130' has none of its rows; add figures, or take it out",
        ),
        (_edit("tables", "3", "kind", value="model"), "tables.3.kind: Input should be 'language_model'"),
        (_edit("format", value=2), "format: Input should be 1"),
    ],
)
def test_a_wrong_edit_is_refused_by_row(change: Callable[[dict[str, Any]], None], said: str) -> None:
    values = copy.deepcopy(load_published().model_dump(mode="json"))
    change(values)
    with pytest.raises(ValueError, match=r"^mine.yaml: .*") as caught:
        parse_published(values, "mine.yaml")
    assert said in str(caught.value)


def test_of_several_wrong_edits_the_first_is_told_and_how_many_there_are() -> None:
    values = copy.deepcopy(load_published().model_dump(mode="json"))
    values["tables"]["3"]["rows"].append("mmlu")
    values["models"]["sft-1130"]["sources"].append("blog")
    with pytest.raises(ValueError, match=r"sources: no source is called 'blog'; .* \(and 1 more\)"):
        parse_published(values, "mine.yaml")


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml: published figures are a mapping with format, sources, rows"):
        parse_published(["3"], "mine.yaml")
    with pytest.raises(ValueError, match=r"got NoneType; recipes/published/smoltulu\.yaml shows the form"):
        parse_published(None, "mine.yaml")
