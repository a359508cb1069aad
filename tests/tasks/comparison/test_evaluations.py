"""Two evaluations, item by item: which filter, which items, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.tasks.comparison.evaluations import Comparison, Measured, compare, flipped, measured, verdicts
from smoltulu.tasks.evaluation.lm_eval import _compact
from smoltulu.tasks.evaluation.samples import write_samples

SCORE = {
    "task": "gsm8k", "metric": "exact_match,strict-match", "num_samples": 4, "num_fewshot": 5,
    "harness": "lm-eval 0.4.13", "task_version": "3.0", "template_digest": "t",
}  # fmt: skip


def sample(number: int, value: float, **changes: Any) -> dict[str, Any]:
    return {
        "task": "gsm8k", "id": number, "filter": "strict-match", "doc_hash": f"d{number}", "prompt_hash": f"p{number}",
        "target_hash": f"t{number}", "metrics": {"exact_match": value}, "completion": "#### 5",
    } | changes  # fmt: skip


def evaluation(
    folder: Path, samples: list[dict[str, Any]], scores: list[dict[str, Any]] | None = None, results: Any = None
) -> dict[str, Measured]:
    folder.mkdir()
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({"subject": "sft", "lm_eval": results or {}}))
    # A score is the mean of its items, where nothing else is said.
    values = [one["metrics"]["exact_match"] for one in samples if one.get("filter") in ("strict-match", "get-answer")]
    mean = sum(values) / len(values) if values else 0.5
    scores = [{"value": mean} | one for one in scores or [SCORE]]
    return measured(folder, outputs(scores))


def outputs(scores: list[dict[str, Any]]) -> EvaluationOutputs:
    files = {"samples_file": "samples.jsonl", "results_file": "results.json"}
    return EvaluationOutputs.model_validate({"subject": "sft", "scores": scores} | files)


def one(before: dict[str, Measured], after: dict[str, Measured]) -> Comparison:
    [made] = compare("sft", before, after)
    return made


def test_a_score_is_judged_by_its_own_filter(tmp_path: Path) -> None:
    """Every strict answer lost, every flexible one kept: whichever filter comes last in the file."""
    for order in (1, -1):
        night = tmp_path / str(order)
        night.mkdir()
        kept = [sample(i, 1.0, filter="flexible-extract") for i in range(8)]
        last = evaluation(night / "last", ([sample(i, 1.0) for i in range(8)] + kept)[::order])
        tonight = evaluation(night / "tonight", ([sample(i, 0.0) for i in range(8)] + kept)[::order])
        made = one(last, tonight)
        assert made.test is not None and (made.test.num_items, made.test.num_lost) == (8, 8)
        [(_, adjusted, verdict)] = verdicts([made], 0.05)
        assert verdict == "drop" and adjusted == 2 / 256


def test_a_group_is_compared_by_its_members(tmp_path: Path) -> None:
    group = SCORE | {"task": "bbh", "metric": "exact_match,get-answer"}
    results = {"bbh": {"n-samples": {"bbh_navigate": {}, "bbh_snarks": {}}}}

    def night(name: str, value: float) -> dict[str, Measured]:
        rows = [
            sample(i, value, task=task, filter="get-answer")
            for task in ("bbh_navigate", "bbh_snarks")
            for i in range(4)
        ]
        return evaluation(tmp_path / name, rows, [group], results)

    last, tonight = night("last", 1.0), night("tonight", 0.0)
    assert {item.member for item in last["bbh"].items.values()} == {"bbh_navigate", "bbh_snarks"}
    made = one(last, tonight)
    assert made.test is not None and (made.test.num_items, made.test.num_lost) == (8, 8)
    assert verdicts([made], 0.05)[0][2] == "drop"


def test_what_is_not_the_same_thing_is_named(tmp_path: Path) -> None:
    rows = [sample(i, 1.0) for i in range(4)]
    last = evaluation(tmp_path / "last", rows)
    changes: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([*rows[:3], sample(7, 1.0)], {}, "other documents: 1 of 4 are gone, 1 are new"),
        (rows[:3], {}, "other documents: 1 of 4 are gone, 0 are new"),
        ([*rows[:3], sample(3, 1.0, prompt_hash="x")], {}, "other prompts: 1 of 4 are asked otherwise"),
        (rows, {"task_version": "4.0"}, "another task version: 3.0 -> 4.0"),
        (rows, {"template_digest": "u"}, "another chat template: t -> u"),
        (rows, {"num_fewshot": 0}, "another number of shots: 5 -> 0"),
        (rows, {"harness": "lm-eval 1"}, "another harness: lm-eval 0.4.13 -> lm-eval 1"),
        (
            rows,
            {"metric": "exact_match,flexible-extract"},
            "another metric: exact_match,strict-match -> exact_match,fl",
        ),
        (rows, {"limited": True}, "another part of the task: False -> True"),
        ([], {}, "no items were kept"),
    ]
    for number, (changed, score, reason) in enumerate(changes):
        made = one(last, evaluation(tmp_path / str(number), changed, [SCORE | score]))
        assert made.reason.startswith(reason) and made.test is None
        assert verdicts([made], 0.05) == [(made, None, "not comparable")]
    assert one(last, {}).reason == "is not measured any more" and one({}, last).reason == "was not measured before"
    assert one(last, evaluation(tmp_path / "again", rows)).test is not None


def test_lines_end_at_a_newline_only(tmp_path: Path) -> None:
    """U+2028 and its like in a completion once ended the night."""
    odd = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    night = evaluation(tmp_path / "night", [sample(i, 1.0, completion=odd) for i in range(3)])
    assert len(night["gsm8k"].items) == 3
    (tmp_path / "night" / "samples.jsonl").write_text('{"task": "gsm8k"')
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: .*; evaluate this model again"):
        measured(tmp_path / "night", outputs([SCORE | {"value": 1.0}]))


def test_flipped_items_are_there_to_read_lost_ones_first(tmp_path: Path) -> None:
    last = evaluation(tmp_path / "last", [sample(i, float(i > 1), completion=f"old {i}") for i in range(4)])
    night = evaluation(tmp_path / "night", [sample(i, float(i in (0, 3)), completion=f"new {i}") for i in range(4)])
    shown = [(old.row["completion"], new.row["completion"]) for old, new in flipped(last["gsm8k"], night["gsm8k"])]
    assert shown == [("old 2", "new 2"), ("old 0", "new 0")]


def test_a_mean_of_members_weighs_the_items_of_each(tmp_path: Path) -> None:
    """Eight items of one member, two of another: (1/8 + 0) / 2 -> (0 + 1) / 2, where one item is lost, two gained."""
    members = ["small"] * 2 + ["large"] * 8
    results = {"group": {"n-samples": {"small": {}, "large": {}}}}

    def night(name: str, right: set[int], value: float) -> dict[str, Measured]:
        rows = [sample(i, float(i in right), task=task, filter="get-answer") for i, task in enumerate(members)]
        score = SCORE | {"task": "group", "metric": "exact_match,get-answer", "value": value}
        return evaluation(tmp_path / name, rows, [score], results)

    last, tonight = night("last", {2}, 1 / 16), night("tonight", {0, 1}, 0.5)
    made = one(last, tonight)
    assert made.test is not None and made.test.difference == pytest.approx(0.5 - 1 / 16)
    assert (made.test.num_lost, made.test.num_gained) == (1, 2)
    # Sums of signs: +-2.5 +-2.5 +-0.625: the two large ones alike in 4 of 8, of which 4.375 or more is seen.
    assert made.test.p_value == 0.5
    by_size = one(night("last by size", {2}, 0.1), night("tonight by size", {0, 1}, 0.2))
    assert by_size.test is not None and by_size.test.difference == pytest.approx(0.1)
    other = one(night("last otherwise", {2}, 0.3), night("tonight otherwise", {0, 1}, 0.2))
    assert other.test is None and other.reason == "the score is no mean of its items"


def test_other_ways_to_sample_are_named(tmp_path: Path) -> None:
    rows = [sample(i, 1.0) for i in range(4)]
    made = [
        evaluation(tmp_path / str(temperature), rows, [SCORE | {"details": {"temperature": temperature, "seed": 0}}])
        for temperature in (0.7, 1.0)
    ]
    assert one(*made).reason == "another temperature: 0.7 -> 1.0"


def test_a_sample_without_a_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a sample of gsm8k has no id and no doc_hash; evaluate this model again"):
        evaluation(tmp_path / "night", [{"task": "gsm8k", "filter": "strict-match", "metrics": {"exact_match": 1.0}}])


def test_a_document_that_is_asked_twice_is_two_items(tmp_path: Path) -> None:
    twice = [sample(0, 1.0), sample(1, 0.0, doc_hash="d0", target_hash="t0"), sample(2, 1.0)]
    night = evaluation(tmp_path / "night", twice)
    assert [item.value for item in night["gsm8k"].items.values()] == [1.0, 0.0, 1.0]


def test_shares_of_samples_and_pairs_are_items_too(tmp_path: Path) -> None:
    own = {"harness": "smoltulu 0", "num_fewshot": 0, "value": 0.5, "num_samples": 2, "task_version": "1"}
    scores = [
        SCORE | own | {"task": "verified_sampled", "metric": "accuracy"},
        SCORE | own | {"task": "preference", "metric": "pair_accuracy"},
        SCORE | own | {"task": "preference", "metric": "mean_margin"},
    ]
    rows = [
        {"task": "verified_sampled", "id": "0:1", "mean": 0.25},
        {"task": "verified_sampled", "id": "0:2", "mean": 0.75},
        {"task": "preference", "id": "0:1", "right": True},
        {"task": "preference", "id": "0:2", "right": False},
    ]
    night = evaluation(tmp_path / "night", rows, scores)
    values = {task: [item.value for item in one.items.values()] for task, one in night.items()}
    assert values == {"verified_sampled": [0.25, 0.75], "preference": [1.0, 0.0]}
    assert night["preference"].score.metric == "pair_accuracy"


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    """Two of twelve lost and one NaN: once the test said p = 0, and the verdict was a gain."""
    last = evaluation(tmp_path / "last", [sample(i, 1.0) for i in range(12)])
    rows = [sample(i, float("nan") if i == 11 else float(i > 1)) for i in range(12)]
    made = one(last, evaluation(tmp_path / "tonight", rows, [SCORE | {"value": 0.8}]))
    assert made.test is None and made.reason == "1 of 12 items have a score that is no number"


def test_a_task_that_is_named_twice_is_judged_twice(tmp_path: Path) -> None:
    """By strict and by flexible answers, and as a member of a group: no item counts twice, and no score is passed over.

    Six of forty strict answers lost are p = 2 / 2^6; as twelve of eighty they were 2 / 2^12.
    """
    group = SCORE | {"task": "maths", "metric": "exact_match,strict-match"}
    flexible = SCORE | {"metric": "exact_match,flexible-extract", "value": 1.0}
    results = {"maths": {"n-samples": {"gsm8k": {}}}}

    def night(name: str, num_lost: int) -> dict[str, Measured]:
        rows = [
            sample(i, float(of != "strict-match" or i >= num_lost), filter=of, entry=entry)
            for entry in range(3)
            for of in ("strict-match", "flexible-extract")
            for i in range(40)
        ]
        return evaluation(tmp_path / name, rows, [SCORE, flexible, group], results)

    made = {one.task: one.test for one in compare("sft", night("last", 0), night("tonight", 6))}
    assert list(made) == ["gsm8k", "gsm8k exact_match,flexible-extract", "maths"]
    counts = {task: (test.num_items, test.num_lost, test.p_value) for task, test in made.items() if test is not None}
    assert counts == {
        "gsm8k": (40, 6, 2 / 2**6), "gsm8k exact_match,flexible-extract": (40, 0, 1.0), "maths": (40, 6, 2 / 2**6),
    }  # fmt: skip


# --- Clusters, composites, directions -------------------------------------------------------------------------------


def instructions(folder: Path, kept: list[list[bool]], metric: str, value: float) -> dict[str, Measured]:
    """Prompts of IFEval, each with whether its instructions were followed."""
    rows = [
        sample(i, 0.0, task="ifeval", filter="none", metrics={}, parts={metric.partition(",")[0]: of})
        for i, of in enumerate(kept)
    ]
    score = SCORE | {"task": "ifeval", "metric": metric, "value": value, "num_fewshot": 0}
    return evaluation(folder, rows, [score])


def test_instructions_are_resampled_by_prompt(tmp_path: Path) -> None:
    """Twelve of thirty instructions lost are four of ten prompts, p = 2 / 2^4; as items they were 2 / 2^12."""
    name = "inst_level_strict_acc,none"
    before = instructions(tmp_path / "before", [[True] * 3] * 10, name, 1.0)
    after = instructions(tmp_path / "after", [[False] * 3] * 4 + [[True] * 3] * 6, name, 18 / 30)
    made = one(before, after)
    assert made.test is not None and (made.test.num_items, made.test.num_lost) == (10, 4)
    assert made.test.p_value == 0.125 and made.test.difference == pytest.approx(-0.4)
    assert [(old.value, new.value) for old, new in flipped(before["ifeval"], after["ifeval"])] == [(1.0, 0.0)] * 4


def test_the_share_of_instructions_weighs_prompts_by_their_number(tmp_path: Path) -> None:
    """Prompts of 1 and 3 instructions: 3 of 4 kept before, 1 of 4 after, so -0.5; by prompt it would be -1/2 + 1/2."""
    name = "inst_level_strict_acc,none"
    made = one(
        instructions(tmp_path / "before", [[False], [True, True, True]], name, 0.75),
        instructions(tmp_path / "after", [[True], [False, False, False]], name, 0.25),
    )
    assert made.test is not None and made.test.difference == -0.5
    assert (made.test.num_lost, made.test.num_gained, made.test.p_value) == (1, 1, 1.0)


def test_a_score_of_prompts_and_instructions_is_compared(tmp_path: Path) -> None:
    """IFEval's average: half by prompt, half by instruction. Before (1/2 + 3/4) / 2, after (0 + 2/4) / 2."""
    before = instructions(tmp_path / "before", [[True, True], [True, False]], "average_strict,none", 0.625)
    after = instructions(tmp_path / "after", [[True, False], [True, False]], "average_strict,none", 0.25)
    made = one(before, after)
    assert made.test is not None and made.test.difference == pytest.approx(-0.375)
    assert (made.test.num_lost, made.test.num_gained) == (1, 0)
    wrong = instructions(tmp_path / "wrong", [[True, False], [True, False]], "average_strict,none", 0.3)
    assert one(before, wrong).reason == "the score is no mean of its items"


