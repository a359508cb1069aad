"""A recipe in which a model writes what another one is trained on: its graph, its keys, and a run on small models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from smoltulu.artifacts.store import Store
from smoltulu.flows.cli.plan import summary
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.planning.plan import plan
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.data.rows import stored_rows
from tests.report_of import report_of
from tests.small_tiny import SMALL_TINY
from tests.tiny_model import build_tiny_model

PAIRS: dict[str, Any] = {"model": "sft", "prompts": "rlvr", "score": "verifier", "make": "pairs"}
BEST = PAIRS | {"model": "base_model", "make": "best"}
BY_REWARD = PAIRS | {"score": "reward_model"}
TO_DPO = {"sampled.on_policy": PAIRS, "data.dpo.sources": [{"sampled": "on_policy"}]}


def graph(overrides: dict[str, Any], until: str | None = None) -> Graph:
    return Graph(load_recipe("tiny", overrides), until)


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    old, new = graph(before).keys(), graph(after).keys()
    assert old.keys() == new.keys()
    return {name for name in old if old[name] != new[name]}


# ---------------------------------------------------------------------------------------------------------- the graph


def test_pairs_of_sft_for_dpo_and_nothing_before_sft_waits_for_them() -> None:
    laid_out = graph(TO_DPO)
    plain = list(graph({}).nodes)
    new = ["samples-on-policy", "sample-scores-on-policy", "sampled-rows-on-policy", "dataset-dpo", "contamination-dpo"]
    order = list(laid_out.nodes)
    assert [name for name in order if name not in new] == [
        *plain[: plain.index("preflight-dpo")], *plain[plain.index("preflight-dpo") + 1 : plain.index("sft") + 1],
        "preflight-dpo", *plain[plain.index("sft") + 1 :],
    ]  # fmt: skip
    assert order[order.index("sft") + 1 :][:6] == [*new, "preflight-dpo"]
    assert "preflight-dpo" not in laid_out.nodes["sft"].after and "preflight-dpo" in laid_out.nodes["dpo"].after
    assert "preflight-reward-model" in laid_out.nodes["sft"].after  # its pairs are there before
    # Verifiers that the recipe has tried are not trusted before.
    assert laid_out.nodes["sample-scores-on-policy"].after == ("verifier-audit",)
    assert laid_out.nodes["samples-on-policy"].bindings()["dataset"].node == "contamination-rlvr"
    assert laid_out.nodes["contamination-dpo"].bindings()["dataset"].node == "dataset-dpo"


def test_rows_of_the_base_model_for_sft_come_before_it() -> None:
    laid_out = graph({"sampled.first": BEST, "data.sft.sources": [{"sampled": "first"}]})
    order = list(laid_out.nodes)
    assert order.index("base-model") < order.index("samples-first") < order.index("preflight-sft") < order.index("sft")
    assert {"preflight-sft", "preflight-dpo", "preflight-reward-model"} <= set(laid_out.nodes["sft"].after)
    assert "sampled-rows-first" in laid_out.ancestors("rlvr")


def test_samples_of_samples_are_laid_out_in_turn() -> None:
    """SFT on the base model's answers; DPO on pairs of that SFT model, ranked by the reward model."""
    laid_out = graph(
        {
            "sampled": {"late": BY_REWARD, "early": BEST},
            "data.sft.sources": [{"sampled": "early"}], "data.dpo.sources": [{"sampled": "late"}],
        }
    )  # fmt: skip
    order = list(laid_out.nodes)
    places = [order.index(name) for name in ("sampled-rows-early", "sft", "reward-model", "samples-late", "dpo")]
    assert places == sorted(places)
    late = laid_out.nodes["sample-scores-late"]
    assert late.bindings()["reward_model"].node == "reward-model" and "verifiers" not in late.externals


