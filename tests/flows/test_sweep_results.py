"""The page, the tables and the answer of a sweep, from cells that were written by hand."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.recipe import load_recipe
from smoltulu.flows.sweeping.gather import gather
from smoltulu.flows.sweeping.recommending import placed
from smoltulu.flows.sweeping.results import export_table, recommend, up_to_date_page, write_page
from smoltulu.flows.sweeping.scores import load_scores
from smoltulu.flows.sweeping.states import remembered, states_of, sweep_folder
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.sweep import Place, SweepSettings, SweptTask
from smoltulu.tasks.comparison.evaluations import measured
from smoltulu.tasks.evaluation.samples import read_samples, write_samples
from smoltulu.tasks.surface.choice import choose, share_out
from tests.planted_sweep import Surface, parabola, plant, settings

BLOCK: dict[str, Any] = {
    "name": "main",
    "log2_learning_rate": {"low": -13, "high": -11},
    "log2_batch": {"low": 3, "high": 4},
    "seeds": [0],
    "max_tokens": [1 << 14],
}


def scan(**changes: Any) -> SweepSettings:
    return settings(kind="scan", **({"blocks": [BLOCK]} | changes))


def page_of(root: Path, sweep: SweepSettings, surface: Surface) -> tuple[str, Path]:
    plant(root, sweep, surface)
    page, _ = write_page(sweep, root)
    return page.read_text(), page.parent


def test_the_page_of_a_surface(tmp_path: Path) -> None:
    sweep = settings(2, description="planted & <hostile>")
    text, folder = page_of(tmp_path / "store", sweep, parabola())
    # The paper's figure is the first thing, then the verdict.
    assert text.index("Score over learning") < text.index("<svg") < text.index('class="headline"')
    assert "planted &amp; &lt;hostile&gt;" in text and "<hostile>" not in text
    # Two panels for the paper, then of each task a surface and slices at each of two budgets.
    assert text.count("<svg") == 2 + 2 * 2 * 2
    for part in (
        "reasoning: ", "task_0, acc", "α, of log2 batch: 0.", "Nested forms: not decisive", "Too few tasks to test",
        "reasoning wants a log2 ratio LR / B that is ", "Parabola and Gaussian process disagree by", "108 done",
        "learning_rate: ",
    ):  # fmt: skip
        assert part in text, part
    assert "default-src 'none'" in text and not re.search(r'(?:href|src)="(?!#|turning\.html)', text)
    assert "Date" not in text and "<metadata" not in text
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "cells.parquet", "cells.csv", "optima.parquet", "optima.csv", "figures"} <= names
    drawn = sorted(path.name for path in (folder / "figures").iterdir())
    assert len(drawn) == 10 + 5 and all(name[0].isdigit() for name in drawn)
    assert (folder / "figures" / drawn[-1]).stat().st_size > 1000
    words = json.loads((folder / "page.json").read_text())["words"]
    assert words[0].startswith("verdict   ") and words[-1].startswith("claim     ")
    # What is drawn stands in the table: the optimum of each batch, budget and task.
    optima = parquet.read_table(folder / "optima.parquet").to_pylist()
    assert len(optima) == 2 * 3 * 2
    at = next(one for one in optima if (one["task"], one["log2_batch"], one["log2_tokens"]) == ("task_0", 4.0, 16.0))
    assert at["low"] < at["log2_best_learning_rate"] < at["high"]
    assert at["log2_best_learning_rate"] == pytest.approx(-12, abs=0.1) and at["flaw"] is None


def test_a_second_page_is_the_same_and_leaves_no_old_figure(tmp_path: Path) -> None:
    sweep = scan()
    first, folder = page_of(tmp_path / "store", sweep, parabola())
    before = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    (folder / "figures" / "99-surface-gone.svg").write_text("old")
    (folder / "figures" / "mine.svg").write_text("mine")
    second = write_page(sweep, tmp_path / "store")[0].read_text()
    assert re.sub(r"Written [^,]*,", "", first) == re.sub(r"Written [^,]*,", "", second)
    after = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert after == before | {"mine.svg": b"mine"}


def test_a_page_is_drawn_again_only_where_something_changed(tmp_path: Path) -> None:
    root, sweep = tmp_path / "store", scan()
    plant(root, sweep, parabola())
    page, words = write_page(sweep, root)
    page.write_text("as it was")
    assert up_to_date_page(sweep, root) == (page, words) and page.read_text() == "as it was"
    (page.parent / "page.json").write_text('{"stamp": "torn')
    assert up_to_date_page(sweep, root) == (page, words) and page.read_text() != "as it was"
    page.write_text("as it was")
    up_to_date_page(scan(description="another"), root)
    assert page.read_text() != "as it was"
    page.unlink()
    assert up_to_date_page(scan(description="another"), root)[0].is_file()
    # Other scores of the same cells.
    page.write_text("as it was")
    other = tmp_path / "other" / "store"
    plant(other, scan(description="another"), parabola(alpha=0.0))
    shutil.copytree(page.parent, other.parent / "sweeps" / "planted", dirs_exist_ok=True)
    assert "as it was" not in up_to_date_page(scan(description="another"), other)[0].read_text()


def _failing(task: str, place: Place) -> float | str | None:
    if place.log2_learning_rate == -11:
        return None
    return "failed" if place.log2_batch == 4 else "pending" if place.log2_learning_rate == -12 else 0.5


ONE_CELL = BLOCK | {"log2_learning_rate": {"low": -12, "high": -12}, "log2_batch": {"low": 3, "high": 3}}
WIDE = settings().blocks[0].model_dump()
ARMS: dict[str, Any] = {"main": {}, "lora": {"overrides": {"sft.lora": {"r": 16}}}}
SIZES = {"base": {"num_parameters": 1000}, "large": {"num_parameters": 4000}}


@pytest.mark.parametrize(
    ("sweep", "surface", "told"),
    [
        (scan(blocks=[ONE_CELL]), parabola(), ["1 done", "which has no verdict", "fewer than three rates|a scan"]),
        (settings(blocks=[WIDE | {"seeds": [0]}]), parabola(), ["1 of 3 seeds; add seeds"]),
        (scan(), lambda *_: None, ["6 diverged", "No cell has scores yet", "loss is nan"]),
        (scan(), lambda *_: "pending", ["6 pending", "No cell has scores yet"]),
        (scan(), _failing, ["1 pending, 2 failed, 2 diverged, 1 done", "the disk is full"]),
        (scan(), lambda *_: 0.5, ["6 done", "no place can be recommended|learning_rate"]),
        (
            scan(sizes=SIZES, blocks=[BLOCK | {"sizes": ["base", "large"]}]),
            parabola(),
            ["12 done", "16.4k tokens, large"],
        ),
        (
            scan(arms=ARMS, blocks=[BLOCK | {"arms": ["main", "lora"]}]),
            parabola(),
            ["12 done", "Arms beside each other", "Arm lora", "arm lora"],
        ),
        (
            scan(arms={"half": {}}, blocks=[BLOCK | {"arms": ["half"]}]),
            parabola(),
            ["6 done", "16.4k tokens, arm half"],
        ),
    ],
    ids=["one cell", "one seed", "all diverged", "pending", "failed", "flat", "sizes", "arms", "no main arm"],
)  # fmt: skip
def test_pages_of_odd_sweeps(tmp_path: Path, sweep: SweepSettings, surface: Surface, told: list[str]) -> None:
    text, folder = page_of(tmp_path / "store", sweep, surface)
    for words in told:
        assert re.search(words, text), words
    assert "nan [" not in text and "Traceback" not in text
    assert parquet.read_table(folder / "cells.parquet").num_rows == 2 * len(gather(sweep, tmp_path / "store").cells)


def test_names_in_a_page_are_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>$\\x$_1"
    tasks = [{"task": name, "metric": "acc,none", "task_class": "reasoning"}]
    text, _ = page_of(tmp_path / "store", scan(tasks=tasks), parabola())
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_the_table_has_every_cell_and_what_was_done(tmp_path: Path) -> None:
    tasks = [
        {"task": "task_0", "metric": "acc,none", "task_class": "reasoning", "chance": 0.25},
        {"task": "task_0", "metric": "bits_per_byte,none", "task_class": "reasoning", "lower_is_better": True},
    ]
    sweep = scan(tasks=tasks)
    plant(tmp_path / "store", sweep, _failing, num_items=4)
    assert export_table(sweep, tmp_path / "store", tmp_path / "cells.csv") == 12
    assert export_table(sweep, tmp_path / "store", tmp_path / "cells.PARQUET") == 12
    rows = parquet.read_table(tmp_path / "cells.PARQUET").to_pylist()
    with (tmp_path / "cells.csv").open() as file:
        as_text = list(csv.DictReader(file))
    assert [row["cell"] for row in as_text] == [row["cell"] for row in rows]
    (done,) = [row for row in rows if row["state"] == "done" and row["metric"] == "acc,none"]
    assert (done["learning_rate"], done["effective_batch_rows"], done["max_tokens"]) == (2.0**-13, 8, 1 << 14)
    assert (done["effective_batch_tokens"], done["num_steps"]) == (512.0, 32)
    assert (done["weight_decay"], done["reduction"], done["chance"]) == (0.0, "mean over tokens", 0.25)
    assert done["mean"] == pytest.approx(0.5, abs=0.5) and done["stderr"] > 0 and done["num_items"] == 4
    without = [row for row in rows if row["state"] != "done"]
    assert len(without) == 10 and all(row["mean"] is None for row in without)
    assert {row["message"] for row in without if row["state"] == "diverged"} == {"loss is nan"}
    for file, words in (("cells.xlsx", "parquet or .csv"), ("nowhere/cells.csv", "there is no folder")):
        with pytest.raises(ValueError, match=words):
            export_table(sweep, tmp_path / "store", tmp_path / file)


def test_the_answer_is_a_recipe(tmp_path: Path) -> None:
    """At the smaller budget, where both classes have an optimum inside the grid."""
    sweep = settings(4, overrides={"sft.weight_decay": 0.1})
    plant(tmp_path / "store", sweep, parabola())
    answer = recommend(sweep, tmp_path / "store")
    assert [one.of for one in answer.choices] == ["class reasoning", "class pattern", "all classes"]
    best, other, both = answer.choices
    assert {one.task for one in best.tasks} == {"task_0", "task_2"} and len(both.tasks) == 4
    assert math.log2(best.learning_rate) == -12 + 0.5 * (math.log2(best.effective_batch_size) - 4)
    assert math.log2(other.learning_rate) < math.log2(best.learning_rate) + 1
    assert best.low is not None and best.high is not None and best.optimum is not None
    assert best.low < best.optimum < best.high
    (tmp_path / "best.yaml").write_text(answer.as_yaml(0))
    recipe = load_recipe(str(tmp_path / "best.yaml"))
    assert recipe.sft is not None and recipe.name == "planted-best"
    assert recipe.sft.learning_rate == best.learning_rate and recipe.sft.weight_decay == 0.1
    assert recipe.sft.effective_batch_size == best.effective_batch_size
    assert recipe.sft.max_tokens == load_recipe("tiny").sft.max_tokens  # type: ignore[union-attr]
    assert yaml.safe_load(answer.as_yaml(0)) == answer.patches[0]
    weighed = recommend(sweep, tmp_path / "store", {"task_1": 1.0, "reasoning": 1.0})
    first = weighed.choices[0]
    assert first.of == "your weights" and {one.task: one.weight for one in first.tasks} == {
        "task_0": 0.25, "task_1": 0.5, "task_2": 0.25,
    }  # fmt: skip
    with pytest.raises(ValueError, match="weight 'maths' is neither a class nor a task"):
        recommend(sweep, tmp_path / "store", {"maths": 1.0})


def test_the_answer_of_a_recipe_that_extends_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny\nsft:\n  max_length: 100\n")
    sweep = scan(recipe=str(file), arms={"main": {"beta2_half_life_batch": 8}})
    plant(tmp_path / "store", sweep, parabola())
    answer = recommend(sweep, tmp_path / "store")
    (tmp_path / "best.yaml").write_text(answer.as_yaml(1))
    recipe = load_recipe(str(tmp_path / "best.yaml"))
    assert recipe.sft is not None and recipe.sft.max_length == 100
    assert recipe.sft.adam_beta2 == pytest.approx(0.999 ** (answer.choices[1].effective_batch_size / 8))


def test_without_scores_there_is_no_answer(tmp_path: Path) -> None:
    for surface in (lambda *_: None, lambda *_: "pending"):
        root = tmp_path / str(surface("a", None)) / "store"
        plant(root, scan(), surface)
        with pytest.raises(ValueError, match="no cell has scores yet; run it first"):
            recommend(scan(), root)
    plant(tmp_path / "flat" / "store", scan(), lambda *_: 0.5, noise=0.0)
    with pytest.raises(ValueError, match="two places with different scores"):
        recommend(scan(), tmp_path / "flat" / "store")
    with pytest.raises(ValueError, match="was never run in this store"):
        write_page(scan(name="other"), tmp_path / "flat" / "store")


def test_cells_of_an_earlier_grid_are_shown_too(tmp_path: Path) -> None:
    wide = scan(blocks=[BLOCK, BLOCK | {"name": "later", "seeds": [1]}])
    plant(tmp_path / "store", wide, parabola())
    assert len(gather(scan(), tmp_path / "store").cells) == 12
    arms = {"main": {}, "lora": {}}
    plant(tmp_path / "other" / "store", scan(arms=arms, blocks=[BLOCK | {"arms": ["main", "lora"]}]), parabola())
    found = gather(scan(), tmp_path / "other" / "store")
    assert len(found.cells) == 6 and "6 cells of an earlier grid" in found.notes[0]
    # A grid that was made larger in the file since, and has not run.
    later = gather(scan(blocks=[BLOCK | {"seeds": [0, 1, 2]}]), tmp_path / "store")
    assert [cell.state for cell in later.cells].count("pending") == 6 and len(later.cells) == 18


def test_cells_of_an_earlier_grid_that_were_measured_otherwise_are_named(tmp_path: Path) -> None:
    wide = scan(blocks=[BLOCK | {"seeds": [0, 1]}])
    plant(tmp_path / "store", wide, parabola())
    sweep = scan(tasks=[{"task": "task_0", "metric": "f1,none", "task_class": "reasoning"}])
    with pytest.raises(ValueError, match="an item has no 'f1'"):
        gather(sweep, tmp_path / "store")


def test_scores_read_as_columns_are_those_read_row_by_row(tmp_path: Path) -> None:
    """Also where one cell has its items in another order, and where one has further fields, so that rows are read."""
    sweep = scan()
    root = tmp_path / "store"
    plant(root, sweep, parabola(), num_items=5)
    cells = remembered(sweep_folder(root, sweep.name))
    files = [root / "evaluation" / cell.evaluation / "gen-0001" / "samples.parquet" for cell in cells]
    write_samples(files[1], list(read_samples(files[1]))[::-1])
    write_samples(files[2], [row | {"parts": {"acc": [row["metrics"]["acc"]] * 2}} for row in read_samples(files[2])])
    states = states_of(root, sweep_folder(root, sweep.name), cells)
    for one in load_scores(sweep, root, states):
        for number, cell in enumerate(one.of):
            folder = root / "evaluation" / cell.evaluation / "gen-0001"
            outputs = EvaluationOutputs.model_validate(read_manifest(folder).outputs)
            items = measured(folder, outputs)[one.task.task].items
            assert one.cells.items[number].tolist() == [items[name].value for name in sorted(items)]
    write_samples(files[3], list(read_samples(files[3]))[:-1])
    with pytest.raises(ValueError, match="have other items of task_1"):
        load_scores(sweep, root, states)


def test_a_score_is_that_of_its_own_filter(tmp_path: Path) -> None:
    """The headline's filter used to answer for every other one of the same metric."""
    sweep = scan(tasks=[{"task": "task_0", "metric": "acc,strict", "task_class": "reasoning"}])
    root = tmp_path / "store"
    plant(root, sweep, parabola(), num_items=4)
    cells = remembered(sweep_folder(root, sweep.name))
    for cell in cells:
        file = root / "evaluation" / cell.evaluation / "gen-0001" / "samples.parquet"
        rows = list(read_samples(file))
        write_samples(file, [*rows, *(row | {"filter": "loose", "metrics": {"acc": 9.0}} for row in rows)])
    states = states_of(root, sweep_folder(root, sweep.name), cells)
    (strict,) = load_scores(sweep, root, states)
    assert strict.means.max() < 2
    other = sweep.model_copy(update={"tasks": (SweptTask(task="task_0", metric="acc,loose", task_class="reasoning"),)})
    (loose,) = load_scores(other, root, states)
    assert loose.means.tolist() == [9.0] * len(cells)
    gone = sweep.model_copy(update={"tasks": (SweptTask(task="task_0", metric="acc,none at all", task_class="a"),)})
    with pytest.raises(ValueError, match=r"no items of acc,none at all .* headline is acc,strict"):
        load_scores(gone, root, states)