def test_a_group_speaks_of_its_members_and_beside_it_of_others(tmp_path: Path) -> None:
    """Eight subsets of four items, of each one lost: of these subsets p = 2 / 2^8; each a value, it is the same."""
    subsets = [f"bbh_{i}" for i in range(8)]
    results = {"bbh": {"n-samples": {name: {} for name in subsets}}}
    group = SCORE | {"task": "bbh", "metric": "exact_match,get-answer"}

    def night(name: str, num_lost: dict[str, int]) -> dict[str, Measured]:
        rows = [
            sample(i, float(i >= num_lost.get(task, 0)), task=task, filter="get-answer")
            for task in subsets
            for i in range(4)
        ]
        return evaluation(tmp_path / name, rows, [group], results)

    last = night("last", {})
    made = one(last, night("each", dict.fromkeys(subsets, 1)))
    assert made.test is not None and made.over_members is not None
    assert (made.test.num_items, made.test.p_value) == (32, 2 / 2**8)
    # Within each subset one of four fell: its spread, not that between the subsets, which is none.
    assert made.test.stderr == pytest.approx((0.25 / 32) ** 0.5)
    assert (made.over_members.num_items, made.over_members.p_value) == (8, 2 / 2**8)
    # Eight lost in two subsets are 2 / 2^8 of these subsets, and nothing of others: 2 of 8 fell.
    made = one(last, night("two", {"bbh_0": 4, "bbh_1": 4}))
    assert made.test is not None and made.over_members is not None
    assert made.test.p_value == 2 / 2**8 and made.over_members.p_value == 0.5
    few = one(
        evaluation(tmp_path / "a", [sample(i, 1.0) for i in range(4)]),
        evaluation(tmp_path / "b", [sample(i, 1.0) for i in range(4)]),
    )
    assert few.over_members is None


