"""Rows of tables: which figures may stand beside each other, what is bold, what is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from smoltulu.tasks.comparison.evaluations import Item, Measured
from smoltulu.tasks.tables.build import not_comparable, paper_table, stage_tables, tables_of
from smoltulu.tasks.tables.published import load_published, parse_published
from smoltulu.tasks.tables.values import MeasuredModel, Row, Table
from tests.tasks.tables.scores import model, right, score, texts

PUBLISHED = load_published()


def row_of(table: Table, title: str) -> Row:
    [found] = [row for row in table.rows if row.title == title]
    return found


def test_a_measured_column_beside_the_published_ones() -> None:
    """PIQA 1,838 items: published 72.7, 76.9, 74.4 have errors 1.04, 0.98, 1.02; ours 74.0 ± 1.0 differs from none."""
    table = paper_table("3", PUBLISHED, [model("fox SFT", score(value=0.74))])
    assert [column.title for column in table.published] == [
        "SmolTulu SFT-1130", "SmolTulu SFT-1207", "SmolLM2-1.7B-Instruct"
    ]  # fmt: skip
    assert [column.letter for column in table.published] == ["A", "B", "C"]
    piqa = row_of(table, "PIQA")
    assert texts(piqa.published) == ["72.7", "76.9", "74.4"]
    [cell] = piqa.measured
    assert cell is not None and (cell.value, cell.num_samples) == ("74.0 ± 1.0", "1,838")
    assert not (cell.bold or cell.above or cell.below or cell.not_comparable)
    assert piqa.source == "lm-eval 0.4.13, paper_piqa version 1.0, 0-shot, bfloat16"


def test_above_and_below_the_published_figures() -> None:
    """80.0 ± 1.0 against 76.9 ± 0.98: z = 2.21, p = 0.027, three tests (Holm: the largest is not multiplied)."""
    [cell] = row_of(paper_table("3", PUBLISHED, [model("SFT", score(value=0.80))]), "PIQA").measured
    assert cell is not None and cell.above == ("A", "B", "C") and cell.below == ()
    [cell] = row_of(paper_table("3", PUBLISHED, [model("SFT", score(value=0.69))]), "PIQA").measured
    assert cell is not None and cell.above == () and cell.below == ("A", "B", "C")
    # 0.725: 72.7 is not far, 76.9 is: z = 3.14, p = 0.0017, times 3.
    [cell] = row_of(paper_table("3", PUBLISHED, [model("SFT", score(value=0.725))]), "PIQA").measured
    assert cell is not None and (cell.above, cell.below) == ((), ("B",))


def test_missing_is_none_and_never_nought() -> None:
    table = paper_table("3", PUBLISHED, [model("SFT", score(value=0.74)), model("other", score(value=0.0))])
    arc = row_of(table, "ARC (average)")
    assert texts(arc.published) == ["51.0", "55.6", "51.7"] and arc.measured == (None, None) and arc.source == ""
    assert texts(row_of(table, "PIQA").measured) == ["74.0 ± 1.0", "0.0 ± 1.0"]
    values = {"models": {name: one.model_dump() for name, one in PUBLISHED.models.items()}}
    del values["models"]["sft-1207"]["figures"]["piqa"]
    lacking = parse_published(PUBLISHED.model_dump() | values, "mine.yaml")
    assert texts(row_of(paper_table("3", lacking, []), "PIQA").published) == ["72.7", None, "74.4"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, []),
        ({"limited": True, "num_samples": 100}, ["part of the task, 100 of 1,838 items"]),
        ({"num_samples": 1800}, ["1,800 items, published on 1,838"]),
        ({"num_fewshot": 5}, ["5-shot, published 0-shot"]),
        ({"num_fewshot": None}, []),
        ({"template_digest": "none"}, ["without a chat template, published with one"]),
        ({"task": "piqa"}, ["piqa is defined otherwise than paper_piqa of suite paper"]),
        ({"metric": "acc,none"}, ["metric acc,none, published acc_norm,none"]),
        (
            {"details": {"max_gen_toks_asked": 1280, "max_gen_toks": 256}},
            ["answers cut at 256 tokens of 1280"],
        ),
    ],
)
def test_why_a_score_is_not_comparable(changes: dict[str, Any], reason: list[str]) -> None:
    assert not_comparable(score(**changes), PUBLISHED.rows["piqa"], model("SFT")) == reason


def test_a_shorter_model_is_not_comparable() -> None:
    reason = not_comparable(score(), PUBLISHED.rows["piqa"], model("SFT", max_length=256))
    assert reason == ["at most 256 tokens, published with 2,048"]
    assert not_comparable(score(), PUBLISHED.rows["piqa"], model("SFT", max_length=None)) == []


def test_a_part_of_the_task_is_shown_and_marked_and_takes_no_test() -> None:
    table = paper_table("3", PUBLISHED, [model("SFT", score(value=0.10, limited=True, num_samples=100))])
    [cell] = row_of(table, "PIQA").measured
    assert cell is not None and cell.not_comparable and (cell.above, cell.below) == ((), ())
    [note] = cell.notes
    assert table.notes[note - 1] == "not comparable: part of the task, 100 of 1,838 items"


def test_stock_tasks_are_rows_of_their_own_without_published_figures() -> None:
    stock = score("piqa", value=0.75)
    table = paper_table("3", PUBLISHED, [model("SFT", score(value=0.74), stock)])
    titles = [row.title for row in table.rows]
    assert titles.index("piqa") == titles.index("PIQA") + 1
    near = row_of(table, "piqa")
    assert near.published == (None, None, None) and near.detail == "acc_norm,none"
    [cell] = near.measured
    assert cell is not None and cell.not_comparable and cell.value == "75.0 ± 1.0"


def test_other_shots_and_other_metrics_stand_below_their_row() -> None:
    five, plain = score(value=0.6, num_fewshot=5), score(value=0.5, metric="acc,none")
    table = paper_table("3", PUBLISHED, [model("SFT", five, plain, score("paper_piqa", "bits_per_byte,none", 0.9))])
    assert [row.title for row in table.rows][-3:] == ["PIQA", "paper_piqa", "paper_piqa"]  # no bits in percent
    assert row_of(table, "PIQA").measured == (None,)


def test_only_models_of_the_tables_stages() -> None:
    ours = [model(name, score(), subject=name) for name in ("base_model", "sft", "dpo", "rlvr")]
    shown = {name: [column.title for column in paper_table(name, PUBLISHED, ours).measured] for name in "369"}
    assert shown == {"3": ["sft"], "6": ["dpo"], "9": ["base_model", "sft", "dpo", "rlvr"]}
    reward = model("RM", score("rewardbench", "micro_accuracy"), subject="reward_model", kind="reward_model")
    assert [column.title for column in paper_table("8", PUBLISHED, [*ours, reward]).measured] == ["RM"]


def test_which_tables_are_made() -> None:
    assert [table.name for table in tables_of(PUBLISHED, [model("SFT", score())])] == ["stages", "3", "9"]
    assert [table.name for table in tables_of(PUBLISHED, [model("SFT", score("tiny_arithmetic"))])] == ["stages"]
    assert [table.name for table in tables_of(PUBLISHED, [], ["8", "3", "8"])] == ["8", "3"]
    assert tables_of(PUBLISHED, []) == []
    with pytest.raises(ValueError, match="no table is called '7'; there are stages, 3, 6, 8, 9, smollm2-135m"):
        tables_of(PUBLISHED, [], ["3", "7"])


def test_bold_is_a_significant_difference_of_measured_models() -> None:
    """Paired over the row: 10 and 30 of 40 differ, 20 and 24 do not (p = 0.125)."""
    [table] = stage_tables([model("SFT", right(10)), model("DPO", right(30))])
    assert [cell and cell.bold for cell in table.rows[0].measured] == [False, True]
    assert any(line.startswith("Bold: significantly better") for line in table.legend)
    [table] = stage_tables([model("SFT", right(20)), model("DPO", right(24))])
    assert [cell and cell.bold for cell in table.rows[0].measured] == [False, False]
    assert "No measured score is significantly better than all others of its row at 0.05." in table.legend


def test_models_of_another_template_or_precision_are_not_compared_and_named() -> None:
    digest = "ab" * 32
    [table] = stage_tables(
        [model("base", right(0, template_digest="none")), model("SFT", right(10)), model("DPO", right(30))]
    )
    [row] = table.rows
    assert [cell and cell.bold for cell in row.measured] == [False, False, True]
    assert [table.notes[number - 1] for number in row.notes] == [
        f"not compared item by item: base with SFT, base with DPO (another chat template: none -> {digest[:8]})"
    ]
    [table] = stage_tables([model("SFT", right(10)), model("DPO", right(30), precision="float32")])
    assert [cell and cell.bold for cell in table.rows[0].measured] == [False, False]
    assert "(measured in another precision: bfloat16 -> float32)" in table.notes[0]


def test_stages_by_tasks() -> None:
    """Scores as they are, a row each for another metric or other shots, rewards in a table of their own."""
    margin = score("preference", "mean_margin", 14.416, stderr=0.131)
    pairs = score("preference", "pair_accuracy", 0.9)
    models = [
        model("Reward model", pairs, margin, subject="reward_model", kind="reward_model"),
        model("SFT", score("gsm8k", value=0.5), score("gsm8k", value=0.6, num_fewshot=5, limited=True)),
        model("DPO", score("gsm8k", value=0.55), subject="dpo"),
    ]  # fmt: skip
    language, rewards = stage_tables(models)
    assert [texts(row.measured) for row in language.rows] == [
        ["0.500 ± 0.010", "0.550 ± 0.010"],
        ["0.600 ± 0.010", None],
    ]
    part = language.rows[1].measured[0]
    assert part is not None and part.marks == ("part",)
    assert [texts(row.measured) for row in rewards.rows] == [["0.900 ± 0.010"], ["14.4 ± 0.1"]]
    assert language.published == () and stage_tables([]) == [] and stage_tables([model("SFT")]) == []


def test_sections_of_rewardbench_and_a_part_of_it() -> None:
    """A section that is whole stands beside the published one, though other pairs are missing."""
    task = "rewardbench_partial"
    reward = model(
        "RM",
        score(task, "micro_accuracy (1403 of 2985)", 0.6, num_samples=1403, limited=True),
        score(task, "Chat", 0.9, num_samples=358),
        score(task, "Chat Hard (419 of 456)", 0.5, num_samples=419, limited=True),
        score("ultrafeedback", "accuracy", 0.7, num_samples=1964),
        subject="reward_model", kind="reward_model",
    )  # fmt: skip
    table = paper_table("8", PUBLISHED, [reward])
    titles = [row.title for row in table.rows]
    assert titles == ["RB Chat", "RB Chat Hard", task, "RB Safety", "RB Reasoning", "RB Average", task, "UFB"]
    chat = row_of(table, "RB Chat").measured[0]
    assert chat is not None and chat.value == "90.00 ± 1.00" and not chat.not_comparable
    assert row_of(table, "RB Average").measured == (None,)
    hard = table.rows[2].measured[0]
    assert hard is not None and hard.not_comparable
    [note] = row_of(table, "UFB").notes
    assert table.notes[note - 1] == "no test against the published figures: on how many items they stand is not known"


def test_sections_of_rewardbench_are_tested_by_the_items_of_their_subsets() -> None:
    """Hard: 10 of 20 pairs, then 20 of 20; Chat: 20 of 20 both. The whole: 30, then 40 of 40."""

    def reward(label: str, num_hard: int) -> MeasuredModel:
        rows = [{"subset": "easy" if i < 20 else "hard"} for i in range(40)]
        items = {f"d{i}": Item(float(i < 20 + num_hard), "p", row=row) for i, row in enumerate(rows)}
        whole = score("rewardbench", "micro_accuracy", (20 + num_hard) / 40, num_samples=40)
        chat = score("rewardbench", "Chat", 1.0, num_samples=20, details={"subsets": {"easy": {}}})
        hard = score("rewardbench", "Chat Hard", num_hard / 20, num_samples=20, details={"subsets": {"hard": {}}})
        made = model(label, whole, chat, hard, subject="reward_model", kind="reward_model")
        return replace(made, items={"rewardbench": Measured(whole, items)})

    table = paper_table("8", PUBLISHED, [reward("a", 10), reward("b", 20)])
    bold = {row.title: [cell and cell.bold for cell in row.measured] for row in table.rows if row.measured[0]}
    assert bold == {"RB Chat": [False, False], "RB Chat Hard": [False, True], "RB Average": [False, True]}


def test_a_score_near_chance_says_so() -> None:
    [table] = stage_tables([model("SFT", score(value=0.5, details={"chance": 0.5, "is_near_chance": True}))])
    assert table.rows[0].measured[0] is not None and table.rows[0].measured[0].marks == ("near chance",)


def test_mean_of_sections_is_not_the_papers_average() -> None:
    reward = model(
        "RM", score("rewardbench", "micro_accuracy", 0.7243, num_samples=2985),
        score("rewardbench", "mean_of_sections", 0.7033, num_samples=2985), subject="reward_model", kind="reward_model",
    )  # fmt: skip
    table = paper_table("8", PUBLISHED, [reward])
    assert texts(row_of(table, "RB Average").measured) == ["72.43 ± 1.00"]
    [row] = [row for row in table.rows if row.detail == "mean_of_sections"]
    assert table.rows.index(row) == table.rows.index(row_of(table, "RB Average")) + 1
    assert row.measured[0] is not None and row.measured[0].not_comparable
