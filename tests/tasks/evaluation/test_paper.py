"""The suite `paper`: prompts by hand, the examples as golden numbers, the scores at their edges."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltulu.recipes import CHAT_TEMPLATES, LM_EVAL_TASKS
from smoltulu.recipes.lm_eval import paper, paper_ifeval
from smoltulu.recipes.lm_eval.paper_ifeval import followed
from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationTask
from smoltulu.schemas.suites import SUITES
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation.ifeval import prepare_punkt
from smoltulu.tasks.evaluation.names import shipped
from tests.tiny_model import build_tiny_model, build_tokenizer

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no SMOLTULU_REAL_DATA")

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


BBH_ROWS = {
    "boolean_expressions": [178, 215, 196, 10], "causal_judgement": [101, 103, 9, 69],
    "date_understanding": [98, 162, 22, 86], "disambiguation_qa": [136, 167, 6, 99],
    "dyck_languages": [201, 101, 12, 43], "formal_fallacies": [182, 211, 195, 6],
    "geometric_shapes": [111, 186, 32, 100], "hyperbaton": [186, 203, 210, 9],
    "logical_deduction_five_objects": [206, 127, 249, 115], "logical_deduction_seven_objects": [7, 94, 214, 207],
    "logical_deduction_three_objects": [150, 164, 13, 105], "movie_recommendation": [176, 182, 122, 19],
    "multistep_arithmetic_two": [143, 46, 81, 155], "navigate": [168, 230, 181, 13],
    "object_counting": [111, 95, 146, 116], "penguins_in_a_table": [86, 9, 52, 96],
    "reasoning_about_colored_objects": [209, 201, 67, 109], "ruin_names": [191, 30, 58, 146],
    "salient_translation_error_detection": [234, 105, 127, 4], "snarks": [99, 105, 11, 74],
    "sports_understanding": [176, 214, 198, 12], "temporal_sequences": [185, 201, 31, 80],
    "tracking_shuffled_objects_five_objects": [136, 216, 128, 21],
    "tracking_shuffled_objects_seven_objects": [164, 17, 94, 233],
    "tracking_shuffled_objects_three_objects": [143, 156, 10, 93], "web_of_lies": [199, 187, 227, 101],
    "word_sorting": [136, 30, 213, 241],
}  # fmt: skip


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@needs_data
def test_bbh_examples_are_lightevals_in_all_27_subsets() -> None:
    rows = _lines("eval/bbh.jsonl.gz")
    drawn = {name: paper.balanced_rows([row["target"] for row in rows if row["task"] == name], 4) for name in BBH_ROWS}
    assert drawn == BBH_ROWS


def test_a_bbh_item_does_not_see_itself(tmp_path: Path) -> None:
    rows = [{"task": "navigate", "input": f"walk {n}", "target": "Yes" if n % 2 else "No"} for n in range(6)]
    rows.append({"task": "snarks", "input": "else", "target": "(A)"})
    drawn = paper.balanced_rows([row["target"] for row in rows[:6]], 4)
    items = _loaded("paper_bbh", {"test": _write(tmp_path / "bbh.jsonl", rows)}, only="navigate").eval_docs
    assert len(items) == 6
    for item in items:
        number = int(item["input"].removeprefix("walk "))
        expected = [at for at in drawn if at != number][:3]
        assert [shot["input"] for shot in item["shots"]] == [f"walk {at}" for at in expected]


# Prompts.


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path), "format": "text"}


def _all(name: str, files: dict[str, Any]) -> dict[str, Any]:
    entry = next(one for one in SUITES["paper"] if one["name"] == name)
    task = EvaluationTask.model_validate({**entry, "files": files})
    digests = {f"{name}.data.{at}": source_digest(source) for at, source in enumerate(task.files.values())}
    return harness._load(harness.task_manager(stock=False), task, None, digests)  # type: ignore[no-any-return]


def _loaded(name: str, files: dict[str, Any], only: str = "") -> Any:
    """The one task of that name, or the member `only` of a group."""
    tasks = _all(name, _with_all_subsets(files) if name == "paper_bbh" else files)["tasks"]
    return tasks[f"{name}::{only}" if only else name]


def _with_all_subsets(files: dict[str, Any]) -> dict[str, Any]:
    """BBH's file with rows of each subset that has none."""
    file = Path(files["test"]["path"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    given = {row["task"] for row in rows}
    rows += [{"task": one, "input": str(at), "target": "-"} for one in BBH_ROWS if one not in given for at in range(4)]
    return {"test": _write(file, rows)}


class _Model(SimpleNamespace):
    """What the preparation of a task asks of lm-eval's model: a template and tokens."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _model(template: str, max_length: int = 2048) -> _Model:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{template}.jinja").read_text("utf-8")
    return _Model(tokenizer=tokenizer, max_length=max_length)


def _asked(leaf: Any, model: _Model, *, chat: bool = True) -> Iterator[tuple[str, Any]]:
    leaf.build_all_requests(
        apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=model.apply_chat_template if chat else None
    )
    for instance in leaf.instances:
        yield instance.args


IFEVAL = {"key": 1, "prompt": " Write {{x}} \n", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ARC = {"query": "Question: What is ice?", "choices": ["water", " a stone"], "gold": 0}
PIQA = {"goal": "chip {{clip}}", "sol1": " can  be broken ", "sol2": "no", "label": 1}
HELLASWAG = {
    "activity_label": "Making tea", "ctx_a": "[header] How to make tea [title] Boil water.", "ctx_b": "then  THE cup",
    "endings": ["is [substeps] full. ", "[step] breaks"], "label": "0",
}  # fmt: skip
MMLU_PRO = {
    "question": "Who pays?", "options": ["a bank", "B. nobody", "we"], "answer_index": 2,
    "category": "computer_science",
}  # fmt: skip

ARCS = {"easy": ARC, "challenge": ARC}
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
    files = {split: _write(tmp_path / f"{split}.jsonl", [row]) for split, row in rows.items()}
    model = _model(template)
    asked = list(_asked(_loaded(name, files, member), model))
    expected = _around(template, user)
    assert [prompt for prompt, _ in asked] == [expected] * max(1, len(choices))
    assert all(model.tok_encode(prompt) == model.tok_encode(expected) for prompt, _ in asked)
    if choices:
        assert [continuation for _, continuation in asked] == choices
    else:
        assert asked[0][1]["until"] == [] and asked[0][1]["max_gen_toks"] == 1280


TULU_EOS = "<|endoftext|>"
TRAIN = [{"question": f"Q{n}?", "answer": f"A{n}\n#### {n}"} for n in range(9)]


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
    files = {"train": _write(tmp_path / "a.jsonl", TRAIN), "test": _write(tmp_path / "b.jsonl", TRAIN[:3])}
    order, shots = paper.gsm8k_draws(3, 9, 5)
    expected = [
        "".join(turn.format(TRAIN[one]["question"], TRAIN[one]["answer"]) for one in drawn)
        + last.format(f"Question: {TRAIN[at]['question']}\nAnswer:")
        for at, drawn in zip(order, shots, strict=True)
    ]
    asked = list(_asked(_loaded("paper_gsm8k", files), _model(template)))
    assert [prompt for prompt, _ in asked] == expected
    assert asked[0][1] == {"until": [], "do_sample": False, "max_gen_toks": 256}


def test_bbh_prompt_ends_with_a_space_and_its_target_has_none(tmp_path: Path) -> None:
    texts = ["a", "b", "c", "d"]
    rows = [{"task": "navigate", "input": text, "target": text.upper()} for text in texts]
    leaf = _loaded("paper_bbh", {"test": _write(tmp_path / "bbh.jsonl", rows)}, only="navigate")
    prompts = {
        doc["input"]: asked[0] for doc, asked in zip(leaf.eval_docs, _asked(leaf, _model("smollm2")), strict=True)
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
    model = _model("tulu")
    test, train = _lines("eval/gsm8k_test.jsonl.gz"), _lines("train/gsm8k_train.jsonl.gz")
    files = {"train": _real("train/gsm8k_train.jsonl.gz"), "test": _real("eval/gsm8k_test.jsonl.gz")}
    prompt = next(_asked(_loaded("paper_gsm8k", files), model))[0]
    expected = "".join(
        f"<|user|>\nQuestion: {train[at]['question']}\nAnswer:\n<|assistant|>\n {train[at]['answer']}{TULU_EOS}\n"
        for at in (7268, 4403, 1111, 3183, 3716)
    )
    assert prompt == f"{expected}<|user|>\nQuestion: {test[588]['question']}\nAnswer:\n<|assistant|>\n"
    rows = [row for row in _lines("eval/bbh.jsonl.gz") if row["task"] == "navigate"]
    leaf = _all("paper_bbh", {"test": _real("eval/bbh.jsonl.gz")})["tasks"]["paper_bbh::navigate"]
    first = paper.document_order(250)[0]
    assert first not in BBH_ROWS["navigate"]
    expected = "".join(
        f"<|user|>\nQuestion: {rows[at]['input']}\nAnswer: \n<|assistant|>\n{rows[at]['target']}{TULU_EOS}\n"
        for at in (168, 230, 181)
    )
    asked = next(_asked(leaf, model))[0]
    assert asked == f"{expected}<|user|>\nQuestion: {rows[first]['input']}\nAnswer: \n<|assistant|>\n"
    leaf = _all(
        "paper_piqa", {"validation": _real("eval/piqa_valid.jsonl.gz"), "labels": _real("eval/piqa_valid_labels.lst")}
    )
    item = next(iter(leaf["tasks"].values())).eval_docs[0]
    row = _lines("eval/piqa_valid.jsonl.gz")[paper.document_order(1838)[0]]
    assert item["goal"] == row["goal"] and item["choices"] == [f" {row['sol1']}", f" {row['sol2']}"]


def _real(name: str) -> dict[str, Any]:
    return {"path": str(DATA / name), "format": "text"}


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
            for leaf in _all(name, {split: _real(file) for split, file in of.items()})["tasks"].values()
        ]
        for name, of in files.items()
    }
    assert counts["paper_arc"] == [2376, 1172] and counts["paper_mmlu_pro"] == [12032]
    assert len(counts["paper_bbh"]) == 27 and sum(counts["paper_bbh"]) == 6511 and counts["paper_ifeval"] == [541]


# What does not fit.


def _prepared(leaf: Any, model: _Model, *, chat: bool = True, limit: int | None = None) -> Any:
    from smoltulu.tasks.evaluation.prepare import fit_examples, limit_answers

    limit_answers(leaf, lambda text: len(model.tok_encode(text)), chat=chat)
    return fit_examples(leaf, model, harness._max_gen_toks(leaf), limit, chat=chat)  # type: ignore[arg-type]


def test_examples_are_dropped_from_the_end_until_prompt_and_answer_fit(tmp_path: Path) -> None:
    files = {"train": _write(tmp_path / "a.jsonl", TRAIN), "test": _write(tmp_path / "b.jsonl", TRAIN[:3])}
    leaf = _loaded("paper_gsm8k", files)
    whole = [prompt for prompt, _ in _asked(leaf, _model("tulu"))]
    model = _model("tulu")
    model.max_length = 256 + max(len(model.tok_encode(prompt)) for prompt in whole) - 1
    fitted = _prepared(leaf, model)
    cut = [prompt for prompt, _ in _asked(leaf, model)]
    for long, short in zip(whole, cut, strict=True):
        if len(model.tok_encode(long)) + 256 <= model.max_length:
            assert short == long
        else:
            # The fifth example is gone, the first four and the question stay.
            turns = long.split("<|user|>\n")
            assert short == "<|user|>\n".join([*turns[:5], turns[6]])
    assert fitted.num_with_fewer == sum(long != short for long, short in zip(whole, cut, strict=True)) > 0


def test_examples_that_never_fit_are_refused(tmp_path: Path) -> None:
    files = {"train": _write(tmp_path / "a.jsonl", TRAIN), "test": _write(tmp_path / "b.jsonl", TRAIN[:3])}
    with pytest.raises(ValueError, match=r"'paper_gsm8k': a prompt with one of its 5 examples has at least \d+ tokens"):
        _prepared(_loaded("paper_gsm8k", files), _model("tulu", max_length=260))


def test_a_bbh_answer_may_have_the_longest_target_and_a_margin_in_each_subset(tmp_path: Path) -> None:
    targets = {"navigate": ["No", "Yes", "No", "No"], "snarks": ["a longer one", "(A)", "(A)", "(A)"]}
    rows = [
        {"task": task, "input": str(at), "target": one} for task, of in targets.items() for at, one in enumerate(of)
    ]
    model = _model("tulu")
    tasks = _all("paper_bbh", _with_all_subsets({"test": _write(tmp_path / "bbh.jsonl", rows)}))["tasks"]
    for leaf in tasks.values():
        _prepared(leaf, model)
    for name, target in (("navigate", "Yes"), ("snarks", "a longer one"), ("word_sorting", "-")):
        _, asked = next(_asked(tasks[f"paper_bbh::{name}"], model))
        assert asked == {"until": [], "do_sample": False, "max_gen_toks": len(model.tok_encode(target)) + 32}


def test_plain_prompts_have_lightevals_stop_strings(tmp_path: Path) -> None:
    files = {"train": _write(tmp_path / "a.jsonl", TRAIN), "test": _write(tmp_path / "b.jsonl", TRAIN[:1])}
    leaf, model = _loaded("paper_gsm8k", files), _model("tulu")
    _prepared(leaf, model, chat=False)
    prompt, settings = next(_asked(leaf, model, chat=False))
    assert settings["until"] == ["Question:", "Question"]
    assert prompt.endswith("\n\nQuestion: Q0?\nAnswer:") and prompt.startswith("Question: ")


def test_more_examples_than_an_item_carries_are_refused(tmp_path: Path) -> None:
    leaf = _loaded("paper_gsm8k", {"test": _write(tmp_path / "b.jsonl", TRAIN[:1])})
    with pytest.raises(ValueError, match=r"num_fewshot 5: an item of this task comes with 0 .* the split 'train'"):
        leaf.fewshot_context(leaf.eval_docs[0], num_fewshot=5)


# Scores.


def test_acc_norm_divides_by_characters_without_the_first_space() -> None:
    doc = {"choices": [" ab", " abcdef", "  c"], "gold": 1}
    # Per character -2/2, -4/6, -3/2: the second wins, though the first has the greatest sum.
    assert paper.choice_scores(doc, [(-2.0, True), (-4.0, False), (-3.0, False)]) == {"acc_norm": 1.0, "acc": 0.0}
    # -3/2 and -8.4/6: the second. With the spaces counted -3/3 and -8.4/7: the first.
    assert paper.choice_scores(doc, [(-3.0, True), (-8.4, False), (-9.0, False)])["acc_norm"] == 1.0
    # One space is left out of the third and not two: -3/2 is better than the others, -3/1 would not be.
    assert paper.choice_scores({**doc, "gold": 2}, [(-3.2, True), (-9.6, False), (-3.0, False)])["acc_norm"] == 1.0
    assert paper.choice_scores({"choices": ["A", "B"], "gold": 0}, [(-1.0, True), (-1.0, True)]) == {
        "acc_norm": 1,
        "acc": 1,
    }
    with pytest.raises(ValueError, match="not a number"):
        paper.choice_scores(doc, [(float("nan"), True)] * 3)


def test_a_headers_newline_moves_into_the_answer_and_not_into_its_length() -> None:
    """lm-eval's own rule, on the prompt of a template: the tokens scored begin with the newline of the header."""
    from lm_eval.api.model import TemplateLM

    model = _model("chatml")
    encode = SimpleNamespace(tok_encode=model.tok_encode, backend="causal", add_bos_token=False, prefix_token_id=0)
    context, continuation = TemplateLM._encode_pair(encode, _around("chatml", "Q"), " yes")  # type: ignore[arg-type]
    assert model.tokenizer.decode(context) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant"
    assert model.tokenizer.decode(continuation) == "\n yes"
    assert paper.choice_scores({"choices": [" yes", " no"], "gold": 0}, [(-3.0, True), (-2.2, True)])["acc_norm"] == 1.0


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("so\n#### 18", "#### 18", 1.0),
        ("#### 18.", "#### 18", 0.0),
        ("#### -3", "#### -3", 1.0),
        ("#### 3 no, #### 18", "#### 18", 0.0),
        ("#### 18 no, #### 3", "#### 18", 1.0),
        ("#### 1,800", "#### 1800", 1.0),
        ("#### 1800", "#### 1,800", 1.0),
        ("####18", "#### 18", 0.0),
        ("18", "#### 18", 0.0),
        ("", "#### 18", 0.0),
        ("#### $18", "#### 18", 0.0),
    ],
)
def test_gsm8k_takes_the_first_number_behind_the_hashes(output: str, answer: str, right: float, tmp_path: Path) -> None:
    files = {"test": _write(tmp_path / "b.jsonl", [{"question": "?", "answer": answer}])}
    leaf = _loaded("paper_gsm8k", files)
    leaf.set_config("num_fewshot", 0)
    leaf.build_all_requests()
    leaf.instances[0].resps = [output]
    leaf.apply_filters()
    assert leaf.process_results(leaf.eval_docs[0], [leaf.instances[0].filtered_resps["none"]]) == {"exact_match": right}


