"""Is it good? Which models are compared, what is claimed of them, and which prompts are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.tasks.comparison.answers import choose_prompts
from smoltulu.tasks.comparison.verdict import Evaluation, assess

GREEDY = {
    "task": "greedy", "metric": "exact_match,strict-match", "num_samples": 1, "num_fewshot": 0, "harness": "h",
    "task_version": "1", "template_digest": "t",
}  # fmt: skip
SAMPLED = GREEDY | {"task": "verified_sampled", "metric": "accuracy"}


def greedy(number: int, value: float, **more: Any) -> dict[str, Any]:
    hashes = {"doc_hash": f"d{number}", "prompt_hash": f"p{number}", "target_hash": f"t{number}"}
    row = {"task": "greedy", "entry": 0, "id": number, "filter": "strict-match", "metrics": {"exact_match": value}}
    return row | hashes | {"completion": f"answer {number}", "target": str(number)} | more


def sampled(number: int, *scores: float, **more: Any) -> dict[str, Any]:
    row = {"task": "verified_sampled", "id": f"0:{number}", "doc_hash": f"s{number}", "scores": list(scores)}
    return row | {"mean": sum(scores) / len(scores), "num_stopped": len(scores), "completion": f"s {number}"} | more


def evaluation(folder: Path, subject: str, rows: list[dict[str, Any]], **changes: Any) -> Evaluation:
    """Scores are the means of their rows. `changes`: of every score."""
    folder /= subject
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text("{}")
    scores = []
    for score in (GREEDY, SAMPLED):
        values = [row["metrics"]["exact_match"] if "metrics" in row else row["mean"] for row in rows
                  if row["task"] == score["task"]]  # fmt: skip
        if values:
            scores.append(score | {"value": sum(values) / len(values)} | changes)
    outputs = {"subject": subject, "scores": scores, "samples_file": "samples.jsonl", "results_file": "results.json"}
    return Evaluation(subject, folder, "digest", EvaluationOutputs.model_validate(outputs))


def test_each_model_is_compared_with_the_one_before_and_the_last_with_the_first(tmp_path: Path) -> None:
    """40 items: SFT has none right; DPO the first 20; RLVR these, and 8 more."""
    right = {"base_model": 0, "sft": 0, "dpo": 20, "rlvr": 28}
    models = tuple(
        evaluation(tmp_path, subject, [greedy(i, float(i < number)) for i in range(40)])
        for subject, number in right.items()
    )
    verdict, prompts = assess(models)
    assert verdict.measured == tuple(right) and verdict.num_tests == 4
    pairs = [(one.before, one.after, one.changes[0]) for one in verdict.comparisons]
    assert [(before, after, change.change) for before, after, change in pairs] == [
        ("base_model", "sft", "same"),
        ("sft", "dpo", "gain"),
        ("dpo", "rlvr", "gain"),
        ("base_model", "rlvr", "gain"),
    ]
    step = pairs[2][2]
    # Of 40 differences 8 are 1: variance (8 - 64/40)/39 = 0.1641; its root over that of 40 is 0.0641.
    assert step.difference == pytest.approx(0.2) and step.stderr == pytest.approx(0.06405, abs=1e-5)
    # McNemar: 2 * 0.5^8 = 0.0078; the third smallest of four p-values is doubled.
    assert step.p_value == pytest.approx(2**-7) and step.adjusted == pytest.approx(2 * 2**-7)
    assert step.is_share and step.num_items == 40 and not step.is_near_chance
    assert [prompt.fate for prompt in prompts].count("gained") == 8
    assert [answer.subject for answer in prompts[0].answers] == list(right)


def test_all_tests_of_the_page_are_adjusted_together(tmp_path: Path) -> None:
    """6 of 6 gained: p = 2/64 = 0.031 is a gain alone, and noise as one of two tests."""
    rows = [[greedy(i, float(i < number)) for i in range(12)] for number in (0, 6)]
    before, after = (evaluation(tmp_path / "one", f"m{i}", rows[i]) for i in (0, 1))
    assert assess((before, after))[0].comparisons[0].changes[0].change == "gain"
    two = [evaluation(tmp_path / "two", f"m{i}", [*rows[i], sampled(0, 0.0), sampled(1, float(i))]) for i in (0, 1)]
    changes = assess(tuple(two))[0].comparisons[0].changes
    assert {change.task: change.change for change in changes} == dict.fromkeys(
        ("greedy", "verified_sampled"), "within noise"
    )


def test_nothing_is_claimed_where_nothing_can_be_compared(tmp_path: Path) -> None:
    """One model alone; a base that was asked in another template; samples that are cut short."""
    rows = [greedy(i, 1.0) for i in range(12)]
    alone = evaluation(tmp_path, "sft", rows)
    assert assess(())[0].measured == () and assess(())[1] == ()
    assert assess((alone,))[0].comparisons == ()
    base = evaluation(tmp_path, "base_model", [greedy(i, 0.0) for i in range(12)], template_digest="none")
    verdict, prompts = assess((base, alone))
    [change] = verdict.comparisons[0].changes
    assert change.change == "not comparable" and change.reason == "another chat template: none -> t"
    assert verdict.num_tests == 0 and change.difference is None
    # The answers stand side by side all the same: they answer the same documents.
    assert [answer.subject for answer in prompts[0].answers] == ["base_model", "sft"]
    cut = evaluation(tmp_path, "dpo", rows)
    (cut.folder / "samples.jsonl").write_text('{"task": "gree')
    verdict, _ = assess((alone, cut))
    assert "samples.jsonl, line 1" in verdict.unreadable["dpo"]
    assert [one.reason for one in verdict.comparisons[0].changes] == ["the samples of dpo cannot be read"]
    gone = evaluation(tmp_path, "rlvr", rows)
    (gone.folder / "samples.jsonl").unlink()
    assert assess((alone, gone))[0].unreadable.keys() == {"rlvr"}


def test_less_is_better_for_bits(tmp_path: Path) -> None:
    rows = [[greedy(i, 0.0) | {"metrics": {"exact_match": v + i / 100}} for i in range(20)] for v in (2.0, 1.0)]
    before, after = (evaluation(tmp_path, f"m{i}", rows[i], metric="bits_per_byte,none") for i in (0, 1))
    for one in (before, after):
        text = (one.folder / "samples.jsonl").read_text()
        (one.folder / "samples.jsonl").write_text(
            text.replace("exact_match", "bits_per_byte").replace("strict-match", "none")
        )
    [change] = assess((before, after))[0].comparisons[0].changes
    assert change.change == "gain" and change.difference == pytest.approx(1.0) and not change.is_share


def test_a_difference_of_two_scores_near_chance_is_marked(tmp_path: Path) -> None:
    rows = [greedy(i, float(i % 2)) for i in range(12)]
    details = [{"is_near_chance": True}, {"is_near_chance": True}, {"is_near_chance": False}]
    models = [evaluation(tmp_path, f"m{i}", rows, details=one) for i, one in enumerate(details)]
    changes = [one.changes[0] for one in assess(tuple(models))[0].comparisons]
    assert [change.is_near_chance for change in changes] == [True, False, False]


def test_flipped_prompts_come_first_then_cut_then_wrong_ones(tmp_path: Path) -> None:
    """Of 60 items 14 are gained, 3 lost, 5 cut (and wrong), 20 wrong in both, 18 right in both."""
    sft, dpo = [], []
    for i in range(60):
        was, now = (0, 1) if i < 14 else (1, 0) if i < 17 else (0, 0) if i < 42 else (1, 1)
        cut = {"is_truncated": True, "stop": "length"} if 17 <= i < 22 else {}
        sft.append(greedy(i, float(was)))
        dpo.append(greedy(i, float(now), **cut))
    models = tuple(evaluation(tmp_path, name, rows) for name, rows in (("sft", sft), ("dpo", dpo)))
    _, prompts = assess(models)
    fates = [prompt.fate for prompt in prompts]
    # Lost and gained take turns until the three lost ones are shown; 10 of 17, then 4, 4 and 2.
    assert fates == [
        *["lost", "gained"] * 3, *["gained"] * 4, *["truncated"] * 4, *["wrong"] * 4, *["right"] * 2
    ]  # fmt: skip
    again = assess(
        tuple(evaluation(tmp_path / "again", m.subject, r) for m, r in zip(models, (sft[::-1], dpo[::-1]), strict=True))
    )
    assert [prompt.id for prompt in again[1]] == [prompt.id for prompt in prompts], "in whatever order they were asked"
    few = choose_prompts([("dpo", {})])
    assert few == ()


def test_an_answer_says_what_it_is(tmp_path: Path) -> None:
    """The first of several samples is shown, and judged by itself; odd answers are marked; long ones are cut."""
    rows = [
        sampled(0, 1.0, 0.0, 0.0, 0.0, reason="equals 4", prompt="2+2?"),
        sampled(1, 0.0, 0.0, num_stopped=0),
        greedy(0, 0.0, completion=" \n", is_empty=True, is_left_cut=True),
        greedy(1, 0.5, completion="x" * 30_000),
        greedy(2, 1.0, completion="a \ud800 b", is_unparsed=False),
    ]
    _, prompts = assess((evaluation(tmp_path, "sft", rows),))
    by_id = {prompt.id: prompt for prompt in prompts}
    first = by_id["0:0"].answers[0]
    assert (first.is_right, first.value, first.num_samples, first.reason) == (True, 0.25, 4, "equals 4")
    assert by_id["0:0"].prompt == "2+2?" and by_id["0"].prompt is None
    assert by_id["0:1"].fate == "truncated" and by_id["0:1"].answers[0].marks == ("cut at the limit",)
    assert by_id["0"].answers[0].marks == ("empty", "beginning of the prompt cut off")
    partly = by_id["1"].answers[0]
    assert partly.is_right is None and (len(partly.text), partly.num_left_out) == (20_000, 10_000)
    assert by_id["2"].answers[0].text == "a ? b" and by_id["2"].answers[0].marks == ()
    # A choice by log-likelihood has nothing to read.
    silent = [{name: value for name, value in row.items() if name != "completion"} for row in rows[2:]]
    assert assess((evaluation(tmp_path / "silent", "sft", silent),))[1] == ()