def test_items_may_have_weights(tmp_path: Path) -> None:
    """As RewardBench's, where a subset counts more than it has pairs: weights 3, 1, 1, 1."""

    def night(name: str, right: list[float], value: float) -> dict[str, Measured]:
        rows = [
            {"task": "pairs", "id": str(i), "right": bool(one), "weight": 3.0 if i == 0 else 1.0}
            for i, one in enumerate(right)
        ]
        return evaluation(tmp_path / name, rows, [SCORE | {"task": "pairs", "metric": "accuracy", "value": value}])

    made = one(night("before", [1, 0, 0, 1], 4 / 6), night("after", [0, 0, 1, 1], 2 / 6))
    assert made.test is not None and made.test.difference == pytest.approx(-2 / 6)
    assert (made.test.num_lost, made.test.num_gained) == (1, 1)


def test_subsets_of_a_reward_benchmark_are_strata(tmp_path: Path) -> None:
    """Two pairs of one subset, six of another; the score is the mean of the subsets' means."""

    def night(name: str, right: set[int], value: float) -> dict[str, Measured]:
        rows = [{"task": "pairs", "id": str(i), "right": i in right, "subset": "a" if i < 2 else "b"} for i in range(8)]
        return evaluation(tmp_path / name, rows, [SCORE | {"task": "pairs", "metric": "accuracy", "value": value}])

    made = one(night("before", {0, 1, 2, 3, 4}, 0.75), night("after", {0, 2, 3, 4}, 0.5))
    assert made.test is not None and made.test.difference == pytest.approx(-0.25)
    # One of two fell by 8 / (2 * 2): variance 2 within its subset.
    assert made.test.stderr == pytest.approx((2 * 2) ** 0.5 / 8)