def test_bbh_wants_the_whole_output_and_no_answer_that_the_limit_ended() -> None:
    class Answer(str):
        stop = "length"

    doc = {"target": "(A)"}
    scores = [paper.stripped_scores(doc, [text])["exact_match"] for text in ("(A)", " (A)\n\n", "(A).", "(A)\n(B)", "")]
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert paper.stripped_scores(doc, [Answer("(A)\n\n")]) == {"exact_match": 0.0}


def test_ifeval_average_is_the_mean_of_both_strict_accuracies() -> None:
    items = [[True, True], [True, False], [False]]
    # Prompts: 1 of 3; instructions: 3 of 5.
    assert paper_ifeval.average_strict(items) == pytest.approx((1 / 3 + 3 / 5) / 2)
    # Share .6, mean length 5/3: parts (1 + .8/(5/3))/2 = .74, (0 - .2/(5/3))/2 = -.06, (0 - .6/(5/3))/2 = -.18.
    mean = (0.74 - 0.06 - 0.18) / 3
    spread = sum((part - mean) ** 2 for part in (0.74, -0.06, -0.18)) / 2
    assert paper_ifeval.average_strict.stderr(items) == pytest.approx((spread / 3) ** 0.5)  # type: ignore[attr-defined]


def _row(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"key": 7, "prompt": "Say.", "instruction_id_list": [name], "kwargs": [kwargs]}


