"""The evaluation stage over a real tiny model: the template, sampling, lm-eval over local files, and its refusals."""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

import smoltulu.tasks.evaluation.cell
import smoltulu.tasks.evaluation.stage
from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationOutputs, EvaluationStageConfig, EvaluationTask
from smoltulu.tasks.comparison.evaluations import measured
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.evaluation import lm_eval as lm_eval_tasks
from smoltulu.tasks.evaluation.lm_eval import check_tasks, harness_name, task_manager
from smoltulu.tasks.evaluation.names import unknown_task
from smoltulu.tasks.evaluation.samples import COUNTS, SAMPLES_FILE, read_samples
from smoltulu.tasks.evaluation.sampling import (
    Completion,
    encode_prompts,
    generate,
    mean_and_stderr,
    verified_accuracy,
)
from smoltulu.tasks.evaluation.stage import evaluate
from smoltulu.tasks.stage import StageContext
from tests.rows_file import write_rows
from tests.tiny_model import EOS, TULU_TEMPLATE, build_tiny_model, build_tokenizer

ARITHMETIC = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(9)]


# The template.


def test_tulu_renders_as_open_instruct_does() -> None:
    tokenizer = build_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "\nGood bye. "},
    ]
    expected = (
        f"<|system|>\nBe brief.\n<|user|>\n Hi\n\n<|assistant|>\nHello{EOS}\n<|user|>\nBye\n"
        f"<|assistant|>\n\nGood bye. {EOS}"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>\nBe brief.\n<|user|>\n Hi\n\n<|assistant|>\n"


def test_only_assistant_content_and_eos_are_masked_in() -> None:
    tokenizer = build_tokenizer()
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Good bye."},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    pairs = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    assert tokenizer.decode([token for token, kept in pairs if kept]) == f"Hello{EOS}Good bye.{EOS}"
    left = tokenizer.decode([token for token, kept in pairs if not kept])
    assert left == "<|user|>\nHi\n<|assistant|>\n\n<|user|>\nBye\n<|assistant|>\n"


# Sampling.


def test_mean_and_stderr_by_hand() -> None:
    assert mean_and_stderr([1.0, 0.0, 0.0, 1.0]) == (0.5, pytest.approx(math.sqrt((1 / 3) / 4)))
    assert mean_and_stderr([0.25]) == (0.25, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def _prompts(tokenizer: Any, count: int) -> list[list[int]]:
    messages = [[{"role": "user", "content": "x" * (7 * n % 11) + f"What is {n}?"}] for n in range(count)]
    return encode_prompts(tokenizer, messages, 200)[0]


def test_greedy_batches_equal_transformers_generate(model: Any) -> None:
    import torch

    tokenizer = build_tokenizer()
    prompts = _prompts(tokenizer, 6)
    ours = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=4, temperature=0)
    for ids, (completion,) in zip(prompts, ours, strict=True):
        theirs = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert completion.text == tokenizer.decode(theirs, skip_special_tokens=True)


def test_samples_do_not_depend_on_the_batch_and_follow_the_seed(model: Any) -> None:
    tokenizer = build_tokenizer()
    prompts = _prompts(tokenizer, 5)

    def draw(batch_size: int, seed: int = 0) -> list[list[Completion]]:
        return generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size, num_samples=3, seed=seed)

    assert draw(2) == draw(15)
    assert draw(2) != draw(2, seed=1)
    assert len({completion.text for completion in draw(15)[0]}) == 3  # the samples of a prompt differ


def test_sampling_follows_the_models_distribution_and_stops_at_eos(model: Any, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer()
    biased = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    known = torch.full((biased.config.vocab_size,), -50.0)
    letters = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "XYZ"}
    known[letters["X"]], known[letters["Y"]], known[tokenizer.eos_token_id] = (
        math.log(0.6),
        math.log(0.1),
        math.log(0.3),
    )
    # Whatever was read, the next token is X (0.6), Y (0.1) or eos (0.3).
    biased.lm_head.register_forward_hook(lambda _module, _inputs, output: known.expand_as(output))
    (samples,) = generate(
        biased, tokenizer, [[5, 6, 7]], max_new_tokens=20, batch_size=512, num_samples=3000, temperature=1.0
    )
    first = [sample.text[:1] for sample in samples]
    for text, share in (("X", 0.6), ("Y", 0.1), ("", 0.3)):
        assert abs(first.count(text) / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)
    assert all(sample.stopped == (len(sample.text) < 20) for sample in samples)
    # X and Y are one token each. Mean length of a geometric distribution that stops with 0.3: 0.7 / 0.3 = 2.33 tokens.
    assert abs(sum(len(sample.text) for sample in samples) / 3000 - 0.7 / 0.3) < 0.25
    (cold,) = generate(
        biased, tokenizer, [[5, 6, 7]], max_new_tokens=1, batch_size=512, num_samples=3000, temperature=0.5
    )
    share = 0.36 / (0.36 + 0.01 + 0.09)  # temperature 0.5 squares the probabilities
    assert abs(sum(sample.text == "X" for sample in cold) / 3000 - share) < 0.04