@pytest.mark.parametrize(
    ("until", "there", "not_there"),
    [
        ("preflight", {"samples-early", "sampled-rows-early", "preflight-sft"}, {"sft", "samples-late"}),
        ("sft", {"sampled-rows-early", "sft", "evaluation-sft"}, {"samples-late", "dataset-dpo"}),
        ("samples", {"reward-model", "samples-late", "sampled-rows-early"}, {"sample-scores-late", "dataset-dpo"}),
        ("sample_scores", {"sample-scores-late"}, {"sampled-rows-late", "dpo"}),
        ("sampled_rows", {"sampled-rows-late"}, {"dpo"}),
        ("dpo", {"sampled-rows-late", "dataset-dpo", "preflight-dpo", "dpo"}, {"rlvr"}),
    ],
)
def test_until(until: str, there: set[str], not_there: set[str]) -> None:
    recipe = {
        "sampled": {"late": BY_REWARD, "early": BEST},
        "data.sft.sources": [{"sampled": "early"}], "data.dpo.sources": [{"sampled": "late"}],
    }  # fmt: skip
    nodes = graph(recipe, until).nodes.keys()
    assert there <= nodes and not not_there & nodes


def test_a_model_from_outside_is_sampled_with_its_own_template(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "teacher")
    entry = {**BEST, "model": None, "checkpoint": {"path": str(folder)}}
    recipe = {"sampled.taught": entry, "data.sft.sources": [{"sampled": "taught"}]}
    laid_out = graph(recipe)
    samples = laid_out.nodes["samples-taught"]
    assert samples.bindings()["model"].node == "base-model-taught" and samples.config.writer == str(folder)  # type: ignore[attr-defined]
    assert samples.literals == laid_out.nodes["sft"].literals
    other = graph(recipe | {"sampled.taught": entry | {"chat_template": "chatml"}})
    assert "<|im_start|>" in other.nodes["samples-taught"].literals["chat_template"]
    assert changed(recipe, recipe | {"sampled.taught": entry | {"chat_template": "chatml"}}) >= {
        "samples-taught",
        "sft",
    }
    own = graph(recipe | {"sampled.taught": entry | {"chat_template": "own"}}).nodes["samples-taught"]
    assert own.literals == samples.literals  # it brings Tulu's


def test_two_rules_choose_from_the_same_samples() -> None:
    laid_out = graph(
        {"sampled": {"pairs": BY_REWARD, "best": BY_REWARD | {"make": "best"}, "right": PAIRS | {"make": "best"}}}
    )
    assert {name for name in laid_out.nodes if name.startswith("sample")} == {
        "samples-right", "sample-scores-right", "sampled-rows-right",  # which need no reward model, so come first
        "sample-scores-pairs", "sampled-rows-pairs", "sampled-rows-best",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- keys

_ROWS_AND_AFTER = {
    "sampled-rows-on-policy", "dataset-dpo", "contamination-dpo", "preflight-dpo", "reference-logps", "dpo",
    "evaluation-dpo", "evaluation-dpo-implicit-reward", "pass-rates", "rlvr", "evaluation-rlvr", "publish",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reject_unended": False}, _ROWS_AND_AFTER),
        ({"max_length_ratio": 2.0}, set()),
        ({"top_p": 0.9}, {"samples-on-policy", "sample-scores-on-policy", *_ROWS_AND_AFTER}),
        ({"num_samples": 4}, {"samples-on-policy", "sample-scores-on-policy", *_ROWS_AND_AFTER}),
        ({"ties": "reward_model"}, {"sample-scores-on-policy", *_ROWS_AND_AFTER}),
    ],
)
def test_a_changed_rule_samples_nothing_again(changes: dict[str, Any], expected: set[str]) -> None:
    assert changed(TO_DPO, TO_DPO | {"sampled.on_policy": PAIRS | changes}) == expected


def test_other_verifiers_change_what_they_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """RLVR rows are read by them, so prompts of these are other rows; those of SFT stay."""
    recipe = TO_DPO | {"sampled.by_reward": BY_REWARD | {"prompts": "sft"}}
    before = graph(recipe).keys()
    monkeypatch.setattr("smoltulu.flows.graphs.recipe_graph.VERIFIERS_VERSION", "next")
    after = graph(recipe).keys()
    same = {name for name in before if name.startswith("sample") and before[name] == after[name]}
    assert same == {"samples-by-reward", "sample-scores-by-reward", "sampled-rows-by-reward"}


