"""The choice of heads: the rule, random controls, gates, and the stage on a model whose copying heads are known."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import (
    HeadSettings,
    ProbeSettings,
    SelectionHeadsConfig,
    SelectionHeadsInputs,
    SelectionHeadsOutputs,
)
from smoltulu.tasks.base_model.copying import PLANTED
from smoltulu.tasks.selection import heads_stage
from smoltulu.tasks.selection.heads import (
    Choice,
    Effect,
    choose_heads,
    gates,
    random_sets,
    rank_correlation,
)
from smoltulu.tasks.selection.heads_stage import find_heads, selection_heads
from smoltulu.tasks.stage import StageContext
from tests.induction_model import PREVIOUS_TOKEN_HEAD, lookup_model, lookup_tokenizer

PROBES = ProbeSettings(num_probes=8, max_tokens=193, key_length=2)


def map_of(num_layers: int, num_heads: int, **heads: float) -> list[list[float]]:
    """Scores of heads named as l1h2; all others 0.01."""
    scores = [[0.01] * num_heads for _ in range(num_layers)]
    for name, score in heads.items():
        layer, head = name.removeprefix("l").split("h")
        scores[int(layer)][int(head)] = score
    return scores


# --- the rule -------------------------------------------------------------------------------------------------------


def test_the_rule_by_hand() -> None:
    """Of 40 heads, 5 % are two."""
    scores = map_of(4, 10, l3h1=0.5, l2h0=0.3, l1h9=0.1, l0h0=0.09)
    every = [(3, 1), (2, 0), (1, 9)]
    assert choose_heads(scores, HeadSettings()) == Choice("threshold", every, [])
    assert choose_heads(scores, HeadSettings(rule="top_share")) == Choice("top_share", every[:2], [])
    assert choose_heads(scores, HeadSettings(rule="union")).heads == every
    assert choose_heads(scores, HeadSettings(rule="union", top_share=0.1)).heads == [*every, (0, 0)]
    assert choose_heads(scores, HeadSettings(threshold=0.6)).heads == []


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "rule", "share"),
    [(16, 20, "union", 16), (30, 9, "union", 14), (32, 15, "union", 24), (24, 32, "union", 38), (4, 8, "threshold", 0)],
)
def test_the_rule_of_real_shapes(num_layers: int, num_heads: int, rule: str, share: int) -> None:
    """5 % of the paper's model and of the SmolLM2 sizes; below 200 heads the threshold alone."""
    scores = [[(layer * num_heads + head) / 1e5 for head in range(num_heads)] for layer in range(num_layers)]
    choice = choose_heads(scores, HeadSettings())
    assert choice.rule == rule and len(choice.heads) == share


def test_ties_at_the_cut_are_found_and_elsewhere_are_none() -> None:
    scores = map_of(4, 10, l0h1=0.5, l1h1=0.3, l2h1=0.3, l3h1=0.3)
    assert choose_heads(scores, HeadSettings(rule="top_share")).tied == [(2, 1), (3, 1)]
    assert choose_heads(scores, HeadSettings(rule="top_share", top_share=0.1)).tied == []
    assert choose_heads(scores, HeadSettings(rule="union")).tied == []


@pytest.mark.parametrize("rule", ["threshold", "top_share", "union"])
def test_scores_that_are_all_zero_are_an_error(rule: Any) -> None:
    """A public port chose the highest of zeros, which are the ones that a sort puts first."""
    with pytest.raises(ValueError, match=r"all retrieval scores are zero.*rds_plus or length"):
        choose_heads([[0.0] * 32] * 4, HeadSettings(rule=rule))


# --- random sets ----------------------------------------------------------------------------------------------------


