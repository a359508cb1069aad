"""Ladders: what is one, the cells that it is made of, its forecast, and its result from scores written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from smoltulu.flows.recipe import RecipeError
from smoltulu.flows.sweeping.grid import cells_of, ladder_names, load_sweep, sweep_names
from smoltulu.flows.sweeping.ladder import check_hours, forecast_ladder, load_ladder, open_store_of
from smoltulu.flows.sweeping.ladder_results import is_transfer, lines_of, result_of, write_ladder
from smoltulu.flows.sweeping.states import CellRecord, sweep_folder, write_outcome
from smoltulu.recipes import SWEEPS
from smoltulu.schemas.ladder import LadderSettings
from smoltulu.schemas.sweep import SweepSettings, places
from tests.flows.test_sweep import SMALL, run
from tests.hand_store import HandStore

HIDDEN = "base_model.scratch.hidden_size"
LADDER: dict[str, Any] = {
    "name": "small",
    "proxies": {
        "name": "small-proxies",
        "recipe": "tiny",
        "stage": "sft",
        "kind": "scan",
        "overrides": {field: value for field, value in SMALL.items() if field != HIDDEN},
        "blocks": [
            {
                "name": "sizes",
                "log2_learning_rate": {"low": -11, "high": -7},
                "log2_batch": {"low": 3, "high": 3},
                "seeds": [0, 1],
                "max_tokens": [2048],
                "sizes": ["a", "b", "c"],
            }
        ],
        "sizes": {
            "a": {"num_parameters": 2**12, "overrides": {HIDDEN: 16}},
            "b": {"num_parameters": 2**13, "overrides": {HIDDEN: 32}},
            "c": {"num_parameters": 2**14, "overrides": {HIDDEN: 48}},
        },
        "tasks": [
            {"task": "tiny_arithmetic", "metric": "bits_per_byte,strict-match", "task_class": "reasoning",
             "lower_is_better": True},
            {"task": "tiny_arithmetic", "metric": "exact_match,strict-match", "task_class": "reasoning"},
        ],
    },
    "target": {"num_parameters": 2**16, "overrides": {HIDDEN: 64}, "log2_batch": 3, "max_tokens": 2048,
               "seeds": [0, 1]},
}  # fmt: skip


def changed(dotted: str, value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(LADDER))
    *above, last = dotted.split("/")
    inner = values
    for name in above:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    return values


def test_the_confirmation_is_three_ordinary_rates_of_the_target() -> None:
    ladder = load_ladder(LADDER)
    sweep = ladder.confirmation(-9.06)
    cells = list(cells_of(sweep))
    assert sweep.name == "small-confirmation"
    assert [cell.place.name for cell in cells if cell.place.seed == 0] == [
        f"lr{rate}-b3-t2048-s0.target" for rate in (-10, -9, -8)
    ]
    config = cells[0].graph.nodes["base-model"].config
    assert config.scratch.hidden_size == 64  # type: ignore[attr-defined]
    assert ladder.confirmation(-9.05).blocks == sweep.blocks, "an eighth of an octave is one confirmation"
    whole = ladder.whole()
    assert len(places(whole)) == 30 + 6
    unused = LADDER["proxies"]["sizes"] | {"d": {"num_parameters": 2**16, "overrides": {HIDDEN: 64}}}
    assert load_ladder(changed("proxies/sizes", unused)).whole().sizes.keys() == {"a", "b", "c", "target"}


@pytest.mark.parametrize(
    ("dotted", "value", "told"),
    [
        ("proxies/blocks/0/sizes", ["a"], r"proxies run 1 size \(a\); a ladder needs 2, better 3: give"),
        ("target/num_parameters", 2**14, "target has 16,384 parameters, the largest proxy 16,384; a ladder leads to a"),
        ("proxies/sizes/a", {"overrides": {HIDDEN: 16}}, "sizes.a: give its num_parameters"),
        ("target/log2_batch", 4, "target has a batch of 16 and all proxies have 8: .* give the proxies a second batch"),
        ("target/max_tokens", 4096, "target has a budget of 4,096 and all proxies have 2,048"),
        ("target/octaves", {"low": 1, "high": 2}, r"octaves from 1 to 2 .* leave out 0, the predicted rate itself"),
        ("task", "gsm8k", "task 'gsm8k' is none of proxies.tasks; name one of tiny_arithmetic"),
        ("proxies/arms", {"main": {}, "lora": {}}, r"arms \['lora', 'main'\]; .*keep main"),
        ("proxies/name", "small-confirmation", "as the confirmation is; call them otherwise"),
        ("target/overrides", {HIDDEN: 64, "world.seed": 5}, "world of size target differs from that of a; .* for all"),
        ("target/overrides", {HIDDEN: 64, "sft.weight_decay": 0.1}, "sft of size target differs from that of a"),
        ("target/overrides", {HIDDEN: 63}, r"(?s)size target: .*hidden_size 63"),
        ("target/overrides", {HIDDEN: 48}, "c and target are the same model; give each its own base_model"),
        ("proxies/sizes/b", {"num_parameters": 2**13, "overrides": {HIDDEN: 16}}, "a and b are the same model"),
        ("target/overrides", {HIDDEN: 64, "compute.store": "/tmp/other"}, "sizes.target sets compute.store; a sweep"),
        ("target/learning_rate", 1e-3, "target.learning_rate: Extra inputs"),
        ("proxies/overrides", {"sft.weight_decay": "hf_" + "a1B2" * 9}, "holds no secrets"),
    ],
)  # fmt: skip
def test_what_is_no_ladder(dotted: str, value: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_ladder(changed(dotted, value))


def test_ladders_and_sweeps_are_told_apart(tmp_path: Path) -> None:
    assert "ladder-tiny" in ladder_names() and not set(ladder_names()) & set(sweep_names())
    with pytest.raises(RecipeError, match="this is a ladder, not a sweep; run it by `smoltulu ladder`"):
        load_sweep(LADDER)
    with pytest.raises(RecipeError, match="this is a sweep, not a ladder"):
        load_ladder(LADDER["proxies"])
    with pytest.raises(RecipeError, match=r"no ladder 'ladder-tyni'; shipped are .*ladder-tiny"):
        load_ladder("ladder-tyni")
    with pytest.raises(RecipeError, match="a ladder is an object"):
        (tmp_path / "list.yaml").write_text("- 1\n")
        load_ladder(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("name", [None, 5, ["ladder-tiny"], "x" * 5000 + ".yaml", "a\0.yaml", "", "."])
def test_what_names_no_ladder(name: Any) -> None:
    with pytest.raises(RecipeError, match=r"no ladder .*; shipped are ladder-smollm2, ladder-tiny"):
        load_ladder(name)


def test_only_a_ladder_of_mup_is_a_transfer() -> None:
    assert is_transfer(load_ladder("ladder-tiny"))
    assert not is_transfer(load_ladder(LADDER))
    values = yaml.safe_load((SWEEPS / "ladder-tiny.yaml").read_text())
    values["target"]["overrides"]["base_model.scratch.num_attention_heads"] = 4
    assert not is_transfer(load_ladder(values)), "heads twice as wide"


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def run_by_hand(
    store: HandStore, sweep: SweepSettings, best: dict[str, float], diverged_from: float = math.inf
) -> None:
    """Write cells down as if they had run: one octave off the best rate costs a bit, or a quarter of the accuracy."""
    records = []
    folder = sweep_folder(store.root, sweep.name)
    (folder / "outcomes").mkdir(parents=True)
    for place, block in places(sweep).items():
        keys = [store.begin(stage, f"{stage} {sweep.name} {place.name}").key for stage in ("sft", "evaluation")]
        record = CellRecord(place=place, block=block, stage="sft", training=keys[0], evaluation=keys[1])
        records.append(record)
        if place.log2_learning_rate >= diverged_from:
            write_outcome(folder, record, "diverged", "loss is nan")
            continue
        lost = (place.log2_learning_rate - best[place.size]) ** 2 + 0.01 * place.seed * place.log2_learning_rate
        rows = [
            {"task": "tiny_arithmetic", "entry": 0, "id": str(item), "doc_hash": f"d{item}", "target_hash": f"t{item}",
             "filter": "strict-match", "metrics": {"exact_match": 1 - lost / 4, "bits_per_byte": 1 + lost + item / 9}}
            for item in range(4)
        ]  # fmt: skip
        score = {
            "task": "tiny_arithmetic", "metric": "exact_match,strict-match", "value": 0.5, "num_samples": 4,
            "harness": "h", "task_version": "1", "template_digest": "t",
        }  # fmt: skip
        store.make(
            "evaluation",
            f"evaluation {sweep.name} {place.name}",
            outputs={"subject": "sft", "scores": [score], "samples_file": "samples.jsonl"},
            files={"samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows)},
        )
    (folder / "cells.json").write_text(json.dumps([one.model_dump(mode="json") for one in records]))


BEST = {"a": -8.5, "b": -9.0, "c": -9.5}  # half an octave lower with every octave of size: -10.5 at 2^16


def test_a_ladder_from_its_scores(store: HandStore) -> None:
    ladder = load_ladder(LADDER)
    with pytest.raises(ValueError, match="sweep small-proxies was never run in this store"):
        result_of(ladder, store.root)
    run_by_hand(store, ladder.proxies, BEST)
    found = result_of(ladder, store.root)
    assert found.log2_lr == -10.5
    assert found.decisive.prediction.log2_lr == pytest.approx(-10.5, abs=0.02)
    assert found.decisive.prediction.slopes[2] == pytest.approx(-0.5, abs=0.01)
    assert found.decisive.confirmation is None and found.problems == ()
    assert found.tasks[1].prediction.log2_lr == pytest.approx(-10.5, abs=0.02)
    run_by_hand(store, ladder.confirmation(-10.5), {"target": -11.5})
    found = result_of(ladder, store.root)
    confirmed = found.decisive.confirmation
    assert confirmed is not None and confirmed.best == -1 and confirmed.is_edge
    assert confirmed.regret == pytest.approx(1.0, abs=0.02)  # one octave off costs a bit
    assert confirmed.optimum == pytest.approx(-1, abs=0.01)
    told = "\n".join(lines_of(found))
    assert "predicted learning rate 0.000691 (2^-10.50" in told and "at 0.5 times it" in told and "widen" in told


def test_what_is_not_finished_is_told(store: HandStore) -> None:
    """Proxies and a confirmation that were given a third seed after they ran."""
    asked = load_ladder(LADDER)
    run_by_hand(store, asked.proxies, BEST)
    run_by_hand(store, asked.confirmation(-10.5), {"target": -10.5})
    assert result_of(asked, store.root).problems == ()
    values = changed("target/seeds", [0, 1, 2])
    values["proxies"]["blocks"][0]["seeds"] = [0, 1, 2]
    assert result_of(load_ladder(values), store.root).problems == (
        "15 of 45 cells of small-proxies are not finished: the prediction may move; run it again",
        "3 of 9 cells of small-confirmation are not finished: the prediction is not tested to the end; run it again",
    )


def test_a_target_of_one_seed_has_no_error_of_seeds(store: HandStore) -> None:
    ladder = load_ladder(changed("target/seeds", [0]))
    run_by_hand(store, ladder.proxies, BEST)
    run_by_hand(store, ladder.confirmation(-10.5), {"target": -10.5})
    (problem,) = result_of(ladder, store.root).problems
    assert problem.startswith("the target was trained with one seed: the error of its regret is that of the items")


def test_the_page_of_a_ladder(store: HandStore) -> None:
    ladder = load_ladder(LADDER | {"overlays": ["step-law"], "description": "<b>bold</b>"})
    run_by_hand(store, ladder.proxies, BEST)
    run_by_hand(store, ladder.confirmation(-10.5), {"target": -10.5}, diverged_from=-9.5)
    page = write_ladder(ladder, store.root)
    text = page.read_text()
    assert "<b>bold</b>" not in text and "not a transfer" in text and "Step Law (arXiv 2503.04715)" in text
    assert text.count("<svg") == 2 and "http-equiv" in text
    assert "that which tiny_arithmetic, bits_per_byte,strict-match predicts: all rows say what that one costs" in text
    first = (page.parent / "ladder.svg").read_bytes()
    assert (page.parent / "ladder.pdf").read_bytes().startswith(b"%PDF")
    values = json.loads((page.parent / "ladder.json").read_text())
    assert values["log2_lr"] == -10.5 and values["tasks"][0]["confirmation"]["means"][2] is None
    write_ladder(ladder, store.root)
    assert (page.parent / "ladder.svg").read_bytes() == first


def test_a_target_that_only_diverges_is_told(store: HandStore) -> None:
    ladder = load_ladder(LADDER)
    run_by_hand(store, ladder.proxies, BEST)
    run_by_hand(store, ladder.confirmation(-10.5), {}, diverged_from=-40)
    found = result_of(ladder, store.root)
    assert found.decisive.confirmation is None
    assert found.problems == (
        "every training of the target diverged; extend the proxies to lower rates, and predict again",
    )


def test_a_prediction_that_is_no_rate(store: HandStore) -> None:
    values = changed("proxies/blocks/0/log2_learning_rate", {"low": -6, "high": -1})
    ladder = load_ladder(values)
    run_by_hand(store, ladder.proxies, {"a": -4.5, "b": -3.5, "c": -2.5})  # -0.5 at the target
    found = result_of(ladder, store.root)
    assert found.log2_lr is None and found.decisive.prediction.log2_lr == pytest.approx(-0.5, abs=0.05)
    assert "the target cannot be trained around 2^-0.5" in found.problems[-1] and "below 1" in found.problems[-1]


def test_optima_at_the_edge_predict_nothing(store: HandStore) -> None:
    ladder = load_ladder(LADDER)
    run_by_hand(store, ladder.proxies, dict.fromkeys("abc", -15.0))
    found = result_of(ladder, store.root)
    assert found.log2_lr is None and "lowest rate; extend the grid there" in found.problems[0]
    assert "no prediction for the target" in lines_of(found)[0]
    assert "no prediction" in write_ladder(ladder, store.root).read_text()


def at_store(ladder: dict[str, Any], root: Path, **changes: Any) -> LadderSettings:
    loaded = load_ladder(ladder)
    overrides = loaded.proxies.overrides | {"compute.store": str(root)}
    return loaded.model_copy(update={"proxies": loaded.proxies.model_copy(update={"overrides": overrides})} | changes)


def test_the_forecast_counts_proxies_and_confirmation(tmp_path: Path) -> None:
    ladder = at_store(LADDER, tmp_path / "store")
    forecast = forecast_ladder(ladder, open_store_of(ladder, checked=False))
    assert [(one.name, one.num_missing) for one in forecast.blocks] == [("sizes", 30), ("confirmation", 6)]
    assert forecast.num_tokens == 36 * 2048
    # 10 cells a size and 6 of the target, 6 operations a parameter and token
    assert forecast.flops == pytest.approx(6 * 2048 * (10 * (2**12 + 2**13 + 2**14) + 6 * 2**16))
    assert forecast.num_unknown == 36
    told = check_hours(ladder.model_copy(update={"max_hours": 1.0}), forecast)
    assert told is not None and "cannot be held against 36 cells" in told


def test_a_forecast_above_the_limit_starts_nothing(tmp_path: Path) -> None:
    hours = json.loads(json.dumps(LADDER)) | {"max_hours": 3.0}
    hours["proxies"]["blocks"][0]["hours"], hours["target"]["hours"] = 2.0, 2.5
    ladder = at_store(hours, tmp_path / "store")
    forecast = forecast_ladder(ladder, open_store_of(ladder, checked=False))
    assert forecast.seconds == pytest.approx(4.5 * 3600)
    with pytest.raises(ValueError, match="forecast to take 4 h 30 min, max_hours allows 3 h; take fewer rates"):
        check_hours(ladder, forecast)


def test_a_forecast_without_the_models(tmp_path: Path) -> None:
    """Hub models and no network: cells, tokens and declared hours are told, and why not more."""
    values = json.loads(json.dumps(LADDER))
    for name in values["proxies"]["overrides"].copy():
        if name.startswith("base_model."):
            del values["proxies"]["overrides"][name]
    for number, size in enumerate((*values["proxies"]["sizes"].values(), values["target"])):
        size["overrides"] = {"base_model": {"path": str(tmp_path / f"missing-{number}")}}
    values["target"]["hours"] = 1.0
    ladder = at_store(values, tmp_path / "store")
    forecast = forecast_ladder(ladder, open_store_of(ladder, checked=False))
    assert [one.num_missing for one in forecast.blocks] == [30, 6] and forecast.seconds == pytest.approx(3600)
    assert "the store was not looked at" in forecast.note and "missing" in forecast.note


def test_shipped_ladders_load() -> None:
    for name in ladder_names():
        assert np.isfinite(load_ladder(name).target.log2_batch)


_FLOW = "import json, sys; from smoltulu.flows.ladder import smoltulu_ladder; smoltulu_ladder(json.loads(sys.argv[1]))"


@pytest.mark.slow
def test_a_real_ladder_and_a_second_call_that_trains_nothing(tmp_path: Path) -> None:
    """Widths 16 and 32 with muP predict width 64, through the flow; minutes."""
    values = yaml.safe_load((SWEEPS / "ladder-tiny.yaml").read_text())
    proxies = values["proxies"]
    proxies["overrides"] |= {"world.skills.num_sft": 4000, "world.num_pretrain": 500}
    proxies["blocks"][0] |= {"seeds": [0], "sizes": ["w16", "w32"], "max_tokens": [65536]}
    proxies["tasks"] = proxies["tasks"][:1]
    values["target"] = {
        "num_parameters": proxies["sizes"]["w64"]["num_parameters"], "overrides": proxies["sizes"]["w64"]["overrides"],
        "log2_batch": 4, "max_tokens": 65536,
    }  # fmt: skip
    values |= {"name": "real", "proxies": proxies | {"name": "real-proxies", "max_edge_cells": 0}}
    code, out = run(values, tmp_path, _FLOW)
    assert code == 0 and "predicted learning rate" in out and "confirmation: the best tested rate is" in out, out[
        -5000:
    ]
    assert (tmp_path / "sweeps" / "real" / "ladder.html").is_file()
    made = sorted((tmp_path / "store").rglob("manifest.json"))
    code, out = run(values, tmp_path, _FLOW)
    assert code == 0 and "0 of 12 cells are missing" in out, out[-5000:]
    assert "0 of 3 cells are missing" in out and sorted((tmp_path / "store").rglob("manifest.json")) == made
