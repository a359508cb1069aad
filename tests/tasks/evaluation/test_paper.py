"""The suite `paper`: prompts by hand, and the examples as golden numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoltulu.recipes.lm_eval import paper
from tests.tasks.evaluation.paper_tasks import (
    ARCS,
    BBH_ROWS,
    HELLASWAG,
    IFEVAL,
    MMLU_PRO,
    PIQA,
    TRAIN,
    load_all,
    load_one,
    model_with,
    needs_data,
    prepared,
    real_file,
    real_rows,
    requests_of,
    with_all_subsets,
    write_file,
)

SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# Order and examples.


def test_gsm8k_documents_and_their_examples_are_lightevals() -> None:
    order, shots = paper.gsm8k_draws(1319, 7473, 5)
    assert order[:5] == [588, 1214, 57, 906, 1252] and sorted(order) == list(range(1319))
    assert shots[:3] == [
        [7268, 4403, 1111, 3183, 3716], [3039, 5492, 6087, 5705, 4425], [3433, 4811, 6080, 5952, 1265],
    ]  # fmt: skip
    assert paper.document_order(1319) == order


def test_balanced_rows_by_hand() -> None:
    """The most frequent target first, then each in turn; what is drawn is not drawn again."""
    targets = ["b", "a", "a", "a", "b", "c"]
    drawn = paper.balanced_rows(targets, 6)
    assert [targets[row] for row in drawn] == ["a", "b", "c", "a", "b", "a"] and sorted(drawn) == list(range(6))
    assert paper.balanced_rows(["x", "x"], 4) in ([0, 1], [1, 0])
    assert paper.balanced_rows(targets, 0) == []


@needs_data
def test_bbh_examples_are_lightevals_in_all_27_subsets() -> None:
    rows = real_rows("eval/bbh.jsonl.gz")
    drawn = {name: paper.balanced_rows([row["target"] for row in rows if row["task"] == name], 4) for name in BBH_ROWS}
    assert drawn == BBH_ROWS


def test_a_bbh_item_does_not_see_itself(tmp_path: Path) -> None:
    rows = [{"task": "navigate", "input": f"walk {n}", "target": "Yes" if n % 2 else "No"} for n in range(6)]
    rows.append({"task": "snarks", "input": "else", "target": "(A)"})
    drawn = paper.balanced_rows([row["target"] for row in rows[:6]], 4)
    items = load_one("paper_bbh", {"test": write_file(tmp_path / "bbh.jsonl", rows)}, only="navigate").eval_docs
    assert len(items) == 6
    for item in items:
        number = int(item["input"].removeprefix("walk "))
        expected = [at for at in drawn if at != number][:3]
        assert [shot["input"] for shot in item["shots"]] == [f"walk {at}" for at in expected]


# Prompts.


#: Task, files, member; the user's turn, and what is scored behind it, by hand from the definitions of the card.
PROMPTS: list[tuple[str, dict[str, Any], str, str, list[str]]] = [
    ("paper_arc", ARCS, "easy", "Question: What is ice?\nAnswer:", [" water", "  a stone"]),
    ("paper_arc", ARCS, "challenge", "Question: What is ice?\nAnswer:", [" water", "  a stone"]),
    ("paper_piqa", {"validation": PIQA}, "", "Question: chip {{clip}}\nAnswer:", ["  can  be broken ", " no"]),
    # ` [title]` is a full stop, other brackets go, two spaces are one, nothing is stripped.
    (
        "paper_hellaswag", {"validation": HELLASWAG}, "", "Making tea: How to make tea. Boil water. Then the cup ",
        [" is full. ", "  breaks"],
    ),
    (
        "paper_mmlu_pro", {"test": MMLU_PRO}, "",
        "The following are multiple choice questions (with answers) about computer science.\n\nWho pays?\nA. a bank\n"
        "B. B. nobody\nC. we\nAnswer:",
        ["A", "B", "C"],
    ),
    ("paper_ifeval", {"test": IFEVAL}, "", " Write {{x}} \n", []),
]  # fmt: skip


def _around(template: str, user: str) -> str:
    """One user turn and the header of the answer."""
    return {
        "tulu": f"<|user|>\n{user}\n<|assistant|>\n",
        "chatml": f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        "smollm2": f"{SMOLLM2_SYSTEM}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
    }[template]


@pytest.mark.parametrize("template", ["tulu", "smollm2", "chatml"])
@pytest.mark.parametrize(("name", "rows", "member", "user", "choices"), PROMPTS)
def test_a_prompt_is_the_cards_token_by_token(
    name: str, rows: dict[str, Any], member: str, user: str, choices: list[str], template: str, tmp_path: Path
) -> None:
    files = {split: write_file(tmp_path / f"{split}.jsonl", [row]) for split, row in rows.items()}
    model = model_with(template)
    asked = list(requests_of(load_one(name, files, member), model))
    expected = _around(template, user)
    assert [prompt for prompt, _ in asked] == [expected] * max(1, len(choices))
    assert all(model.tok_encode(prompt) == model.tok_encode(expected) for prompt, _ in asked)
    if choices:
        assert [continuation for _, continuation in asked] == choices
    else:
        assert asked[0][1]["until"] == [] and asked[0][1]["max_gen_toks"] == 1280


TULU_EOS = "<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "turn", "last"),
    [
        (
            "tulu",
            "<|user|>\nQuestion: {}\nAnswer:\n<|assistant|>\n {}" + TULU_EOS + "\n",
            "<|user|>\n{}\n<|assistant|>\n",
        ),
        (
            "chatml",
            "<|im_start|>user\nQuestion: {}\nAnswer:<|im_end|>\n<|im_start|>assistant\n {}<|im_end|>\n",
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_gsm8k_examples_are_turns_and_an_answer_keeps_its_space(
    template: str, turn: str, last: str, tmp_path: Path
) -> None:
    files = {"train": write_file(tmp_path / "a.jsonl", TRAIN), "test": write_file(tmp_path / "b.jsonl", TRAIN[:3])}
    order, shots = paper.gsm8k_draws(3, 9, 5)
    expected = [
        "".join(turn.format(TRAIN[one]["question"], TRAIN[one]["answer"]) for one in drawn)
        + last.format(f"Question: {TRAIN[at]['question']}\nAnswer:")
        for at, drawn in zip(order, shots, strict=True)
    ]
    asked = list(requests_of(load_one("paper_gsm8k", files), model_with(template)))
    assert [prompt for prompt, _ in asked] == expected
    assert asked[0][1] == {"until": [], "do_sample": False, "max_gen_toks": 256}


def test_bbh_prompt_ends_with_a_space_and_its_target_has_none(tmp_path: Path) -> None:
    texts = ["a", "b", "c", "d"]
    rows = [{"task": "navigate", "input": text, "target": text.upper()} for text in texts]
    leaf = load_one("paper_bbh", {"test": write_file(tmp_path / "bbh.jsonl", rows)}, only="navigate")
    prompts = {
        doc["input"]: asked[0]
        for doc, asked in zip(leaf.eval_docs, requests_of(leaf, model_with("smollm2")), strict=True)
    }
    first, second, third = (texts[at] for at in paper.balanced_rows(["A", "B", "C", "D"], 4) if texts[at] != "a")
    turn = "<|im_start|>user\nQuestion: {}\nAnswer: <|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert prompts["a"] == (
        SMOLLM2_SYSTEM
        + "".join(turn.format(text, text.upper()) for text in (first, second, third))
        + "<|im_start|>user\nQuestion: a\nAnswer: <|im_end|>\n<|im_start|>assistant\n"
    )


@needs_data
def test_the_first_real_prompts_are_what_the_cards_code_says() -> None:
    """The first item in lighteval's order, from the real files, by the rules in plain Python."""
    model = model_with("tulu")
    test, train = real_rows("eval/gsm8k_test.jsonl.gz"), real_rows("train/gsm8k_train.jsonl.gz")
    files = {"train": real_file("train/gsm8k_train.jsonl.gz"), "test": real_file("eval/gsm8k_test.jsonl.gz")}
    prompt = next(requests_of(load_one("paper_gsm8k", files), model, limit=1))[0]
    expected = "".join(
        f"<|user|>\nQuestion: {train[at]['question']}\nAnswer:\n<|assistant|>\n {train[at]['answer']}{TULU_EOS}\n"
        for at in (7268, 4403, 1111, 3183, 3716)
    )
    assert prompt == f"{expected}<|user|>\nQuestion: {test[588]['question']}\nAnswer:\n<|assistant|>\n"
    rows = [row for row in real_rows("eval/bbh.jsonl.gz") if row["task"] == "navigate"]
    leaf = load_all("paper_bbh", {"test": real_file("eval/bbh.jsonl.gz")})["tasks"]["paper_bbh::navigate"]
    first = paper.document_order(250)[0]
    assert first not in BBH_ROWS["navigate"]
    expected = "".join(
        f"<|user|>\nQuestion: {rows[at]['input']}\nAnswer: \n<|assistant|>\n{rows[at]['target']}{TULU_EOS}\n"
        for at in (168, 230, 181)
    )
    asked = next(requests_of(leaf, model, limit=1))[0]
    assert asked == f"{expected}<|user|>\nQuestion: {rows[first]['input']}\nAnswer: \n<|assistant|>\n"
    leaf = load_all(
        "paper_piqa",
        {"validation": real_file("eval/piqa_valid.jsonl.gz"), "labels": real_file("eval/piqa_valid_labels.lst")},
    )
    item = next(iter(leaf["tasks"].values())).eval_docs[0]
    row = real_rows("eval/piqa_valid.jsonl.gz")[paper.document_order(1838)[0]]
    assert item["goal"] == row["goal"] and item["choices"] == [f" {row['sol1']}", f" {row['sol2']}"]