def test_verified_accuracy_is_clustered_by_prompt_and_leaves_ungradable_rows_out() -> None:
    def row(name: str, truth: str) -> dict[str, str]:
        return {"id": name, "verifier": "gsm8k", "ground_truth": truth}

    def wrote(*texts: str) -> list[Completion]:
        return [Completion(text, True) for text in texts]

    rows = [row("a", "3"), row("b", "4"), row("c", "no number")]
    measured = verified_accuracy(rows, [wrote("#### 3", "#### 3"), wrote("#### 4", "#### 5"), wrote("#### 1", "")])
    assert (measured.value, measured.num_ungradable) == (0.75, 1)
    assert [record["reason"] for record in measured.records] == [f"number after #### {n} equals {n}" for n in (3, 4)]
    assert measured.stderr == pytest.approx(math.sqrt(0.125 / 2))  # prompt means 1 and 0.5: variance 0.125
    with pytest.raises(ValueError, match="none of the 1"):
        verified_accuracy(rows[2:], [wrote("#### 1")])


def test_long_prompts_lose_their_beginning_and_are_counted() -> None:
    tokenizer = build_tokenizer()
    prompts, num_cut = encode_prompts(tokenizer, [[{"role": "user", "content": "abc " * 50}]], 20)
    assert num_cut == 1 and len(prompts[0]) == 20
    assert tokenizer.decode(prompts[0]).endswith("<|assistant|>\n")


# The stage.


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def _run(
    out: Path, settings: dict[str, Any], model: Path, kind: str = "language_model", **inputs: Any
) -> tuple[EvaluationOutputs, dict[str, float], list[dict[str, Any]], list[tuple[int, int]]]:
    out.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[int, int]] = []
    context = StageContext(
        out,
        out,
        ComputeSettings(device="cpu", per_device_eval_batch_size=4),
        lambda step, num_steps, **_: steps.append((step, num_steps)),
    )
    config = EvaluationStageConfig.model_validate(
        {"subject": "sft", "kind": kind, "settings": {"max_length": 256, "precision": "float32", **settings}}
    )
    outputs, metrics = evaluate(
        config, EvaluationInputs(model=str(model), chat_template=TULU_TEMPLATE, **inputs), context
    )
    samples = list(read_samples(out / SAMPLES_FILE))
    return outputs, metrics, samples, steps


def _source(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "format": "text", **more}


def test_the_stage_says_of_unknown_tasks_what_the_plan_says() -> None:
    tasks = tuple(EvaluationTask(name=name, metric="acc,none") for name in ("tiny_arithmetics", "no_such_task"))
    with pytest.raises(ValueError, match="'tiny_arithmetics' is neither") as of_stage:
        check_tasks(tasks)
    expected = {unknown_task(task.name, task_manager(stock=True).all_tasks, harness_name()) for task in tasks}
    assert set(str(of_stage.value).splitlines()) == expected
    assert unknown_task("ab", ["abc"]).endswith("nor in lm-eval; did you mean abc?")


def test_an_evaluation_file_that_changed_since_the_key_was_made_is_refused(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "test.jsonl", ARITHMETIC)
    source = DataSource.model_validate(_source(file))
    task = EvaluationTask(name="tiny_arithmetic", metric="exact_match,strict-match", files={"test": source})
    manager = check_tasks((task,))
    digests = {"tiny_arithmetic.files.test": source_digest(source)}
    assert lm_eval_tasks._load(manager, task, None, digests)
    _jsonl(tmp_path / "test.jsonl", ARITHMETIC[1:])
    with pytest.raises(ValueError, match=r"test\.jsonl changed while the run went on"):
        lm_eval_tasks._load(manager, task, None, digests)


