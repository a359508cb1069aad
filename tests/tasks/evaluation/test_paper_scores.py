"""The suite `paper`: scores at their edges, bad input, and a run through the stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltulu.recipes import CHAT_TEMPLATES, LM_EVAL_TASKS
from smoltulu.recipes.lm_eval import paper, paper_ifeval
from smoltulu.recipes.lm_eval.paper_ifeval import followed
from smoltulu.schemas.evaluation import EvaluationSettings
from smoltulu.schemas.suites import SUITES
from smoltulu.tasks.evaluation.ifeval import prepare_punkt
from smoltulu.tasks.evaluation.names import shipped
from tests.tasks.evaluation.paper_tasks import (
    ARC,
    IFEVAL,
    MMLU_PRO,
    PIQA,
    TRAIN,
    Model,
    load_all,
    load_one,
    model_with,
    with_all_subsets,
    write_file,
)
from tests.tiny_model import build_tiny_model


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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

    model = model_with("chatml")
    encode = SimpleNamespace(tok_encode=model.tok_encode, backend="causal", add_bos_token=False, prefix_token_id=0)
    context, continuation = TemplateLM._encode_pair(
        encode, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", " yes"
    )  # type: ignore[arg-type]
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
    files = {"test": write_file(tmp_path / "b.jsonl", [{"question": "?", "answer": answer}])}
    leaf = load_one("paper_gsm8k", files)
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
    files = {split: write_file(tmp_path / f"{split}.jsonl", [rows]) for split in splits}
    with pytest.raises(ValueError, match=message):
        load_all(name, files)


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

    model = model_with("tulu")
    check_model(model, chat=True)  # type: ignore[arg-type]
    model.tokenizer.chat_template = None
    check_model(model, chat=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no chat template.*name one in chat_template"):
        check_model(model, chat=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no eos token"):
        check_model(Model(tokenizer=SimpleNamespace(chat_template="x", eos_token_id=None)), chat=True)  # type: ignore[arg-type]


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
    bbh = with_all_subsets({"test": write_file(tmp_path / "bbh.jsonl", [])})
    ifeval = [IFEVAL, {**IFEVAL, "key": 2, "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}, {}]}]
    long = [{**row, "question": "x" * 60} for row in TRAIN]  # five of them are over 256 tokens
    files = {
        "paper_arc": {split: write_file(tmp_path / f"{split}.jsonl", [ARC] * 2) for split in ("easy", "challenge")},
        "paper_bbh": bbh,
        "paper_gsm8k": {
            "train": write_file(tmp_path / "a.jsonl", long),
            "test": write_file(tmp_path / "b.jsonl", TRAIN[:3]),
        },
        "paper_ifeval": {"test": write_file(tmp_path / "ifeval.jsonl", ifeval)},
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