@needs_data
def test_every_task_over_the_real_files_has_all_its_items() -> None:
    files = {
        "paper_arc": {"easy": "eval/arc_easy_test.jsonl.gz", "challenge": "eval/arc_challenge_test.jsonl.gz"},
        "paper_bbh": {"test": "eval/bbh.jsonl.gz"},
        "paper_mmlu_pro": {"test": "eval/mmlu_pro_test.jsonl.gz"},
        "paper_ifeval": {"test": "eval/ifeval.jsonl.gz"},
    }
    counts = {
        name: [
            len(leaf.eval_docs)
            for leaf in load_all(name, {split: real_file(file) for split, file in of.items()})["tasks"].values()
        ]
        for name, of in files.items()
    }
    assert counts["paper_arc"] == [2376, 1172] and counts["paper_mmlu_pro"] == [12032]
    assert len(counts["paper_bbh"]) == 27 and sum(counts["paper_bbh"]) == 6511 and counts["paper_ifeval"] == [541]


# What does not fit.


def test_examples_are_dropped_from_the_end_until_prompt_and_answer_fit(tmp_path: Path) -> None:
    files = {"train": write_file(tmp_path / "a.jsonl", TRAIN), "test": write_file(tmp_path / "b.jsonl", TRAIN[:3])}
    leaf = load_one("paper_gsm8k", files)
    whole = [prompt for prompt, _ in requests_of(leaf, model_with("tulu"))]
    model = model_with("tulu")
    model.max_length = 256 + max(len(model.tok_encode(prompt)) for prompt in whole) - 1
    fitted = prepared(leaf, model)
    cut = [prompt for prompt, _ in requests_of(leaf, model)]
    for long, short in zip(whole, cut, strict=True):
        if len(model.tok_encode(long)) + 256 <= model.max_length:
            assert short == long
        else:
            # The fifth example is gone, the first four and the question stay.
            turns = long.split("<|user|>\n")
            assert short == "<|user|>\n".join([*turns[:5], turns[6]])
    assert fitted.num_with_fewer == sum(long != short for long, short in zip(whole, cut, strict=True)) > 0