def test_ifeval_checks_without_the_network_and_without_chance() -> None:
    prepare_punkt()
    sentences = _row("length_constraints:number_sentences", num_sentences=3, relation="at least")
    assert followed(sentences, "One. Two! Three?") == [True] and followed(sentences, "One. Two!") == [False]
    capitals = _row("change_case:capital_word_frequency", capital_frequency=2, capital_relation="at least")
    assert followed(capitals, "GO now, GO") == [True] and followed(capitals, "GO now") == [False]
    assert followed(_row("punctuation:no_comma"), "") == [False] == followed(_row("punctuation:no_comma"), " \n")
    # lm-eval makes a random letter of what is no letter.
    hashes = _row("keywords:letter_frequency", letter="#", let_frequency=4, let_relation="at least")
    assert [followed(hashes, "#### yes"), followed(hashes, "### eeeeeeeeee")] == [[True], [False]]
    # Drops what is false, as lighteval does, and never draws what is then missing.
    given = _row("detectable_format:number_highlighted_sections", num_highlights=0)
    with pytest.raises(ValueError, match=r"IFEval row 7: .* lacks num_highlights \(0 and empty count as missing\)"):
        followed(given, "*one*")
    with pytest.raises(ValueError, match="unknown instruction 'punctuation:no_commas'"):
        followed(_row("punctuation:no_commas"), "x")
    mixed = _row("language:response_language", language="en")
    assert len({tuple(followed(mixed, "le chat the cat der Hund")) for _ in range(10)}) == 1


