"""Bits per byte of the right answer, beside accuracy, and scores that are no better than guessing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import binomtest

from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationTask
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation.chance import chance_details, mean_p_value, p_value
from smoltulu.tasks.evaluation.gold import add_to_group, bits_per_byte, right_answer, right_choice
from smoltulu.tasks.evaluation.ifeval import prepare_punkt
from tests.tasks.evaluation.paper_tasks import BBH_ROWS, IFEVAL
from tests.tiny_model import EOS, TULU_TEMPLATE, build_tiny_model, build_tokenizer

# Pure parts.


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(-8 * math.log(2), "abcd") == pytest.approx(2.0)
    assert bits_per_byte(-8 * math.log(2), " abcd") == pytest.approx(2.0)  # a space before the answer is no byte of it
    assert bits_per_byte(-8 * math.log(2), "äö") == pytest.approx(2.0)  # four bytes
    assert bits_per_byte(-1.0, " \n") is None


def test_the_right_choice_is_read_as_lm_eval_reads_it() -> None:
    choices = ["A", "B", "C"]
    assert [right_choice(target, choices) for target in (0, 2, "B", [2, 0], ["C"])] == [0, 2, 1, 2, 2]
    assert [right_choice(target, choices) for target in (3, -1, "D", [], None)] == [None] * 5


def _leaf(target: Any, **config: Any) -> Any:
    given = {"unsafe_code": False, "doc_to_choice": None, **config}
    return SimpleNamespace(
        task_name="one",
        config=SimpleNamespace(**given),
        doc_to_target=lambda doc: target,
        doc_to_choice=lambda doc: ["no", "yes"],
    )


def test_the_right_answer_of_a_task_that_generates() -> None:
    assert right_answer(_leaf("#### 3"), {}) == "#### 3"
    assert right_answer(_leaf(["Paris", "paris"]), {}) == "Paris"
    assert right_answer(_leaf(1, doc_to_choice="x"), {}) == "yes"
    assert right_answer(_leaf(0), {}) is None  # IFEval
    assert right_answer(_leaf(" "), {}) is None  # TruthfulQA's generated answers
    code = _leaf("def check(f): …", unsafe_code=True)
    assert right_answer(code, {"canonical_solution": "    return 1\n"}) == "    return 1\n"
    assert right_answer(code, {}) is None


@pytest.mark.parametrize("of_group", [0.5, 0.35])
def test_a_group_weighs_its_members_as_its_own_score_does(of_group: float) -> None:
    def member(acc: float, bits: float) -> dict[str, Any]:
        return {"acc,none": acc, "bits_per_byte,none": bits, "bits_per_byte_stderr,none": 0.1}

    results: dict[str, Any] = {
        "results": {"a": member(0.3, 1.1), "b": member(0.7, 2.9)},
        "groups": {"g": {"acc,none": of_group}},
        # 0.35 = (70 × 0.3 + 10 × 0.7) / 80, and so bits are (70 × 1.1 + 10 × 2.9) / 80 = 1.325
        "n-samples": {"a": {"effective": 70}, "b": {"effective": 10}},
    }
    leaves = [SimpleNamespace(task_name=name) for name in "ab"]
    add_to_group("g", leaves, results, "acc,none")
    assert results["groups"]["g"]["bits_per_byte,none"] == pytest.approx(2.0 if of_group == 0.5 else 1.325)
    shares = (0.5, 0.5) if of_group == 0.5 else (7 / 8, 1 / 8)
    assert results["groups"]["g"]["bits_per_byte_stderr,none"] == pytest.approx(0.1 * math.hypot(*shares))


# Chance.


@pytest.mark.parametrize("num", [1, 7, 541, 12_032])
@pytest.mark.parametrize("chance", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.26, 0.5, 1.0])
def test_p_values_are_scipys(num: int, chance: float, share: float) -> None:
    theirs = binomtest(round(share * num), num, chance).pvalue
    assert p_value(round(share * num), [chance] * num) == pytest.approx(theirs, rel=1e-6, abs=1e-300)


def test_p_values_by_hand() -> None:
    # 10 items of two choices: 2, 8 or further away have 2 × (1 + 10 + 45) / 1024.
    assert p_value(8, [0.5] * 10) == pytest.approx(112 / 1024)
    assert p_value(9, [0.5] * 10) == pytest.approx(22 / 1024)
    # Different numbers of choices: mean 4.5, variance 4 × .25 + 10 × .1875 = 2.875.
    assert p_value(8, [0.5] * 4 + [0.25] * 10) == pytest.approx(math.erfc(3.5 / math.sqrt(2 * 2.875)))
    # Two members that count alike: variance of the mean ((.25 / 4) + (.1875 / 12)) / 4.
    two = mean_p_value(0.6, [[0.5] * 4, [0.25] * 12])
    assert two == pytest.approx(math.erfc(0.225 / math.sqrt(2 * (0.0625 + 0.015625) / 4)))


def test_a_score_within_noise_of_chance_is_marked() -> None:
    def member(num_right: int, num: int, num_choices: int) -> list[tuple[float, int]]:
        return [(float(place < num_right), num_choices) for place in range(num)]

    assert chance_details(0.3, [member(3, 10, 4)]) == {"chance": 0.25, "is_near_chance": True}
    assert chance_details(0.5, [member(500, 1000, 4)]) == {"chance": 0.25, "is_near_chance": False}
    assert chance_details(0.05, [member(5, 100, 4)])["is_near_chance"] is False  # worse than guessing is not chance
    # Of a group: all items together, or the mean of the members.
    group = [member(5, 10, 2), member(25, 100, 4)]
    assert chance_details(30 / 110, group) == {"chance": pytest.approx(30 / 110), "is_near_chance": True}
    assert chance_details(0.375, group) == {"chance": pytest.approx(0.375), "is_near_chance": True}
    # No chance is known of written answers, of shares between 0 and 1, and of a mean with other weights.
    assert chance_details(0.0, [[(0.0, 0)] * 5]) == {}
    assert chance_details(0.4, [[(0.4, 4)] * 5]) == {}
    assert chance_details(0.33, group) == {}
    assert chance_details(0.3, []) == {}


# Over a model.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def _measure(folder: Path, file: Path, task: dict[str, Any], rows: list[dict[str, Any]], *, chat: bool) -> Any:
    from transformers import AutoModelForCausalLM

    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "format": "text"}
    splits = {"train": source, "test": source} if task["name"] == "gsm8k" else {"test": source}
    entry = EvaluationTask.model_validate({"files": splits, **task})
    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    wrapped = harness.wrap(model, build_tokenizer(), batch_size=4, max_length=256, chat=chat)
    settings = EvaluationSettings(apply_chat_template=chat, max_length=256)
    score, samples, _ = harness.run_task(
        wrapped, harness.check_tasks((entry,)), entry, settings,
        chat_template=TULU_TEMPLATE, world=None, externals={}, on_progress=lambda share: None,
    )  # fmt: skip
    return model, score, samples


def _nats(model: Any, prompt: str, answer: str) -> float:
    import torch

    tokenizer = build_tokenizer()
    ids = tokenizer.encode(prompt + answer, add_special_tokens=False)
    # What a template writes before an answer is no part of it; a space before a word is.
    before = prompt if prompt.endswith("\n") else prompt.rstrip()
    start = len(tokenizer.encode(before, add_special_tokens=False))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return -sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.parametrize("chat", [False, True])
def test_a_choice_and_a_written_answer_have_bits_beside_their_accuracy(
    tmp_path: Path, folder: Path, chat: bool
) -> None:
    def shown(text: str) -> str:
        return f"<|user|>\n{text}\n<|assistant|>\n" if chat else text

    delimiter = "" if chat else " "
    rows = [{"query": f"Which is {n}?", "choices": ["a cat", "three dogs", "one cow"], "gold": n % 3} for n in range(5)]
    task = {"name": "local_arc_easy", "metric": "acc_norm,none"}
    model, score, samples = _measure(folder, tmp_path / "arc.jsonl", task, rows, chat=chat)
    for sample, row in zip(samples, rows, strict=True):
        answer = row["choices"][row["gold"]]
        nats = _nats(model, shown(f"{row['query']}\nAnswer:"), delimiter + answer)
        assert sample["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(answer), rel=1e-5)
    mean = sum(sample["metrics"]["bits_per_byte"] for sample in samples) / 5
    assert score.details["metrics"]["bits_per_byte,none"] == pytest.approx(mean)
    assert score.metric == "acc_norm,none" and score.details["chance"] == pytest.approx(1 / 3)

    sums = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n}\n#### {2 * n}"} for n in range(3)]
    task = {"name": "gsm8k", "metric": "exact_match,strict-match", "num_fewshot": 0}
    model, score, samples = _measure(folder, tmp_path / "gsm8k.jsonl", task, sums, chat=chat)
    assert len(samples) == 6  # each item with both filters
    for sample in samples:
        row = sums[int(sample["id"])]
        nats = _nats(model, shown(f"Question: {row['question']}\nAnswer:"), delimiter + row["answer"])
        expected = nats / math.log(2) / len(row["answer"])
        assert sample["metrics"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    metrics = score.details["metrics"]
    assert metrics["bits_per_byte,strict-match"] == metrics["bits_per_byte,flexible-extract"] > 0
    assert score.metric == "exact_match,strict-match" and "chance" not in score.details


def test_bits_per_byte_may_be_the_headline_where_a_recipe_says_so(tmp_path: Path, folder: Path) -> None:
    rows = [{"query": f"Which is {n}?", "choices": ["a cat", "three dogs"], "gold": n % 2} for n in range(4)]
    task = {"name": "local_arc_easy", "metric": "bits_per_byte,none"}
    _, score, samples = _measure(folder, tmp_path / "arc.jsonl", task, rows, chat=False)
    values = [sample["metrics"]["bits_per_byte"] for sample in samples]
    mean = sum(values) / 4
    assert score.value == pytest.approx(mean)
    assert score.stderr == pytest.approx(math.sqrt(sum((one - mean) ** 2 for one in values) / 3 / 4))


def test_instructions_have_no_right_answer(tmp_path: Path, folder: Path) -> None:
    rule = json.dumps({"kind": "upper_case"})
    ours = [{"prompt": "Shout.", "verifier": "constraint", "ground_truth": rule}]
    _, score, samples = _measure(
        folder, tmp_path / "own.jsonl", {"name": "tiny_instructions", "metric": "acc,none"}, ours, chat=True
    )
    assert list(samples[0]["metrics"]) == ["acc"] and list(score.details["metrics"]) == ["acc,none"]


def test_a_score_says_how_answers_were_limited_and_sentences_told_apart(tmp_path: Path, folder: Path) -> None:
    task = {"name": "paper_ifeval", "metric": "average_strict,none"}
    _, score, _ = _measure(folder, tmp_path / "ifeval.jsonl", task, [IFEVAL], chat=True)
    told = {True: "nltk's punkt_tab", False: "punkt without its list of abbreviations"}
    assert score.details["sentences"] == told[prepare_punkt()]
    assert (score.details["max_gen_toks_asked"], score.details["max_gen_toks"]) == (1280, 128)

    # Members have limits of their own: the largest is told, not that of the last one.
    rows = [{"task": name, "input": "1", "target": "-"} for name in BBH_ROWS]
    rows[3]["target"] = "- " * 9
    task = {"name": "paper_bbh", "metric": "exact_match,none", "num_fewshot": 0, "limit": 1}
    _, score, _ = _measure(folder, tmp_path / "bbh.jsonl", task, rows, chat=True)
    longest = len(build_tokenizer().encode("- " * 9, add_special_tokens=False))
    assert score.details["max_gen_toks"] == 32 + longest > 40 and "sentences" not in score.details


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize(
    ("kind", "longest"), [("multiple_choice", 25), ("generate_until", 14), ("loglikelihood_rolling", 99)]
)
def test_what_is_cut_is_counted_to_the_token(folder: Path, chat: bool, kind: str, longest: int) -> None:
    """Of 24 inputs: the last token of a choice is none, an answer takes 10, and a plain text has bos before it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer()
    bos = (EOS, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[bos])
    model = harness.wrap(
        AutoModelForCausalLM.from_pretrained(str(folder)), tokenizer, batch_size=2, max_length=24, chat=chat
    )
    num_before = 0 if chat else 1
    texts = [tokenizer.decode(tokenizer.encode("so" * 200, add_special_tokens=False)[:size]) for size in range(1, 30)]
    sizes = [len(model.tok_encode(text)) for text in texts]
    assert sizes == [size + num_before for size in range(1, 30)]
    instances = [SimpleNamespace(args=(text, {}), doc_id=size) for size, text in zip(sizes, texts, strict=True)]
    config = {"output_type": kind, "generation_kwargs": {"max_gen_toks": 10}}
    leaf = SimpleNamespace(get_config=config.get, instances=instances)
    assert harness._left_cut(leaf, model) == {size for size in sizes if size > longest}