def test_a_rise_of_what_is_better_lower_is_a_drop(tmp_path: Path) -> None:
    def night(name: str, bits: float, **details: Any) -> dict[str, Measured]:
        rows = [sample(i, 0.0, metrics={"bits_per_byte": bits + i / 100}, filter="none") for i in range(30)]
        value = bits + sum(range(30)) / 3000
        return evaluation(
            tmp_path / name, rows, [SCORE | {"metric": "bits_per_byte,none", "value": value, "details": details}]
        )

    last, tonight = night("last", 1.0), night("tonight", 1.1)
    worse, better = one(last, tonight), one(tonight, last)
    assert worse.test is not None and (worse.test.num_lost, worse.test.num_gained) == (30, 0)
    assert worse.test.difference == pytest.approx(-0.1) and worse.gain == pytest.approx(-0.1)
    assert worse.test.low < -0.1 < worse.test.high < 0 and worse.after - worse.before == pytest.approx(0.1)
    assert verdicts([worse, better], 0.05)[0][2] == "drop" and verdicts([worse, better], 0.05)[1][2] == "gain"
    assert flipped(last["gsm8k"], tonight["gsm8k"])[0][1].value > 1.1 - 1e-9
    # A score may say it itself.
    made = one(night("up", 1.0, higher_is_better=True), night("up too", 1.1, higher_is_better=True))
    assert verdicts([made], 0.05)[0][2] == "gain"