@given(data=st.data(), num_layers=st.integers(1, 6), num_heads=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_random_sets_are_of_equal_size_and_the_same_layers_where_they_can_be(
    data: st.DataObject, num_layers: int, num_heads: int, seed: int
) -> None:
    every = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    sets = random_sets(chosen, num_layers, num_heads, 5, seed)
    assert sets == random_sets(chosen, num_layers, num_heads, 5, seed)
    assert len({tuple(heads) for heads in sets}) == len(sets) <= 5
    if 2 * len(chosen) > len(every):
        assert not sets
        return
    assert sets
    wanted = Counter(layer for layer, _ in chosen)
    for number, heads in enumerate(sets):
        assert len(set(heads)) == len(chosen) and not set(heads) & set(chosen)
        found = Counter(layer for layer, _ in heads)
        if number:  # the first has as many of each layer as there are; others may have to differ from it
            continue
        for layer, count in wanted.items():
            assert found[layer] >= min(count, num_heads - count)


def test_a_full_layer_is_helped_out_from_above_first() -> None:
    """A lower layer may feed the chosen heads."""
    chosen = [(1, head) for head in range(3)]  # of four in each of three layers
    for heads in random_sets(chosen, 3, 4, 5, 0):
        assert Counter(layer for layer, _ in heads) == {1: 1, 2: 2}


def test_a_layer_with_one_set_to_draw_gets_others_from_the_next() -> None:
    """Three of six are chosen: the other three are one set, and two of them with a head of layer 2 are more."""
    sets = random_sets([(1, 0), (1, 1), (1, 2)], 3, 6, 5, 0)
    assert sets[0] == [(1, 3), (1, 4), (1, 5)] and len(sets) == 5
    assert all(Counter(layer for layer, _ in heads) == {1: 2, 2: 1} for heads in sets[1:])
    assert random_sets([(0, 0)], 1, 2, 5, 0) == [[(0, 1)]], "there is no other set at all"
    assert len(random_sets([(1, 0)], 2, 4, 5, 0)) == 3, "three of the same layer are enough"


# --- figures --------------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 0 1 2 3 and 1 0 3 2: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    # Ranks 0.5 0.5 2 and 0 1 2: covariance 1.5, deviations sqrt(1.5) and sqrt(2)
    assert rank_correlation([1, 1, 3], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    first, second = [list(map(float, side)) for side in zip(*pairs, strict=True)]
    if len(set(first)) > 1 and len(set(second)) > 1:
        assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


GOOD = Effect([(3, 1), (2, 0)], 0.1, 0.9)
OTHERS = [Effect([(3, 0), (2, 1)], 0.8, 0.4), Effect([(3, 2), (2, 2)], 0.6, 0.5)]
CHOICE = Choice("threshold", GOOD.heads, [])
SCORES = map_of(4, 10, l3h1=0.5, l2h0=0.3)


def failed(**changes: Any) -> list[str]:
    values = {
        "accuracy": 0.9, "scores": SCORES, "choice": CHOICE, "chosen": GOOD, "controls": OTHERS, "num_random_sets": 2,
        "resampled": GOOD.heads,
    } | changes  # fmt: skip
    return [gate.name for gate in gates(**values) if not gate.passed]


def test_each_gate_by_itself() -> None:
    assert failed() == []
    assert failed(accuracy=0.5) == [] and failed(accuracy=0.49) == ["probe_accuracy"]
    assert failed(scores=map_of(4, 10, l3h1=0.1)) == []
    assert failed(scores=map_of(4, 10, l3h1=0.099)) == ["largest_score"]
    assert failed(choice=CHOICE.__class__("top_share", GOOD.heads, [(0, 0)])) == ["no_ties"]
    assert failed(chosen=GOOD._replace(accuracy=0.6)) == ["control_accuracy"]
    assert failed(chosen=GOOD._replace(correlation=0.5)) == ["control_correlation"]
    assert failed(resampled=[(3, 1), (0, 0)]) == ["resampled"]
    assert failed(controls=[]) == ["control"]
    assert failed(accuracy=0.0, resampled=[]) == ["probe_accuracy", "resampled"]


def test_the_gate_says_how_many_random_heads_are_of_other_layers() -> None:
    def said(controls: list[Effect]) -> str:
        found = gates(0.9, SCORES, CHOICE, GOOD, controls, 2, GOOD.heads)
        return next(gate.sentence for gate in found if gate.name == "control_accuracy")

    assert "other layers" not in said(OTHERS)
    moved = [OTHERS[0], Effect([(1, 0), (3, 2)], 0.6, 0.5)]
    assert "1 of their 4 heads are of other layers" in said(moved)


def test_the_measured_redundancy_case_fails_and_the_six_heads_pass() -> None:
    """Figures of a four-layer model with six copying heads: the top 5 % are two, and cost less than random sets."""
    controls = [Effect([], 0.98, 0.03), Effect([], 0.44, 0.89)]
    assert failed(chosen=Effect([], 0.92, 0.44), controls=controls) == ["control_accuracy", "control_correlation"]
    assert failed(chosen=Effect([], 0.004, 0.97), controls=controls) == []


# --- the stage ------------------------------------------------------------------------------------------------------


def context_of(folder: Path, batch: int = 8, report: Any = None) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    compute = ComputeSettings(device="cpu", num_threads=1, per_device_eval_batch_size=batch)
    return StageContext(folder / "out", folder / "work", compute, report or (lambda *_, **__: None))


def run(
    model: Path, folder: Path, batch: int = 8, report: Any = None, **settings: Any
) -> tuple[SelectionHeadsOutputs, dict[str, float]]:
    values: dict[str, Any] = {"probes": PROBES, "heads": HeadSettings(), "mask": "uniform", "gate": "stop"} | settings
    return find_heads(
        SelectionHeadsConfig(**values), SelectionHeadsInputs(model=str(model)), context_of(folder, batch, report)
    )


def heads_of(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "out" / "heads.json").read_text())
    return made


@pytest.fixture(scope="module", autouse=True)
def no_single_heads() -> Iterator[None]:
    """Masking each head by itself takes longer than all else; one test does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads_stage, "SINGLE_HEADS_FLOPS", 0.0)
        yield


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lookup_model(tmp_path_factory.mktemp("copying"))


@pytest.fixture(scope="module")
def redundant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads that do the same, of six in their layer, in a model whose config says that they are planted."""
    folder = lookup_model(tmp_path_factory.mktemp("redundant"), (0, 1, 2), num_heads=6, num_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {PLANTED: True}))
    return folder