# Bad input.


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("paper_arc", {**ARC, "choices": ["a", " "]}, "row 1 of 1: choice 1 of 2 is empty, .*correct the row"),
        ("paper_arc", {**ARC, "gold": 2}, "row 1 of 1: the right choice is number 2, and there are 2"),
        ("paper_arc", {"question": "?"}, "row 1 of 1: no column 'choices'; has"),
        ("paper_mmlu_pro", {**MMLU_PRO, "options": ["a", "", "c"]}, "choice 1 of 3 is empty"),
        ("paper_piqa", {**PIQA, "sol2": ""}, "choice 1 of 2 is empty"),
        ("paper_gsm8k", {"question": "?", "answer": "18"}, "an answer must hold `#### ` and a number; got '18'"),
        ("paper_bbh", {"task": "navigate", "input": "a", "target": "b"}, "no row has the task"),
    ],
)
def test_a_bad_row_is_named(name: str, rows: dict[str, Any], message: str, tmp_path: Path) -> None:
    splits = {"paper_arc": ("easy", "challenge"), "paper_piqa": ("validation",)}.get(name, ("test",))
    files = {split: _write(tmp_path / f"{split}.jsonl", [rows]) for split in splits}
    with pytest.raises(ValueError, match=message):
        _all(name, files)