def test_another_metric_of_the_same_items_can_judge(tmp_path: Path) -> None:
    """Accuracy is at its floor in both; the bits of the right answer moved."""

    def night(name: str, bits: float) -> dict[str, Measured]:
        rows = [sample(i, 0.0) for i in range(8)]
        for row in rows:
            row["metrics"]["bits_per_byte"] = bits
        evaluation(tmp_path / name, rows)
        kept = {"metrics": {"exact_match,strict-match": 0.0, "bits_per_byte,strict-match": bits}}
        return measured(tmp_path / name, outputs([SCORE | {"value": 0.0, "details": kept}]), "bits_per_byte")

    made = one(night("last", 2.0), night("tonight", 1.5))
    assert made.metric == "bits_per_byte,strict-match" and made.test is not None
    assert made.test.num_gained == 8 and verdicts([made], 0.05)[0][2] == "gain"
    assert measured(tmp_path / "last", outputs([SCORE | {"value": 0.0}]), "bits_per_byte") == {}


def test_another_way_to_generate_is_named(tmp_path: Path) -> None:
    rows = [sample(i, 1.0) for i in range(4)]
    for name, values, words in (
        ("backend", ("transformers", "vllm"), "backend"),
        ("dtype", ("float32", "bfloat16"), "precision"),
        ("generation", ('{"temperature": 0}', '{"temperature": 1}'), "generation settings"),
        ("max_gen_toks", (256, 512), "length of answers"),
    ):
        sides = [
            evaluation(tmp_path / f"{name} {i}", rows, [SCORE | {"details": {name: value}}])
            for i, value in enumerate(values)
        ]
        assert one(*sides).reason == f"another {words}: {values[0]} -> {values[1]}"