def test_examples_that_never_fit_are_refused(tmp_path: Path) -> None:
    files = {"train": write_file(tmp_path / "a.jsonl", TRAIN), "test": write_file(tmp_path / "b.jsonl", TRAIN[:3])}
    with pytest.raises(ValueError, match=r"'paper_gsm8k': a prompt with one of its 5 examples has at least \d+ tokens"):
        prepared(load_one("paper_gsm8k", files), model_with("tulu", max_length=260))


def test_a_bbh_answer_may_have_the_longest_target_and_a_margin_in_each_subset(tmp_path: Path) -> None:
    targets = {"navigate": ["No", "Yes", "No", "No"], "snarks": ["a longer one", "(A)", "(A)", "(A)"]}
    rows = [
        {"task": task, "input": str(at), "target": one} for task, of in targets.items() for at, one in enumerate(of)
    ]
    model = model_with("tulu")
    tasks = load_all("paper_bbh", with_all_subsets({"test": write_file(tmp_path / "bbh.jsonl", rows)}))["tasks"]
    for leaf in tasks.values():
        prepared(leaf, model)
    for name, target in (("navigate", "Yes"), ("snarks", "a longer one"), ("word_sorting", "-")):
        _, asked = next(requests_of(tasks[f"paper_bbh::{name}"], model))
        assert asked == {"until": [], "do_sample": False, "max_gen_toks": len(model.tok_encode(target)) + 32}


def test_plain_prompts_have_lightevals_stop_strings(tmp_path: Path) -> None:
    files = {"train": write_file(tmp_path / "a.jsonl", TRAIN), "test": write_file(tmp_path / "b.jsonl", TRAIN[:1])}
    leaf, model = load_one("paper_gsm8k", files), model_with("tulu")
    prepared(leaf, model, chat=False)
    prompt, settings = next(requests_of(leaf, model, chat=False))
    assert settings["until"] == ["Question:", "Question"]
    assert prompt.endswith("\n\nQuestion: Q0?\nAnswer:") and prompt.startswith("Question: ")


def test_more_examples_than_an_item_carries_are_refused(tmp_path: Path) -> None:
    leaf = load_one("paper_gsm8k", {"test": write_file(tmp_path / "b.jsonl", TRAIN[:1])})
    with pytest.raises(ValueError, match=r"num_fewshot 5: an item of this task comes with 0 .* the split 'train'"):
        leaf.fewshot_context(leaf.eval_docs[0], num_fewshot=5)