def test_a_description_is_refused_in_a_definition_of_ours_and_marked_in_a_stock_one() -> None:
    from smoltulu.tasks.evaluation.prepare import check_description

    leaf = SimpleNamespace(task_name="own", get_config=lambda name: "Solve." if name == "description" else None)
    with pytest.raises(
        ValueError, match=r"'own' has a description, and lm-eval makes that a system message .* doc_to_text"
    ):
        check_description(leaf, shipped=True)
    assert check_description(leaf, shipped=False) == {"description": "system message"}
    for file in LM_EVAL_TASKS.glob("*.yaml"):
        assert "\ndescription:" not in file.read_text()


def test_a_model_without_template_or_eos_is_refused() -> None:
    from smoltulu.tasks.evaluation.prepare import check_model

    model = _model("tulu")
    check_model(model, chat=True)  # type: ignore[arg-type]
    model.tokenizer.chat_template = None
    check_model(model, chat=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no chat template.*name one in chat_template"):
        check_model(model, chat=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no eos token"):
        check_model(_Model(tokenizer=SimpleNamespace(chat_template="x", eos_token_id=None)), chat=True)  # type: ignore[arg-type]


def test_the_suites_metrics_are_those_of_its_definitions() -> None:
    known = shipped()
    for task in EvaluationSettings.model_validate({"tasks": [{"suite": "paper"}]}).tasks:
        assert task.metric in (known[task.name].metrics or ())


# Through the stage, with a model.


def test_the_suite_runs_through_the_stage_and_its_scores_say_how(tmp_path: Path) -> None:
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationStageConfig
    from smoltulu.tasks.evaluation.samples import read_samples
    from smoltulu.tasks.evaluation.stage import evaluate
    from smoltulu.tasks.stage import StageContext

    model = build_tiny_model(tmp_path / "model", max_position_embeddings=512)
    bbh = _with_all_subsets({"test": _write(tmp_path / "bbh.jsonl", [])})
    ifeval = [IFEVAL, {**IFEVAL, "key": 2, "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}, {}]}]
    long = [{**row, "question": "x" * 60} for row in TRAIN]  # five of them are over 256 tokens
    files = {
        "paper_arc": {split: _write(tmp_path / f"{split}.jsonl", [ARC] * 2) for split in ("easy", "challenge")},
        "paper_bbh": bbh,
        "paper_gsm8k": {"train": _write(tmp_path / "a.jsonl", long), "test": _write(tmp_path / "b.jsonl", TRAIN[:3])},
        "paper_ifeval": {"test": _write(tmp_path / "ifeval.jsonl", ifeval)},
    }
    tasks = [{**one, "files": files[one["name"]]} for one in SUITES["paper"] if one["name"] in files]
    config = EvaluationStageConfig.model_validate(
        {
            "subject": "sft",
            "kind": "language_model",
            "settings": {"max_length": 512, "precision": "float32", "tasks": tasks},
        }
    )
    template = (CHAT_TEMPLATES / "tulu.jinja").read_text("utf-8")
    compute = ComputeSettings(device="cpu", per_device_eval_batch_size=16)
    context = StageContext(tmp_path / "out", tmp_path / "out", compute, lambda step, num_steps, **_: None)
    (tmp_path / "out").mkdir()
    outputs, _ = evaluate(config, EvaluationInputs(model=str(model), chat_template=template), context)
    scores = {score.task: score for score in outputs.scores}
    assert {name: score.num_fewshot for name, score in scores.items()} == {
        "paper_arc": 0, "paper_bbh": 3, "paper_gsm8k": 5, "paper_ifeval": 0,
    }  # fmt: skip
    assert {name: score.num_samples for name, score in scores.items()} == {
        "paper_arc": 4, "paper_bbh": 108, "paper_gsm8k": 3, "paper_ifeval": 2,
    }  # fmt: skip
    assert {score.task_version for score in scores.values()} == {"1.0"}
    assert scores["paper_gsm8k"].details["max_gen_toks"] == 256
    assert scores["paper_gsm8k"].details["num_with_fewer_examples"] == 3
    assert scores["paper_bbh"].details["num_with_fewer_examples"] == 0
    assert all(score.stderr is not None for score in scores.values())
    rows = list(read_samples(tmp_path / "out" / str(outputs.samples_file)))
    assert len(rows) == 4 + 108 + 3 + 2
    members = {row["task"] for row in rows if row["task"].startswith("paper_arc")}
    assert members == {"paper_arc::easy", "paper_arc::challenge"}
    first, second = (row["metrics"] for row in rows if row["task"] == "paper_ifeval")
    prompts = (first["prompt_level_strict_acc"] + second["prompt_level_strict_acc"]) / 2
    instructions = (first["num_followed_strict"] + second["num_followed_strict"]) / 3
    assert scores["paper_ifeval"].value == pytest.approx((prompts + instructions) / 2)
    assert all(row["prompt"].startswith("<|user|>\nQuestion: ") for row in rows if row["task"] == "paper_gsm8k")
    # An answer that the limit ended is wrong in BBH.
    assert all(not row["metrics"]["exact_match"] for row in rows if "bbh" in row["task"] and row["is_truncated"])
