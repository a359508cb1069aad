"""Reward benchmarks over a tiny reward model: matching rules, truncation, bos and pad, whole and partial benchmarks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.evaluation.reward_benchmark_rows import Question, Read
from smoltulu.tasks.evaluation.reward_benchmarks import Answered, benchmark_scores, samples_of, score_answers
from smoltulu.tasks.evaluation.rewardbench import SUBSETS, SUBSETS_2
from smoltulu.tasks.models.classifiers import load_reward_model
from tests.tiny_model import EOS, TULU_TEMPLATE, build_tiny_model, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_reward_model(build_tiny_model(tmp_path_factory.mktemp("model"), num_labels=1)).eval()


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def question(*answers: str, prompt: str = "What is 3 plus 5?", subset: str = "", **fields: Any) -> Question:
    said = [turn("assistant", answer) for answer in answers]
    return Question(fields.pop("id", "0:0"), subset, turn("user", prompt), said, **fields)


def pair(chosen: float, rejected: float, subset: str = "") -> Answered:
    return Answered(question("a", "b", subset=subset), [chosen, rejected])


def scores_of(
    name: str, answered: list[Answered], read: Read | None = None, **entry: Any
) -> dict[tuple[str, str], Any]:
    benchmark = RewardBenchmark.model_validate({"name": name, **entry})
    made = benchmark_scores(benchmark, read or Read(), answered)
    return {(one.task, one.metric): one for one in made}


# Scoring.


def test_scores_are_raw_logits_of_the_conversation_as_trained(model: PreTrainedModel) -> None:
    import torch

    tokenizer = build_tokenizer()
    asked = [question("The answer is 8.", "19"), question("cat", "dog, cow", "Good morning.", "8")]
    done: list[tuple[int, int]] = []
    answered = score_answers(
        model, tokenizer, asked, max_length=256, batch_size=3, on_batch=lambda *count: done.append(count)
    )
    texts = [
        [f"<|user|>\nWhat is 3 plus 5?\n<|assistant|>\n{one[0]['content']}{EOS}" for one in q.answers] for q in asked
    ]
    for one, rendered in zip(answered, texts, strict=True):
        for score, text in zip(one.scores, rendered, strict=True):
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)
    assert any(score < 0 for one in answered for score in one.scores)  # a sigmoid is never negative
    assert done[-1] == (6, 6)
    assert answered[0].right == float(answered[0].scores[0] > answered[0].scores[1])


def test_a_long_text_loses_its_beginning_and_says_so(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    # Two prompts that differ at their beginnings only, of one token each.
    long, other = (question("8", "9", prompt=text + " and so on" * 60) for text in ("cat", "dog"))
    cut, also = score_answers(model, tokenizer, [long, other], max_length=64, batch_size=4)
    assert (cut.num_cut, also.num_cut) == (2, 2)
    assert cut.scores == pytest.approx(also.scores)  # the beginning is what was cut
    assert cut.scores[0] != pytest.approx(cut.scores[1], abs=1e-6)  # and not the answers
    (short,) = score_answers(model, tokenizer, [question("8", "9")], max_length=64, batch_size=4)
    assert short.num_cut == 0
    with caplog.at_level(logging.WARNING, logger="smoltulu"):
        (whole,) = score_answers(
            model, tokenizer, [question("8", "9", prompt="x" * 300)], max_length=None, batch_size=4
        )
    assert whole.num_cut == 0
    assert "2 of 2 texts are longer than the 256 positions of the model, and truncation is none" in caplog.text


def test_one_bos_where_the_original_has_two(model: PreTrainedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + TULU_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, bos)])
    asked = question("8", "9")
    original = tokenizer(tokenizer.apply_chat_template(asked.prompt + asked.answers[0], tokenize=False))["input_ids"]
    assert original[:2] == [bos, bos]

    (ours,) = score_answers(model, tokenizer, [asked], max_length=256, batch_size=2)
    for ids, same in ((original[1:], True), (original, False)):
        import torch

        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits.item()
        assert (ours.scores[0] == pytest.approx(theirs, abs=1e-6)) is same


def test_pad_that_is_eos_is_refused(model: PreTrainedModel) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="needs a pad token of its own"):
        score_answers(model, tokenizer, [question("8", "9")], max_length=256, batch_size=2)


def test_nan_logits_are_an_error(tmp_path: Path) -> None:
    broken = load_reward_model(build_tiny_model(tmp_path, num_labels=1)).eval()
    broken.score.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="2 of 2 answers have a score that is NaN or infinite"):
        score_answers(broken, build_tokenizer(), [question("8", "9")], max_length=256, batch_size=2)


# Scores.


def test_a_tie_is_wrong_in_a_pair_and_shares_credit_among_four() -> None:
    assert [one.right for one in (pair(1, 0), pair(0, 0), pair(-1, 0))] == [1.0, 0.0, 0.0]
    four = Answered(question("a", "b", "c", "d"), [1.0, 1.0, 0.0, 1.0])
    assert four.right == pytest.approx(1 / 3)
    assert [one.is_tie for one in (pair(1, 0), pair(0, 0), four)] == [False, True, True]


def test_the_whole_rewardbench_has_both_aggregates() -> None:
    answered = [pair(0, 1 if n < 10 else -1, name) for name, number in SUBSETS.items() for n in range(number)]
    scores = scores_of("rewardbench", answered)
    assert list(scores) == [
        ("rewardbench", metric)
        for metric in ("micro_accuracy", "mean_of_sections", "Chat", "Chat Hard", "Safety", "Reasoning")
    ]
    micro, of_four, chat = (scores["rewardbench", name] for name in ("micro_accuracy", "mean_of_sections", "Chat"))
    assert micro.mean.value == pytest.approx((2985 - 230) / 2985) and micro.mean.num == 2985
    sections = [308 / 358, 396 / 456, 690 / 740, (437 / 447 + 924 / 984) / 2]
    assert of_four.mean.value == pytest.approx(sum(sections) / 4)
    assert "RB Average" in micro.details["aggregate"] and "leaderboard" in of_four.details["aggregate"]
    assert micro.details["subsets"]["mt-bench-easy"]["value"] == pytest.approx(18 / 28)
    assert chat.details["subsets"].keys() == {name for name in SUBSETS if name.startswith(("alpaca", "mt-"))} - {
        "mt-bench-hard"
    }
    assert not any(one.limited for one in scores.values())
    near = {metric: one.details.get("is_near_chance") for (_, metric), one in scores.items()}
    assert near == {"mean_of_sections": None, **dict.fromkeys(near.keys() - {"mean_of_sections"}, False)}
    assert all(one.mean.stderr > 0 for one in scores.values())


def test_a_part_of_rewardbench_is_named_partial() -> None:
    names = [name for name in SUBSETS if name.startswith(("llmbar", "hep"))]
    answered = [pair(1, 0, name) for name in names for _ in range(SUBSETS[name])]
    scores = scores_of("rewardbench", answered, Read(num_rows=1869, num_others=466, reasons=Counter(odd=1)))
    assert list(scores) == [
        ("rewardbench_partial", "micro_accuracy (1403 of 2985)"),
        ("rewardbench_partial", "Chat Hard (419 of 456)"),
        ("rewardbench_partial", "Reasoning (984 of 1431)"),
    ]
    assert all(one.limited for one in scores.values())
    details = next(iter(scores.values())).details
    assert details["num_expected"] == 2985 and sum(details["missing"].values()) == 1582
    assert details["missing"]["math-prm"] == 447 and "hep-js" not in details["missing"]
    assert (details["num_malformed"], details["malformed"], details["num_other_rows"]) == (1, {"odd": 1}, 466)

    # A section that is whole keeps its name, but not the benchmark.
    answered = [pair(1, 0, name) for name in SUBSETS if name != "math-prm" for _ in range(SUBSETS[name])]
    assert ("rewardbench_partial", "Chat") in scores_of("rewardbench", answered)


def test_a_score_within_noise_of_guessing_says_so() -> None:
    scores = scores_of("rewardbench", [pair(n < 12, 0.5, "mt-bench-easy") for n in range(20)])  # by a coin: p = .503
    assert [(one.details["chance"], one.details["is_near_chance"]) for one in scores.values()] == [(0.5, True)] * 2
    # Of maths and of all code a half each: they count alike, and the whole is as a coin has it.
    numbers = {name: number for name, number in SUBSETS.items() if name.startswith(("math", "hep"))}
    answered = [pair(n % 2, 0.5, name) for name, number in numbers.items() for n in range(number)]
    reasoning = scores_of("rewardbench", answered)["rewardbench_partial", "Reasoning"]
    assert reasoning.details["is_near_chance"]
    sure = scores_of("rewardbench", [pair(1, 0, "mt-bench-easy")] * 20)
    assert not any(one.details["is_near_chance"] for one in sure.values())
    four = [Answered(question(*"abcd", subset="Math"), [float(n % 4 == 0), 0.5, 0.0, 0.0]) for n in range(20)]
    (first, *_) = scores_of("rewardbench_2", four).values()
    assert (first.details["chance"], first.details["is_near_chance"]) == (0.25, True)


def test_one_source_given_twice_is_refused() -> None:
    answered = [pair(1, 0, "mt-bench-easy")] * 56
    with pytest.raises(
        ValueError, match=r"more than the benchmark has: mt-bench-easy 56 of 28; was a source given twice\?"
    ):
        scores_of("rewardbench", answered)


def _rewardbench_2(leave_out: str = "") -> list[Answered]:
    made = [
        Answered(question(*"abcd", subset=name), [1.0, 0.0, 0.0, 1.0 if n % 2 else 0.0])
        for name, number in SUBSETS_2.items()
        if name not in ("Ties", leave_out)
        for n in range(number)
    ]
    for n in range(51):
        made.append(Answered(question("a", "b", subset="Ties", key=f"ref:{n}"), [2.0, 0.0]))
        made.append(Answered(question("a", "b", "c", subset="Ties", num_right=2, key=f"tied:{n}"), [3.0, 2.0, 0.0]))
    return made


def test_rewardbench_2_is_the_mean_of_six() -> None:
    scores = scores_of("rewardbench_2", _rewardbench_2())
    assert list(scores) == [("rewardbench_2", metric) for metric in ("best_of_4", "mean_of_subsets", *SUBSETS_2)]
    by_metric = {metric: one for (_, metric), one in scores.items()}
    # Every second prompt is a tie of two.
    assert by_metric["Focus"].mean.value == pytest.approx((248 + 247 / 2) / 495)
    # Ties: all right, gap 2 over spread 1
    ties = by_metric["Ties"].mean
    assert ties.value == pytest.approx(1.0 + 0.01 * math.tanh(1.0)) and ties.num == 102
    six = [by_metric[name].mean for name in SUBSETS_2]
    assert by_metric["mean_of_subsets"].mean.value == pytest.approx(sum(one.value for one in six) / 6)
    assert by_metric["mean_of_subsets"].mean.stderr == pytest.approx(math.hypot(*(one.stderr for one in six)) / 6)
    assert by_metric["best_of_4"].mean.num == 1763

    partial = scores_of("rewardbench_2", _rewardbench_2("Math"), title="mine")
    assert list(partial)[:2] == [("mine_partial", "best_of_4 (1580 of 1763)"), ("mine_partial", "Factuality")]
    assert not any("mean_of_subsets" in metric for _, metric in partial)


def test_ties_without_a_partner_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    alone = Answered(question("a", "b", subset="Ties", key="ref:1"), [2.0, 0.0])
    with caplog.at_level(logging.WARNING, logger="smoltulu"), pytest.raises(ValueError, match="nothing to score"):
        scores_of("rewardbench_2", [alone])
    assert "Ties has no score" in caplog.text


def test_pairs_of_ones_own_with_subsets() -> None:
    answered = [pair(3, 1, "law"), pair(0, 1, "law"), pair(2, 2, "tax")]
    source = {"path": "x.jsonl", "format": "preference"}
    scores = scores_of("pairs", answered, title="mine", sources=[source])
    accuracy, margin, plain = (scores["mine", name] for name in ("accuracy", "mean_margin", "mean_of_subsets"))
    assert accuracy.mean.value == pytest.approx(1 / 3) and accuracy.details["num_ties"] == 1
    assert margin.mean.value == pytest.approx(1 / 3)  # 2, -1, 0
    assert plain.mean.value == pytest.approx((0.5 + 0) / 2)
    assert accuracy.details["subsets"]["law"] == {"value": 0.5, "stderr": pytest.approx(0.5), "num": 2}
    assert not accuracy.limited
    limited = scores_of("pairs", answered[:1], title="mine", sources=[{**source, "limit": 1}])
    assert list(limited) == [("mine", "accuracy"), ("mine", "mean_margin")] and limited["mine", "accuracy"].limited


def test_samples_have_the_scores_and_the_texts() -> None:
    answered = [pair(3, 1, "law"), *_rewardbench_2()[-3:]]
    rows = samples_of("mine", answered, lambda messages: f"<{messages[-1]['content']}>")
    assert rows[0] == {
        "task": "mine", "id": "0:0", "subset": "law", "right": 1.0, "chosen": 3, "rejected": 1,
        "prompt": "<What is 3 plus 5?>", "answers": ["a", "b"], "is_left_cut": False,
        "doc_hash": rows[0]["doc_hash"], "target_hash": rows[0]["target_hash"],
    }  # fmt: skip
    assert all("right" not in row and "chosen" not in row for row in rows[1:])
    assert rows[1]["scores"] == [3.0, 2.0, 0.0] and rows[1]["num_right"] == 2