@pytest.fixture(scope="module")
def whole(copying: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that nobody stopped, three probes at a time, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(copying, folder, batch=3)


def test_the_one_copying_head_is_found_and_passes_every_gate(
    copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_stage, "SINGLE_HEADS_FLOPS", 1e12)
    steps: list[tuple[int, int]] = []
    outputs, metrics = run(copying, tmp_path, report=lambda step, total, **_: steps.append((step, total)))
    assert [(head.layer, head.head) for head in outputs.chosen] == [(1, 2)]
    assert (outputs.num_layers, outputs.num_heads, outputs.failed_gates) == (2, 4, ())
    assert outputs.probe_accuracy > 0.7 and outputs.max_score > 0.9 and metrics["masked_accuracy"] == 0
    assert steps == sorted(steps) and steps[-1] == (PROBES.num_probes * 4,) * 2

    made = heads_of(tmp_path)
    assert made["chosen"] == [[1, 2]] and made["rule"] == "threshold" and made["mask"] == "uniform"
    assert [[score > 0 for score in layer] for layer in made["scores"]] == [[False] * 4, [False, False, True, False]]
    assert (
        made["model"]["planted"] is False
        and made["model"]["num_layers"] == 2
        and made["model"]["num_parameters"] > 500_000
    )
    control = made["control"]
    assert control["plain"]["accuracy"] == outputs.probe_accuracy and control["chosen"]["accuracy"] == 0
    assert sorted(one["heads"] for one in control["random"]) == [[[1, 0]], [[1, 1]], [[1, 3]]]
    assert all(one["accuracy"] == outputs.probe_accuracy for one in control["random"])
    assert control["chosen"]["correlation"] > 0.5
    # The head upstream has no score, and nothing works without it.
    layer, head = PREVIOUS_TOKEN_HEAD
    assert made["single_heads"][layer][head] == 0 and made["scores"][layer][head] == 0
    assert [gate["name"] for gate in made["gates"] if gate["passed"]] == [
        "probe_accuracy", "largest_score", "no_ties", "control_accuracy", "control_correlation", "resampled",
    ]  # fmt: skip
    assert made["probes"]["num_probes"] == 8 and made["probes"]["num_tokens"] == [193, 193]
    lines = [json.loads(line) for line in (tmp_path / "out" / "probes.jsonl").read_text().splitlines()]
    assert sum(line["is_right"] for line in lines) / 8 == outputs.probe_accuracy
    assert all(line["value"] in line["text"] and line["num_tokens"] == 193 for line in lines)


def test_too_few_of_redundant_heads_are_refused_with_figures_or_warned_of(
    redundant: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = HeadSettings(rule="top_share", top_share=0.11)
    with pytest.raises(ValueError, match=r"fail 3 of 6 gates") as raised:
        run(redundant, tmp_path, heads=two)
    message = str(raised.value)
    assert "1 heads that are not chosen tie" in message
    pattern = r"without the 2 chosen heads the accuracy is (\d+%), without the worst of 5 random sets (\d+%)"
    found = re.search(pattern, message)
    assert found and int(found[1].rstrip("%")) >= int(found[2].rstrip("%"))
    assert "rds_plus or length" in message and "selection.gate to warn" in message

    with caplog.at_level(logging.WARNING):
        outputs, metrics = run(redundant, tmp_path, heads=two, gate="warn")
    assert len(outputs.failed_gates) == metrics["num_failed_gates"] == 3
    assert "prove nothing" in caplog.text
    assert sum(not gate["passed"] for gate in heads_of(tmp_path)["gates"]) == 3
    assert selection_heads.gate_failures is not None
    values: dict[str, Any] = {"probes": PROBES, "heads": two, "mask": "uniform"}
    assert selection_heads.gate_failures(SelectionHeadsConfig(**values), outputs, metrics) == list(outputs.failed_gates)
    assert selection_heads.gate_failures(SelectionHeadsConfig(**values, gate="warn"), outputs, metrics) == []


def test_all_redundant_heads_pass_and_that_they_are_planted_is_told(
    redundant: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs, _ = run(redundant, tmp_path, batch=5)
    assert [(head.layer, head.head) for head in outputs.chosen] == [(1, 0), (1, 1), (1, 2)]
    assert heads_of(tmp_path)["model"]["planted"] and "is no finding" in caplog.text
    controls = [one["heads"] for one in heads_of(tmp_path)["control"]["random"]]
    assert controls[0] == [[1, 3], [1, 4], [1, 5]] and {layer for one in controls for layer, _ in one} == {1, 2}


@pytest.mark.parametrize("mask", ["zero_output", "reference_checkpoint"])
def test_other_masks(copying: Path, tmp_path: Path, mask: str) -> None:
    outputs, metrics = run(copying, tmp_path, mask=mask, gate="warn")
    assert len(outputs.chosen) == 1 and metrics["masked_accuracy"] == 0
    assert heads_of(tmp_path)["mask"] == mask


class Killed(BaseException):
    """What a kill leaves behind: nothing is cleaned up."""


@pytest.mark.parametrize("after", [8, 24])
def test_a_kill_in_the_middle_costs_one_part(
    copying: Path, whole: Any, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = whole

    def stop(step: int, num_steps: int, **metrics: float) -> None:
        if step >= after:
            raise Killed

    with pytest.raises(Killed):
        run(copying, tmp_path / "killed", batch=3, report=stop)
    # A file that was cut off in the middle is made again.
    last = max((tmp_path / "killed/work/heads").glob("*-*.json"), key=lambda file: file.stat().st_mtime_ns)
    last.write_text(last.read_text()[:20])
    calls: list[int] = []
    original = heads_stage.batch_of

    def counted(probes: Any, *rest: Any) -> Any:
        calls.append(len(probes))
        return original(probes, *rest)

    monkeypatch.setattr(heads_stage, "batch_of", counted)
    assert run(copying, tmp_path / "killed", batch=3) == result
    assert heads_of(tmp_path / "killed") == heads_of(folder)
    # Both draws are read by `read_probes`; the control passes over the probes and the graded ones are counted here.
    assert sum(calls) <= 16 - max(0, after - 24) + 8
    if after == 24:  # other settings do not take over what is there
        others = PROBES.model_copy(update={"seed": 1})
        assert run(copying, tmp_path / "killed", probes=others, gate="warn")[0] != result[0]


def test_batches_change_nothing(copying: Path, whole: Any, tmp_path: Path) -> None:
    """Of three before, and of eight here."""
    folder, _ = whole
    run(copying, tmp_path)
    one, other = heads_of(folder), heads_of(tmp_path)
    assert one["scores"] == other["scores"] and one["chosen"] == other["chosen"]
    assert one["control"]["chosen"]["accuracy"] == other["control"]["chosen"]["accuracy"]


def test_a_model_that_copies_nothing_is_an_error_even_with_a_warning(tmp_path: Path) -> None:
    model = lookup_model(tmp_path / "model", copying_heads=())
    with pytest.raises(ValueError, match="all retrieval scores are zero"):
        run(model, tmp_path, gate="warn")


def test_a_loss_that_is_no_number_is_no_rank(copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_stage, "token_losses", lambda model, hidden, ids: hidden[:, 0] * torch.nan)
    with pytest.raises(ValueError, match="loss of a probe is no number"):
        run(copying, tmp_path)


def test_no_head_above_the_threshold(copying: Path, tmp_path: Path) -> None:
    probes = PROBES.model_copy(update={"seed": 2})  # one of them is not done
    with pytest.raises(ValueError, match=r"score of 1 \(selection.heads.threshold\): the largest is 0\.9"):
        run(copying, tmp_path, probes=probes, heads=HeadSettings(threshold=1.0), gate="warn")


def test_probes_beyond_the_models_context_are_refused(copying: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_tokens is 600, and the selector model reads 512"):
        run(copying, tmp_path, probes=PROBES.model_copy(update={"max_tokens": 600}))


def test_a_model_whose_heads_cannot_be_masked_is_refused(tmp_path: Path) -> None:
    tokenizer = lookup_tokenizer()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"sliding window of 8 tokens.*rds_plus"):
        run(tmp_path / "model", tmp_path)


def test_a_batch_that_does_not_fit_into_memory_is_halved() -> None:
    assert selection_heads.batch_setting == "per_device_eval_batch_size"