def test_plan_shows_what_writing_costs_and_says_what_is_unused(tmp_path: Path) -> None:
    recipe = load_recipe(
        "tiny", TO_DPO | {"sampled.on_policy": PAIRS | {"num_prompts": 1000, "num_samples": 4, "max_new_tokens": 50},
                          "sampled.unused": BEST, "base_model.num_parameters": 10}
    )  # fmt: skip
    planned = plan(recipe, None, [], Store(tmp_path / "store"))
    rows = {row.node: row for row in planned.rows}
    assert rows["samples-on-policy"].estimate.flops == 2.0 * 1000 * 4 * 50 * 10
    assert [note.partition(":")[0] for note in planned.notes if "sampled" in note] == ["sampled.unused"]
    assert rows["preflight-dpo"].trained and not rows["preflight-sft"].trained
    (line,) = (line for line in summary(planned) if line.startswith("preflight not run yet"))
    assert "preflight-reward-model" in line and "preflight-dpo" not in line


# -------------------------------------------------------------------------------------------------------------- a run

SMALL: dict[str, Any] = {
    **{name: value for name, value in SMALL_TINY.items() if not name.startswith("rlvr.")},
    "sft.max_steps": 6, "reward_model.max_steps": 3, "dpo.max_steps": 2, "compute.launcher": "inline",
    "preflight.dry_run": False, **dict.fromkeys(("rlvr", "pass_rates", "verifier_audit", "evaluation", "publish")),
}  # fmt: skip
ENTRY = BY_REWARD | {"num_prompts": 60, "num_samples": 4, "max_new_tokens": 24, "precision": "float32"}
RUN = SMALL | {
    "sampled": {"pairs": ENTRY, "best": ENTRY | {"make": "best"}},
    "data.dpo.sources": [{"sampled": "pairs"}],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(store: Store) -> dict[str, ArtifactReference]:
    return run_graph(graph(RUN), store, logging.getLogger("test"))


def test_sft_writes_the_pairs_that_dpo_is_trained_on(made: dict[str, ArtifactReference]) -> None:
    assert {reference.outcome for reference in made.values()} == {"Completed"}
    rows, lineage = made["sampled-rows-pairs"], Path(made["sampled-rows-pairs"].path) / "lineage.parquet"
    chosen = list(stored_rows(Path(rows.path) / "rows.parquet"))
    assert rows.outputs["writer"] == "sft" and len(chosen) == rows.outputs["num_rows"] > 2
    lines = parquet.read_table(lineage).to_pylist()
    assert all(line["chosen_reward"] > line["rejected_reward"] for line in lines)
    # The stage `dataset` numbers the rows of a source: row 3 of it is line 3 of the lineage.
    taken = list(stored_rows(Path(made["dataset-dpo"].path) / "rows.parquet"))
    assert [row["id"] for row in taken] == [f"0:{number}" for number in range(len(chosen))]
    assert [{**row, "id": None} for row in taken] == [{**row, "id": None} for row in chosen]
    prompts = {row["id"]: row["prompt"] for row in stored_rows(Path(made["contamination-rlvr"].path) / "rows.parquet")}
    assert all(prompts[line["prompt_id"]] == row["prompt"] for line, row in zip(lines, taken, strict=True))
    best = list(stored_rows(Path(made["sampled-rows-best"].path) / "rows.parquet"))
    assert len(best) >= len(chosen) and {"id", "messages"} == best[0].keys()


def test_another_rule_samples_and_scores_nothing_again(made: dict[str, ArtifactReference], store: Store) -> None:
    other = RUN | {"sampled": {"pairs": ENTRY | {"min_margin": 0.01}, "best": ENTRY | {"make": "best"}}}
    outcomes = {
        name: reference.outcome
        for name, reference in run_graph(graph(other, "sampled_rows"), store, logging.getLogger("test")).items()
    }
    assert {name for name, outcome in outcomes.items() if outcome != "Cached"} == {
        "sampled-rows-pairs", "dataset-dpo", "contamination-dpo",
    }  # fmt: skip


def test_the_report_shows_what_became_of_the_prompts(made: dict[str, ArtifactReference], store: Store) -> None:
    page = report_of(graph(RUN), made, store)
    assert "Rows that a model wrote" in page and "<h3>pairs</h3>" in page and "<h3>best</h3>" in page
    assert "nothing to choose" in page and "Samples by their reward" in page and "rejected (" in page
    assert "Best against worst answers of sft, by the reward model" in page
