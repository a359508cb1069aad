"""The gate: the saved model is the trained one, and how many of its answers stop."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltulu.schemas.training import GateSettings, SFTSettings
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.checkpoint import shard_name
from smoltulu.tasks.trainer.gate import (
    Answer,
    check_equal,
    check_saved,
    gate_failures,
    greedy_answers,
    judge,
    prompt_of,
    prompts,
)
from tests.small_runs import FUNCTIONS, conversations, pairs, run, stage_arguments, turn
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), max_position_embeddings=64)


def test_prompts_end_where_the_first_trained_token_begins(base: Path) -> None:
    tokenizer = load_tokenizer(base, TULU_TEMPLATE)
    conversation = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, -100]}
    assert prompt_of(conversation, tokenizer) == [5, 6]
    assert prompt_of({"prompt_ids": [5, 6], "chosen_ids": [7]}, tokenizer) == [5, 6]
    asked = {"prompt": [turn("user", "3?")]}
    assert tokenizer.decode(prompt_of(asked, tokenizer)) == "<|user|>\n3?\n<|assistant|>\n"
    rows = Dataset.from_dict({"prompt_ids": [[n] for n in range(10)]})
    assert prompts(rows, tokenizer, 3) == [[0], [3], [6]]
    assert prompts(rows, tokenizer, 100) == [[n] for n in range(10)] and prompts(rows, tokenizer, 0) == []


def test_batched_answers_are_those_of_a_loop_without_padding_and_cache(base: Path) -> None:
    """Greedy, token by token, each prompt alone, in float64: padding on the left and the cache change nothing."""
    model = AutoModelForCausalLM.from_pretrained(str(base)).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    asked = [tokenizer(text)["input_ids"] for text in ("Good", "What is 3 plus 5? The answer", "cat, dog,")]

    def alone(ids: list[int], eos: int) -> list[int]:
        written: list[int] = []
        while len(written) < 12 and eos not in written:
            with torch.no_grad():
                written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        return written

    plain = [alone(ids, -1) for ids in asked]
    eos = plain[1][4]  # a token that it writes anyway: the second answer stops early, the others perhaps
    answers = greedy_answers(model, asked, tokenizer.pad_token_id, eos, 12)
    assert [answer.ids for answer in answers] == [alone(ids, eos) for ids in asked]
    assert [answer.stopped for answer in answers] == [eos in ids for ids in plain] and answers[1].stopped


def test_answers_end_where_the_model_has_no_room(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(base)), AutoTokenizer.from_pretrained(str(base))
    answers = greedy_answers(model, [[5] * 60, [5] * 3, [5] * 64, [5] * 90, []], tokenizer.pad_token_id, 399, 50)
    assert [len(answer.prompt_ids) for answer in answers] == [60, 3]
    assert [len(answer.ids) for answer in answers] == [4, 4] and not answers[0].stopped


def test_judge(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(base, TULU_TEMPLATE)
    answers = [Answer([5], [6, 0], True), Answer([5], [6, 7, 8, 9], False)]
    with caplog.at_level(logging.INFO, "smoltulu"):
        metrics = judge(answers, tokenizer, GateSettings(min_stopped_share=0.5))
    assert metrics == {"gate_stopped_share": 0.5, "gate_mean_length": 3.0}
    assert "gate: 1 of 2 greedy answers end in eos, 3 tokens in the mean; one of them:" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 2 greedy answers end in eos within 512 tokens, gate.min_stopped_share"):
        judge(answers, tokenizer, GateSettings(min_stopped_share=0.6))
    assert judge([], tokenizer, GateSettings(min_stopped_share=1)) == {}


def test_a_saved_model_that_computes_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    """Its tensors may be right: here the config says another base of the rotary positions."""
    tokenizer = load_tokenizer(base, TULU_TEMPLATE)
    dataset = Dataset.from_dict({"prompt_ids": [tokenizer("What is 3 plus 5?")["input_ids"]]})
    model = AutoModelForCausalLM.from_pretrained(str(base))
    assert check_saved(model, tokenizer, base, dataset, None, False) == {}
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="the saved model computes other outputs than the trained one"):
        check_saved(model, tokenizer, tmp_path / "other", dataset, None, False)


def test_outputs_may_differ_by_the_order_of_a_sum_and_no_more() -> None:
    one = torch.tensor([3.0])
    check_equal(one, torch.tensor([3.0 + 3e-7]), 1e-5)
    with pytest.raises(RuntimeError, match="differ by"):
        check_equal(one, torch.tensor([3.001]), 1e-5)
    with pytest.raises(RuntimeError, match="differ by"):
        check_equal(one, torch.tensor([float("nan")]), 1e-5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model"])
def test_trained_models_pass_with_a_metric_of_their_answers(
    stage: str, packing: bool, base: Path, tmp_path: Path
) -> None:
    rows = conversations(4) if stage == "sft" else pairs(5)[1:]
    settings: dict[str, Any] = {"max_steps": 1}
    if stage != "reward_model":
        settings["gate"] = {"num_prompts": 3, "max_new_tokens": 5, "min_stopped_share": 0}
    metrics = run(stage, tmp_path, base, rows, settings, packing=packing).metrics
    expected = set() if stage == "reward_model" else {"gate_stopped_share", "gate_mean_length"}
    assert {name for name in metrics if name.startswith("gate")} == expected


def test_a_finished_model_is_held_against_todays_gate() -> None:
    config = SFTSettings(learning_rate=1e-3, effective_batch_size=2, max_length=64, gate={"min_stopped_share": 0.5})
    assert STAGES["sft"].gate_failures is STAGES["dpo"].gate_failures is STAGES["rlvr"].gate_failures is gate_failures
    assert gate_failures(config, None, {"gate_stopped_share": 0.5}) == gate_failures(config, None, {}) == []
    (said,) = gate_failures(config, None, {"gate_stopped_share": 0.25})
    assert said.startswith("gate: 25% of its greedy answers ended in eos, gate.min_stopped_share asks for 0.5")


def test_a_model_that_never_stops_is_not_committed_and_passes_later_without_training(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 3, "effective_batch_size": 2, "num_train_epochs": 3}
    gate = {"num_prompts": 2, "max_new_tokens": 4, "min_stopped_share": 1.0}
    asked = stage_arguments("sft", tmp_path, base, conversations(4), {**settings, "gate": gate}, save_steps=100)
    with pytest.raises(ValueError, match=r"0 of 2 greedy answers .* nothing is trained a second time"):
        FUNCTIONS["sft"](*asked)
    # What another training step would change, if there were one: the optimizer's state of the checkpoint is gone.
    checkpoint = tmp_path / "work" / "checkpoints" / "checkpoint-3"
    stored = load_file(checkpoint / shard_name(0, 1))
    trained = {name.removeprefix("model.weights."): one for name, one in stored.items() if ".weights." in name}
    config, inputs, context = asked
    shutil.rmtree(context.folder)
    context.folder.mkdir()
    steps: list[int] = []
    context = type(context)(context.folder, context.work, context.compute, lambda step, *_, **__: steps.append(step))
    lower = config.model_copy(update={"gate": GateSettings(num_prompts=2, max_new_tokens=4, min_stopped_share=0)})
    outputs, metrics = FUNCTIONS["sft"](lower, inputs, context)
    assert steps == [3] and outputs.num_steps == 3 and metrics["gate_stopped_share"] == 0
    assert (context.work / "resumed.jsonl").read_text() == "3\n"
    saved = load_file(context.folder / "model" / "model.safetensors")
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
    history = [json.loads(line)["step"] for line in (context.folder / "logs" / "history.jsonl").open()]
    assert history == [1, 2, 3] and metrics["loss"] > 0


def test_answers_come_one_by_one_where_memory_wants_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(base))
    asked = ([[5, 6, 7], [8, 9]], 1, 0, 4)
    expected = greedy_answers(model, *asked)
    real, sizes = model.generate, []

    def generate(**given: Any) -> torch.Tensor:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**given)

    monkeypatch.setattr(model, "generate", generate)
    assert greedy_answers(model, *asked) == expected and sizes == [2, 1, 1]
    with pytest.raises(ValueError, match="not of memory"):
        monkeypatch.setattr(model, "generate", lambda **given: (_ for _ in ()).throw(ValueError("not of memory")))
        greedy_answers(model, *asked)


def test_a_model_that_stops_is_counted(base: Path, tmp_path: Path) -> None:
    """A head that always prefers eos: every answer is eos and nothing else."""
    shutil.copytree(base, tmp_path / "model")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    weights["model.norm.weight"] = torch.ones_like(weights["model.norm.weight"])
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")),
        load_tokenizer(base, TULU_TEMPLATE),
    )
    # All logits are 0, and argmax takes the first token, which is eos here.
    assert tokenizer.eos_token_id == 0
    answers = greedy_answers(model, [[5, 6], [7]], tokenizer.pad_token_id, tokenizer.eos_token_id, 20)
    assert [answer.ids for answer in answers] == [[0], [0]]
    assert judge(answers, tokenizer, GateSettings(min_stopped_share=1)) == {
        "gate_stopped_share": 1.0,
        "gate_mean_length": 1.0,
    }