def test_tiny_tasks_and_sampling_end_to_end(tmp_path: Path, folder: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    _jsonl(world / "eval_arithmetic.jsonl", ARITHMETIC)
    constraint = json.dumps({"kind": "upper_case"})
    instructions = _jsonl(
        tmp_path / "instructions.jsonl.gz",
        [{"prompt": "Shout a word.", "verifier": "constraint", "ground_truth": constraint}] * 3,
    )
    rows = [
        {
            "id": f"row-{n}",
            "prompt": [{"role": "user", "content": row["question"]}],
            "verifier": "gsm8k",
            "ground_truth": row["answer"],
        }
        for n, row in enumerate(ARITHMETIC)
    ]
    settings = {
        "tasks": [
            {
                "name": "tiny_arithmetic",
                "metric": "exact_match,strict-match",
                "files": {"test": {"generated": "eval_arithmetic.jsonl", "format": "text"}},
                "limit": 5,
            },
            {"name": "tiny_instructions", "metric": "acc,none", "files": {"test": _source(instructions)}},
        ],
        "sampled": {"num_prompts": 6, "num_samples_per_prompt": 2, "max_new_tokens": 8},
    }
    outputs, metrics, samples, steps = _run(
        tmp_path / "out",
        settings,
        folder,
        world=str(world),
        verified_eval=str(write_rows(tmp_path / "verified.parquet", rows)),
    )
    arithmetic, instruction, sampled = outputs.scores
    assert (arithmetic.num_samples, arithmetic.limited, arithmetic.value) == (5, True, 0.0)
    assert (instruction.num_samples, instruction.limited) == (3, False)
    assert (sampled.task, sampled.metric, sampled.num_samples) == ("verified_sampled", "accuracy", 12)
    assert arithmetic.harness == "lm-eval 0.4.13" and arithmetic.task_version == "1.0"
    assert {score.template_digest for score in outputs.scores} == {text_digest(TULU_TEMPLATE)}
    assert arithmetic.num_fewshot == 0 and arithmetic.stderr is not None
    assert metrics == {f"{score.task}/{score.metric}": score.value for score in outputs.scores}
    assert len(samples) == 5 + 3 + 6
    assert samples[2]["target"] == "4" and samples[2]["metrics"]["exact_match"] == 0.0
    assert len({sample["prompt_hash"] for sample in samples[:5]}) == 5
    # How each answer ended: these have at most 80 and 8 tokens.
    for sample, limit in [*((one, 80) for one in samples[:8]), *((one, 8) for one in samples[8:])]:
        assert sample["stop"] in ("eos", "length") and sample["is_truncated"] == (sample["stop"] == "length")
        assert sample["num_tokens"] == limit or (sample["stop"] == "eos" and 0 < sample["num_tokens"] <= limit)
    assert samples[8]["prompt"].startswith("<|user|>\n") and samples[8]["target"], "the report shows what was asked"
    assert samples[0]["prompt"] == "<|user|>\nWhat is 0 plus 0?\n<|assistant|>\n"
    for score, rows in ((arithmetic, samples[:5]), (instruction, samples[5:8])):
        for mark, count in COUNTS.items():
            assert score.details[count] == sum(row[mark] for row in rows)
    assert {"num_empty", "num_truncated", "num_left_cut"} <= sampled.details.keys()
    assert [sample["id"] for sample in samples[8:]] == [f"row-{n}" for n in range(6)]
    assert steps == sorted(steps) and steps[-1] == (3000, 3000) and len(steps) > 10
    # What a comparison reads of them.
    for task, one in measured(tmp_path / "out", outputs).items():
        values = [item.value for item in one.items.values()]
        assert len(values) == {"tiny_arithmetic": 5, "tiny_instructions": 3, "verified_sampled": 6}[task]
        assert sum(values) / len(values) == pytest.approx(one.score.value)


def test_exact_match_reads_the_number_after_the_hashes(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    answers = ["a\n#### 0", "#### 2", "4", "#### 6.", "#### 1,000"]
    monkeypatch.setattr(HFLM, "generate_until", lambda _self, requests, **_: answers[: len(requests)])
    rows = [*ARITHMETIC[:4], {"question": "?", "answer": "#### 1000"}]
    rows[2] = {"question": "no hashes in the completion", "answer": "#### 4"}
    task = {
        "name": "tiny_arithmetic",
        "metric": "exact_match,strict-match",
        "files": {"test": _source(_jsonl(tmp_path / "rows.jsonl", rows))},
    }
    outputs, _, samples, _ = _run(tmp_path / "out", {"tasks": [task]}, folder)
    assert [sample["metrics"]["exact_match"] for sample in samples] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert outputs.scores[0].value == 0.8


def test_choices_over_local_files_and_the_joined_labels(tmp_path: Path, folder: Path) -> None:
    choices = ["a cat", "three dogs", "one cow", "nothing"]
    arc = [{"query": f"Question: Which is {n}?", "choices": choices, "gold": n % 4} for n in range(6)]
    piqa = [{"goal": f"eat {n}", "sol1": "with a fork", "sol2": "with a knife"} for n in range(5)]
    (tmp_path / "labels.lst").write_text("0\n1\n1\n0\n1\n")
    files = {
        "validation": _source(_jsonl(tmp_path / "piqa.jsonl.gz", piqa)),
        "labels": _source(str(tmp_path / "labels.lst")),
    }
    tasks = [
        {
            "name": "local_arc_easy",
            "metric": "acc_norm,none",
            "files": {"test": _source(_jsonl(tmp_path / "arc.jsonl", arc))},
        },
        {"name": "local_piqa", "metric": "acc_norm,none", "files": files},
    ]
    outputs, _, samples, _ = _run(tmp_path / "out", {"tasks": tasks}, folder)
    assert [score.num_samples for score in outputs.scores] == [6, 5]
    assert [sample["target"] for sample in samples[6:]] == ["0", "1", "1", "0", "1"]
    assert {"acc,none", "acc_norm,none"} <= set(outputs.scores[0].details["metrics"])
    (tmp_path / "labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match="5 rows, 1 labels"):
        _run(tmp_path / "out", {"tasks": tasks[1:]}, folder)


def test_a_stock_definition_runs_over_local_files(tmp_path: Path, folder: Path, caplog: Any) -> None:
    train = _source(_jsonl(tmp_path / "train.jsonl", ARITHMETIC))
    test = _source(_jsonl(tmp_path / "test.jsonl", ARITHMETIC[:3]))
    stock = {"name": "gsm8k", "metric": "exact_match,strict-match", "num_fewshot": 2}
    with caplog.at_level(logging.WARNING, logger="smoltulu"):
        outputs, _, samples, _ = _run(
            tmp_path / "out", {"tasks": [{**stock, "files": {"train": train, "test": test}}], "max_length": 128}, folder
        )
    score = outputs.scores[0]
    assert (score.task_version, score.num_fewshot, score.num_samples) == ("3.0", 2, 3)
    assert "exact_match,flexible-extract" in score.details["metrics"]
    # 256 new tokens asked, 128 in all: cut to a half, and prompts with two examples do not fit in the other.
    assert (score.details["max_gen_toks_asked"], score.details["max_gen_toks"]) == (256, 64)
    assert score.details["num_left_cut"] == 3
    assert "answers are cut at 64" in caplog.text and "3 prompts are longer" in caplog.text
    assert {sample["filter"] for sample in samples} == {"strict-match", "flexible-extract"}
    with pytest.raises(ValueError, match=r"needs the split 'train'"):
        _run(tmp_path / "out", {"tasks": [{**stock, "files": {"test": test}}]}, folder)
    alone = {**stock, "num_fewshot": 0, "files": {"test": test}}
    assert _run(tmp_path / "out", {"tasks": [alone]}, folder)[0].scores[0].num_fewshot == 0
    with pytest.raises(ValueError, match=r"'gsm9k' is neither.*did you mean gsm8k"):
        _run(tmp_path / "out", {"tasks": [{"name": "gsm9k", "metric": "x,none"}]}, folder)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metric": "acc,none"}, r"no metric 'acc,none'; it reports: .*exact_match,strict-match"),
        ({"num_fewshot": 3}, "defined without examples"),
        ({"files": {}}, "reads local files"),
        ({"files": {"test": {"repository": "openai/gsm8k", "format": "text"}}}, "got the repository"),
        ({"files": {"train": None}}, "needs the split 'test'; files give: train"),
        ({"files": {"test": {"generated": "x.jsonl", "format": "text"}}}, "no world stage"),
    ],
)
def test_a_task_that_cannot_run_says_why(tmp_path: Path, folder: Path, task: dict[str, Any], message: str) -> None:
    rows = _source(_jsonl(tmp_path / "rows.jsonl", ARITHMETIC[:2]))
    full = {"name": "tiny_arithmetic", "metric": "exact_match,strict-match", "files": {"test": rows}, **task}
    full["files"] = {split: source or rows for split, source in full["files"].items()}
    with pytest.raises(ValueError, match=message):
        _run(tmp_path / "out", {"tasks": [full]}, folder)


def test_reward_model_and_implicit_reward_stages(tmp_path: Path, folder: Path) -> None:
    pairs = [
        {
            "id": str(n),
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "chosen": [{"role": "assistant", "content": f"{n} it is."}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for n in range(8)
    ]
    rows = str(write_rows(tmp_path / "pairs.parquet", pairs))
    reward = build_tiny_model(tmp_path / "reward", num_labels=1)
    outputs, metrics, samples, steps = _run(tmp_path / "a", {}, reward, "reward_model", preference_eval=rows)
    score, margin = outputs.scores
    assert (
        score.num_samples == 8 and score.metric == "pair_accuracy" and len(samples) == 8 and steps[-1] == (1000, 1000)
    )
    assert score.value == sum(sample["chosen"] > sample["rejected"] for sample in samples) / 8
    assert margin.metric == "mean_margin" and margin.stderr is not None and margin.num_samples == 8
    assert margin.value == pytest.approx(sum(sample["chosen"] - sample["rejected"] for sample in samples) / 8)
    assert metrics == {"preference/pair_accuracy": score.value, "preference/mean_margin": margin.value}
    # A policy that is its own reference prefers nothing: every pair is a tie, and a tie is wrong.
    outputs, *_ = _run(tmp_path / "b", {}, folder, "implicit_reward", preference_eval=rows, reference_model=str(folder))
    assert [score.value for score in outputs.scores] == [0.0, 0.0, 0.0, 0.0]
    other = build_tiny_model(tmp_path / "other", seed=1)
    outputs, _, samples, _ = _run(
        tmp_path / "c", {}, other, "implicit_reward", preference_eval=rows, reference_model=str(folder)
    )
    metric_names = ["pair_accuracy", "pair_accuracy_unnormalised", "mean_margin", "mean_margin_unnormalised"]
    assert [score.metric for score in outputs.scores] == metric_names
    assert outputs.scores[2].value == pytest.approx(sum(row["chosen"] - row["rejected"] for row in samples) / 8)
    assert outputs.scores[0].value == sum(sample["chosen"] > sample["rejected"] for sample in samples) / 8
    with pytest.raises(ValueError, match="reference_model"):
        _run(tmp_path / "d", {}, folder, "implicit_reward", preference_eval=rows)
    with pytest.raises(ValueError, match="preference_eval"):
        _run(tmp_path / "d", {}, reward, "reward_model")


def test_reward_benchmarks_of_a_reward_model(tmp_path: Path, folder: Path) -> None:
    own = [
        {"prompt": f"What is {n}?", "chosen": f"{n} it is.", "rejected": "No", "topic": ["even", "odd"][n % 2]}
        for n in range(6)
    ]
    llmbar = [
        {"subset": "LLMBar_Natural", "input": f"Say {n}", "output_1": f"{n}", "output_2": "No", "label": 1}
        for n in range(4)
    ]
    four = [
        {"id": str(n), "subset": "Focus", "prompt": f"{n}?", "chosen": ["a"], "rejected": ["b", "c", "d"]}
        for n in range(3)
    ]
    files = [_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("o", own), ("l", llmbar), ("f", four))]
    mine = {"path": files[0], "format": "preference", "fields": {"subset": "topic"}}
    settings = {
        "reward_benchmarks": [
            {"name": "pairs", "title": "mine", "sources": [mine]},
            {"name": "rewardbench", "sources": [{"path": files[1], "format": "llmbar"}]},
            {"name": "rewardbench_2", "sources": [{"path": files[2], "format": "best_of"}]},
        ]
    }
    reward = build_tiny_model(tmp_path / "reward", num_labels=1)
    outputs, metrics, samples, _ = _run(tmp_path / "a", settings, reward, "reward_model")
    assert [(score.task, score.metric, score.num_samples) for score in outputs.scores] == [
        ("mine", "accuracy", 6),
        ("mine", "mean_margin", 6),
        ("mine", "mean_of_subsets", 6),
        ("rewardbench_partial", "micro_accuracy (4 of 2985)", 4),
        ("rewardbench_partial", "Chat Hard (4 of 456)", 4),
        ("rewardbench_2_partial", "best_of_4 (3 of 1763)", 3),
        ("rewardbench_2_partial", "Focus (3 of 495)", 3),
    ]
    assert [score.limited for score in outputs.scores] == [False] * 3 + [True] * 4
    assert metrics["mine/accuracy"] == sum(row["chosen"] > row["rejected"] for row in samples[:6]) / 6
    # The headline is the mean of the items that a comparison finds.
    found = measured(tmp_path / "a", outputs)
    assert {name: len(one.items) for name, one in found.items()} == {
        "mine": 6,
        "rewardbench_partial": 4,
        "rewardbench_2_partial": 3,
    }
    for one in found.values():
        assert one.score.value == pytest.approx(sum(item.value for item in one.items.values()) / len(one.items))
    with pytest.raises(ValueError, match="not a reward model"):
        _run(tmp_path / "b", settings, folder, "reward_model")
    two = build_tiny_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match="gives one score; this one has num_labels 2"):
        _run(tmp_path / "b", settings, two, "reward_model")


def test_bfloat16_falls_back_with_a_warning_on_a_cpu(tmp_path: Path, folder: Path, caplog: Any) -> None:
    task = {
        "name": "tiny_arithmetic",
        "metric": "exact_match,strict-match",
        "files": {"test": _source(_jsonl(tmp_path / "rows.jsonl", ARITHMETIC[:2]))},
    }
    with caplog.at_level(logging.WARNING, logger="smoltulu"):
        _run(tmp_path / "out", {"tasks": [task], "precision": "bfloat16"}, folder)
    assert "float32" in caplog.text


@pytest.mark.parametrize("is_reward_model", [False, True])
def test_in_bfloat16_the_weights_are_rounded_and_nothing_else(
    tmp_path: Path, folder: Path, is_reward_model: bool
) -> None:
    """As on a GPU. Rounded frequencies turn late positions by a radian; the score head was trained in float32."""
    import torch

    path = build_tiny_model(tmp_path / "reward", num_labels=1) if is_reward_model else folder
    model, _ = smoltulu.tasks.evaluation.cell._load(str(path), TULU_TEMPLATE, is_reward_model, "bfloat16", "cpu")
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert kept == ({"score.weight"} if is_reward_model else set())
    buffers = dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert all(value.dtype == torch.float32 for value in buffers.values() if value.is_floating_point())


def test_evaluation_in_bfloat16_sums_likelihoods_in_float32(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    """As on a GPU. In bfloat16 a sum beyond 32 nats is rounded to a quarter, and choices tie."""
    import torch

    monkeypatch.setattr(smoltulu.tasks.evaluation.cell, "use_bfloat16", lambda precision, compute: True)
    monkeypatch.setattr(smoltulu.tasks.evaluation.stage, "dtype_of", lambda settings, compute: "bfloat16")
    seen: list[Any] = []
    real = smoltulu.tasks.evaluation.cell.harness.run_task
    monkeypatch.setattr(
        smoltulu.tasks.evaluation.cell.harness,
        "run_task",
        lambda wrapped, *a, **k: seen.append(wrapped) or real(wrapped, *a, **k),
    )
    rows = [{"query": f"Which is {n}?", "choices": ["a cat", "three dogs"], "gold": n % 2} for n in range(4)]
    task = {
        "name": "local_arc_easy",
        "metric": "acc_norm,none",
        "files": {"test": _source(_jsonl(tmp_path / "arc.jsonl", rows))},
    }
    outputs, *_ = _run(tmp_path / "out", {"tasks": [task]}, folder)
    (wrapped,) = seen
    assert outputs.scores[0].num_samples == 4 and wrapped.model.dtype == torch.bfloat16
    ids = torch.arange(5, 45).tolist()
    ((likelihood, _),) = wrapped._loglikelihood_tokens([(("", ""), ids[:1], ids[1:])], disable_tqdm=True)
    assert likelihood < -64 and likelihood % 0.25  # a sum of bfloat16 numbers would be a multiple