def test_parts_and_texts_of_a_file_of_ours(tmp_path: Path) -> None:
    """As Parquet holds them; what a comparison does not show it does not read."""
    name = "inst_level_strict_acc,none"
    rows = [
        sample(i, 0.0, task="ifeval", filter="none", metrics={}, entry=0, parts={"inst_level_strict_acc": [1.0, i % 2]})
        for i in range(4)
    ]
    write_samples(tmp_path / "samples.parquet", rows)
    made = outputs([SCORE | {"task": "ifeval", "metric": name, "value": 0.75}])
    made = made.model_copy(update={"samples_file": "samples.parquet", "results_file": None})
    for texts in (True, False):
        items = list(measured(tmp_path, made, texts=texts)["ifeval"].items.values())
        assert [item.parts for item in items] == [(1.0, 0.0), (1.0, 1.0)] * 2
        assert ("completion" in items[0].row) == texts
    [one_of] = compare("", measured(tmp_path, made), measured(tmp_path, made, texts=False))
    assert one_of.test is not None and one_of.test.num_items == 4


def test_instructions_of_lm_eval_become_parts() -> None:
    known = {
        "doc_id": 1, "filter": "none", "target": 0, "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
        "arguments": [["asked"]], "resps": [["answered"]], "filtered_resps": ["answered"],
        "metrics": ["prompt_level_strict_acc", "inst_level_strict_acc", "odd"], "prompt_level_strict_acc": False,
        "inst_level_strict_acc": [True, False], "odd": ["a"],
    }  # fmt: skip
    made = _compact("ifeval", known)
    assert made["parts"] == {"inst_level_strict_acc": [1.0, 0.0]}
    assert made["metrics"] == {"prompt_level_strict_acc": False}


def test_seven_of_forty_over_seven_tasks_are_no_drop(tmp_path: Path) -> None:
    """Exact p is 2 / 2^7 = 0.016, seven times that 0.11. The normal approximation says 0.004, and 0.03: a drop."""
    from scipy.stats import norm

    names = ["gsm8k", *(f"task{i}" for i in range(6))]

    def night(name: str, num_lost: int) -> dict[str, Measured]:
        rows = [sample(i, float(task != "gsm8k" or i >= num_lost), task=task) for task in names for i in range(40)]
        scores = [SCORE | {"task": task, "value": 1 - num_lost / 40 * (task == "gsm8k")} for task in names]
        return evaluation(tmp_path / name, rows, scores)

    last = night("last", 0)
    judged = {one.task: (p, verdict) for one, p, verdict in verdicts(compare("", last, night("seven", 7)), 0.05)}
    assert judged["gsm8k"] == (pytest.approx(7 * 2 / 2**7), "within noise") and len(judged) == 7
    changes = [-1.0] * 7 + [0.0] * 33
    mean = sum(changes) / 40
    stderr = (sum((change - mean) ** 2 for change in changes) / 39 / 40) ** 0.5
    assert 7 * 2 * norm.cdf(mean / stderr) < 0.05
    # Eleven are one: 2 / 2^11.
    judged = {one.task: (p, verdict) for one, p, verdict in verdicts(compare("", last, night("eleven", 11)), 0.05)}
    assert judged["gsm8k"] == (pytest.approx(7 * 2 / 2**11), "drop")


def test_two_of_two_lost_are_no_drop(tmp_path: Path) -> None:
    last = evaluation(tmp_path / "last", [sample(i, 1.0) for i in range(2)])
    made = one(last, evaluation(tmp_path / "tonight", [sample(i, 0.0) for i in range(2)]))
    assert made.test is not None and made.test.p_value == 0.5
    assert verdicts([made], 0.05) == [(made, 0.5, "within noise")]