def test_a_score_that_is_better_when_lower_is_never_read_upside_down(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits_per_byte is better when it is lower; add lower_is_better: true"):
        scan(tasks=[{"task": "task_0", "metric": "bits_per_byte,none", "task_class": "reasoning"}])
    # A metric whose name tells nothing, and whose score does.
    sweep = scan(tasks=[{"task": "task_0", "metric": "loss,none", "task_class": "reasoning"}])
    plant(tmp_path / "store", sweep, parabola(), details={"higher_is_better": False})
    with pytest.raises(ValueError, match="loss,none is better when it is lower; set lower_is_better"):
        gather(sweep, tmp_path / "store")


def test_a_recipe_is_whole_whatever_its_names_are(tmp_path: Path) -> None:
    """A line break in a name ended its comment; the name of a long sweep made a recipe that nothing could read."""
    tasks = [{"task": "a\nsft: {learning_rate: 9}", "metric": "acc,none", "task_class": "reasoning"}]
    sweep = scan(name="s" * 100, tasks=tasks, overrides={"rlvr.learning_rate": 1e-6})
    plant(tmp_path / "store", sweep, parabola())
    answer = recommend(sweep, tmp_path / "store")
    assert yaml.safe_load(answer.as_yaml(0)) == answer.patches[0]
    # What another stage of the recipe is set to says nothing of the unit of this one's budget.
    assert "16,384 tokens" in answer.as_yaml(0)
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(answer.patches[0] | {"rlvr": {}}))
    assert load_recipe(str(tmp_path / "best.yaml")).name == "s" * 95 + "-best"


def test_an_interval_wider_than_floats_go_is_an_interval(tmp_path: Path) -> None:
    sweep = settings(1)
    plant(tmp_path / "store", sweep, parabola())
    analyses = gather(sweep, tmp_path / "store").analyses()
    chosen = choose(share_out(analyses[0].tasks, analyses[0].units, {"reasoning": 1.0}))
    place = placed(sweep, analyses[0], "x", dataclasses.replace(chosen, low=-3e4, high=3e4))
    assert place.low is not None and 0 < place.low < 1e-300 and place.high is not None and place.high > 1e300
