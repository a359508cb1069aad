"""Rows of reward benchmarks: every form, what is refused, and what can be rebuilt of RewardBench from public files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from smoltulu.schemas.evaluation import EvaluationSettings
from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.evaluation.reward_benchmark_rows import KNOWN_SUBSETS, Question, check_fields, read_questions
from smoltulu.tasks.evaluation.rewardbench import SUBSETS, missing
from tests import ROOT

REAL_DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))


def benchmark(name: str, format: str, **settings: Any) -> RewardBenchmark:
    source = {"path": "rows.jsonl", "format": format, **settings.pop("source", {})}
    return RewardBenchmark.model_validate({"name": name, "sources": [source], **settings})


def questions(which: RewardBenchmark, *rows: Any) -> list[Question]:
    return read_questions(which, [rows]).questions


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


# Forms.


def test_rewardbenchs_own_rows() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_model": "m", "subset": "donotanswer", "id": 7}
    assert questions(benchmark("rewardbench", "preference"), row) == [
        Question("0:0", "donotanswer", turns("user", "q"), [turns("assistant", "a"), turns("assistant", "b")])
    ]


def test_conversations_as_ultrafeedback_has_them() -> None:
    asked = turns("user", "q")
    row = {"prompt": "q", "chosen": asked + turns("assistant", "a"), "rejected": asked + turns("assistant", "b")}
    (one,) = questions(benchmark("ultrafeedback", "preference"), row)
    assert (one.prompt, one.answers) == (asked, [turns("assistant", "a"), turns("assistant", "b")])


def test_llmbar_is_renamed_and_its_processed_sets_are_left_out() -> None:
    rows = [
        {"subset": "LLMBar_Adversarial_GPTInst", "input": "q", "output_1": "a", "output_2": "b", "label": 2},
        {"subset": "Processed_MT-Bench", "input": "q", "output_1": "a", "output_2": "a", "label": 1},
    ]
    read = read_questions(benchmark("rewardbench", "llmbar"), [rows])
    (one,) = read.questions
    assert one.subset == "llmbar-adver-GPTInst" and one.answers == [turns("assistant", "b"), turns("assistant", "a")]
    assert (read.num_rows, read.num_others, read.num_malformed) == (2, 1, 0)


def test_humanevalpack_asks_the_instruction_and_prefers_the_canonical_solution() -> None:
    row = {"instruction": "Write f.", "canonical_solution": "  return 1\n", "buggy_solution": "  return 2\n"}
    (one,) = questions(benchmark("rewardbench", "humanevalpack"), {**row, "language": "js"})
    assert one == Question(
        "0:0",
        "hep-js",
        turns("user", "Write f."),
        [turns("assistant", "  return 1\n"), turns("assistant", "  return 2\n")],
    )


def test_best_of_four_and_ties() -> None:
    rows = [
        {"id": "12", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "subset": "Math"},
        {"id": "tied:3", "prompt": "q", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2, "subset": "Ties"},
    ]
    four, tied = questions(benchmark("rewardbench_2", "best_of"), *rows)
    assert [answer[0]["content"] for answer in four.answers] == ["a", "b", "c", "d"]
    assert (four.num_right, four.key, tied.num_right, tied.key) == (1, "12", 2, "tied:3")


def test_columns_of_other_names() -> None:
    which = benchmark("pairs", "preference", title="mine", source={"fields": {"subset": "topic", "chosen": "better"}})
    check_fields(which)
    (one,) = questions(which, {"prompt": "q", "better": "a", "rejected": "b", "topic": "law"})
    assert (one.subset, one.answers[0]) == ("law", turns("assistant", "a"))
    (one,) = questions(which, {"prompt": "q", "better": "a", "rejected": "b"})
    assert one.subset == ""
    with pytest.raises(ValueError, match="has no field id; `fields` maps our names"):
        check_fields(benchmark("pairs", "preference", title="mine", source={"fields": {"id": "x"}}))


# What is refused.

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "math-prm"}
FOUR = {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Focus"}


@pytest.mark.parametrize(
    ("name", "format", "row", "reason"),
    [
        ("rewardbench", "preference", {**PAIR, "rejected": "a"}, "chosen equals rejected: 1"),
        ("rewardbench", "preference", {**PAIR, "chosen": " "}, "field 'chosen' is empty"),
        ("rewardbench", "preference", {**PAIR, "rejected": None}, "field 'rejected' is null"),
        ("rewardbench", "preference", {**PAIR, "subset": None}, "no subset"),
        ("rewardbench", "preference", ["q"], "row is not an object"),
        ("rewardbench", "humanevalpack", {"instruction": "q", "language": "js"}, "'canonical_solution' is missing"),
        (
            "rewardbench",
            "humanevalpack",
            {"instruction": "q", "canonical_solution": "a", "buggy_solution": "b", "language": "perl"},
            "language is none of python, js",
        ),
        ("rewardbench_2", "best_of", {**FOUR, "rejected": ["b"]}, "1 right and 1 wrong answers instead of 1 and 3"),
        ("rewardbench_2", "best_of", {**FOUR, "rejected": ["b", "c", "a"]}, "chosen equals rejected"),
        ("rewardbench_2", "best_of", {**FOUR, "chosen": []}, "not lists of at least one answer"),
        ("rewardbench_2", "best_of", {**FOUR, "num_correct": 2}, "num_correct is not the number of chosen answers"),
        ("rewardbench_2", "best_of", {**FOUR, "subset": "Ties"}, "neither ref:NUMBER nor tied:NUMBER"),
        ("rewardbench_2", "best_of", {**FOUR, "subset": "Ties", "id": "tied:1"}, "a tied one several"),
    ],
)
def test_rows_without_a_comparison_are_named(name: str, format: str, row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=r"1 of 1 rows are no comparison \(100.00%\), allowed are 1.00%") as error:
        questions(benchmark(name, format), row)
    assert reason in str(error.value)


def test_few_malformed_rows_are_left_out_and_counted() -> None:
    read = read_questions(
        benchmark("rewardbench", "preference", max_malformed_share=0.5), [[PAIR, {**PAIR, "chosen": "b"}]]
    )
    assert [one.id for one in read.questions] == ["0:0"]
    assert (read.num_malformed, read.reasons) == (1, Counter({"chosen equals rejected": 1}))


def test_a_small_source_that_is_all_malformed_does_not_hide() -> None:
    which = RewardBenchmark.model_validate(
        {"name": "pairs", "title": "mine", "sources": [{"path": name, "format": "preference"} for name in ("a", "b")]}
    )
    with pytest.raises(ValueError, match="source 'b': 1 of 1 rows are no comparison"):
        read_questions(which, [[PAIR] * 999, [{**PAIR, "chosen": "b"}]])


def test_an_unknown_subset_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"row 1: subset 'llmbar-adver-gptinst' is none .* 'llmbar-adver-GPTInst'\? It has"
    ):
        questions(benchmark("rewardbench", "preference"), PAIR, {**PAIR, "subset": "llmbar-adver-gptinst"})


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="none of 0 rows is a comparison; check the file"):
        questions(benchmark("ultrafeedback", "preference"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "rewardbench3"}, "'rewardbench', 'rewardbench_2', 'ultrafeedback' or 'pairs'"),
        ({"name": "pairs", "sources": [{"path": "x", "format": "preference"}]}, "give a title"),
        ({"name": "pairs", "title": "mine"}, "sources"),
        ({"name": "rewardbench", "title": "preference"}, "is another's name"),
        ({"name": "rewardbench_2", "sources": [{"path": "x", "format": "preference"}]}, "allowed are best_of"),
        ({"name": "rewardbench", "sources": [{"sampled": "x", "format": "preference"}]}, "are no benchmark"),
    ],
)
def test_an_entry_that_means_nothing_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardBenchmark.model_validate(entry)


def test_a_name_alone_is_the_published_data_set_and_names_are_distinct() -> None:
    (source,) = RewardBenchmark.model_validate({"name": "rewardbench"}).sources
    assert (source.repository, source.split) == ("allenai/reward-bench", "filtered")
    with pytest.raises(ValidationError, match="rewardbench is there twice; give each a title"):
        EvaluationSettings.model_validate({"reward_benchmarks": [{"name": "rewardbench"}, {"name": "rewardbench"}]})


# Real files.


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real data is not at hand (SMOLTULU_REAL_DATA)")
def test_1403_of_2985_pairs_are_rebuilt_from_public_files() -> None:
    which = RewardBenchmark.model_validate(
        {
            "name": "rewardbench",
            "sources": [
                {"path": str(REAL_DATA / "train/llmbar_pairs.jsonl.gz"), "format": "llmbar"},
                {"path": str(REAL_DATA / "eval/humanevalpack.jsonl.gz"), "format": "humanevalpack"},
            ],
        }
    )
    read = read_questions(which, [read_rows(source) for source in which.sources])
    counts = Counter(one.subset for one in read.questions)
    assert counts == {name: number for name, number in SUBSETS.items() if name.startswith(("llmbar", "hep"))}
    assert (counts.total(), read.num_rows, read.num_others, read.num_malformed) == (1403, 885 + 984, 466, 0)
    assert sum(missing(counts, SUBSETS).values()) == 2985 - 1403


def test_the_examples_of_the_page_are_recipes() -> None:
    page = (ROOT / "docs/reward-benchmarks.md").read_text("utf-8")
    first, second = (part.partition("```")[0] for part in page.split("```yaml\n")[1:])
    settings = EvaluationSettings.model_validate(yaml.safe_load(first)["evaluation"])
    assert [one.label for one in settings.reward_benchmarks or ()] == [*KNOWN_SUBSETS, "ultrafeedback", "my_pairs"]
    (rebuilt,) = (RewardBenchmark.model_validate(one) for one in yaml.safe_load(second))
    assert [source.format for source in rebuilt.sources] == ["llmbar", "humanevalpack"]
