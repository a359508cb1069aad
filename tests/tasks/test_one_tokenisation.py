"""One conversation gives the same tokens in training, preflight, rollouts, evaluation and the published model.

On tokenizers that add a bos or an eos by themselves, and on templates that end a turn with another token than eos.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationStageConfig
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.tasks.evaluation import lm_eval, pair_accuracy
from smoltulu.tasks.evaluation.sampling import encode_prompts, generate
from smoltulu.tasks.evaluation.stage import evaluate
from smoltulu.tasks.models.chat_template import _trl_templates, load_chat_template
from smoltulu.tasks.models.folders import load_language_model, load_tokenizer, stop_ids
from smoltulu.tasks.models.tokens import PROBES, check_prompts, conversations, pairs, prompt_ids, stop_token_ids
from smoltulu.tasks.preflight.rows import TokenizerProbe
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.gate import prompt_of
from smoltulu.tasks.training.grpo import build as build_rlvr
from smoltulu.tasks.training.rewards import VerifiableReward
from tests import small_runs
from tests.families import FAMILIES, build_family
from tests.small_runs import stage_arguments, training_inputs, turn
from tests.tasks.preflight.test_preflight import fly
from tests.tasks.publish.test_publish import _manifest, _publish, _write, world
from tests.tiny_model import TULU_TEMPLATE

__all__ = ["world"]  # a fixture

GEMMA = next(training for original, training in _trl_templates() if original.stem == "gemma").read_text("utf-8")
#: Families, each with templates that it can be trained with.
KINDS = [
    ("tulu", "tulu"), ("llama3", "tulu"), ("llama3", "llama3"), ("smollm2", "smollm2"), ("qwen", "chatml"),
    ("gemma", "tulu"), ("gemma", "own"), ("adds eos", "chatml"), ("adds eos", "tulu"), ("adds both", "zephyr"),
    ("turns are ordinary tokens", "chatml"),
]  # fmt: skip
RLVR = GRPOSettings(
    learning_rate=1e-3, effective_batch_size=2, num_generations=2, num_steps=1, max_prompt_length=99,
    max_completion_length=6, precision="float32", gate={"num_prompts": 0},
)  # fmt: skip
PROMPTS = [
    [turn("user", "What is 3 plus 5?")],
    [turn("user", " \n a  "), turn("assistant", "b\n"), turn("user", "naïve 中文")],
    *(probe for probe in PROBES if probe[0]["role"] == "user"),
]


def template_of(name: str) -> str:
    return GEMMA if name == "own" else (CHAT_TEMPLATES / f"{name}.jinja").read_text("utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: build_family(folder / str(place), family) for place, (name, family) in enumerate(FAMILIES.items())}


def wrapped(tokenizer: PreTrainedTokenizerBase, model: Path, *, chat: bool) -> Any:
    loaded = load_language_model(model)
    stop_ids(loaded, tokenizer)
    return lm_eval.wrap(loaded, tokenizer, batch_size=4, max_length=128, chat=chat)


def grpo(model: Path, template: str, folder: Path) -> Any:
    rows = [{"id": f"0:{i}", "prompt": prompt, "verifier": "gsm8k", "ground_truth": "8"} for i, prompt in
            enumerate(PROMPTS)]  # fmt: skip
    config = RLVR.model_copy(update={"max_prompt_length": 200})
    compute = ComputeSettings(device="cpu", per_device_train_batch_size=2)
    for name in ("out", "work", "before"):
        (folder / name).mkdir(parents=True)
    inputs = training_inputs("rlvr", folder / "before", model, rows, config, compute, template)
    return build_rlvr(config, inputs, StageContext(folder / "out", folder / "work", compute, lambda *_, **__: None))


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_everyone_gives_a_conversation_the_same_tokens(
    models: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    template, model = template_of(name), models[family]
    tokenizer = load_tokenizer(model, template)
    expected = prompt_ids(tokenizer, PROMPTS)
    # Training: what is prompted is how the rows begin.
    answer = turn("assistant", "8")
    rows = conversations(tokenizer, [[*prompt, answer] for prompt in PROMPTS])
    assert [row.input_ids[: len(ids)] for row, ids in zip(rows, expected, strict=True)] == expected
    # Sampling and gate.
    assert encode_prompts(tokenizer, PROMPTS, 1000) == (expected, 0)
    assert [prompt_of({"prompt": prompt}, tokenizer) for prompt in PROMPTS] == expected
    # Rollouts.
    trainer = grpo(model, template, tmp_path)
    assert trainer._tokenize_prompts(PROMPTS)[0] == expected
    assert sorted(trainer.eos_token_ids) == sorted(stop_token_ids(tokenizer))
    # lm-eval, one text and several.
    harness = wrapped(tokenizer, model, chat=True)
    texts = [harness.apply_chat_template(prompt) for prompt in PROMPTS]
    assert [harness.tok_encode(text) for text in texts] == expected
    ids, mask = harness.tok_batch_encode(texts)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == expected
    # Pairs, in training and in evaluation.
    pair = {"id": "0", "prompt": PROMPTS[1], "chosen": [answer], "rejected": [turn("assistant", "9")]}
    (trained,) = pairs(tokenizer, [pair], "last")
    _, (chosen, rejected) = pair_accuracy.encode_pairs(tokenizer, [pair], 500)
    assert list(chosen.ids) == trained.prompt_ids + trained.chosen_ids
    assert chosen.num_prompt == len(trained.prompt_ids)
    assert list(rejected.counted) == trained.rejected_mask
    # Whoever loads it.
    tokenizer.save_pretrained(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert plain.apply_chat_template(PROMPTS, add_generation_prompt=True)["input_ids"] == expected


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from(["llama3", "adds eos", "adds both", "gemma"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompt_has_the_same_tokens_in_lm_eval(models: dict[str, Path], said: list[str], family: str) -> None:
    row = [turn(("user", "assistant")[place % 2], text) for place, text in enumerate(said)]
    tokenizer = load_tokenizer(models[family], TULU_TEMPLATE)
    if family not in _harnesses:
        _harnesses[family] = wrapped(tokenizer, models[family], chat=True)
    harness = _harnesses[family]
    (expected,) = prompt_ids(tokenizer, [row])
    assert harness.tok_encode(harness.apply_chat_template(row)) == expected


_harnesses: dict[str, Any] = {}


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.before or family.behind])
def test_what_the_stages_would_do_without_care_is_a_trap(models: dict[str, Path], family: str) -> None:
    """lm-eval as it is gives these tokenizers other tokens, and the check that every stage makes sees it."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(models[family], TULU_TEMPLATE)
    stock = HFLM(pretrained=load_language_model(models[family]), tokenizer=tokenizer, max_length=128)
    with pytest.raises(RuntimeError, match="lm-eval gives a conversation other tokens than training: "):
        check_prompts(
            tokenizer, "lm-eval", lambda rows: [stock.tok_encode(stock.apply_chat_template(row)) for row in rows]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_keeps_its_bos_and_never_ends_in_eos(models: dict[str, Path], family: str) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(models[family], TULU_TEMPLATE)
    ours = wrapped(tokenizer, models[family], chat=False)
    before = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].before]
    for text in ("cat, dog", " a\n", *FAMILIES[family].before):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.tok_encode(text) == (plain if before and plain[:1] == before else before + plain)
        assert ours.tok_encode(text, add_special_tokens=False) == plain
        assert ours.tok_batch_encode([text])[0].tolist() == [ours.tok_encode(text)]
    if not FAMILIES[family].behind:
        stock = HFLM(pretrained=load_language_model(models[family]), tokenizer=tokenizer, max_length=128)
        for text in ("cat", "What is 3 plus 5?", *FAMILIES[family].before):
            assert ours.tok_encode(text) == stock.tok_encode(text)
            assert ours._encode_pair(text + " ", "dog") == stock._encode_pair(text + " ", "dog")
        both = ["cat", "What is 3 plus 5?"]
        for mine, theirs in zip(ours.tok_batch_encode(both), stock.tok_batch_encode(both), strict=True):
            assert torch.equal(mine, theirs)
        cut = [model.tok_batch_encode(both, left_truncate_len=3)[0] for model in (ours, stock)]
        assert torch.equal(*cut) and cut[0].shape[1] == 3


# --- An end of turn that is not eos -------------------------------------------------------------------------------

ENDS = [("qwen", "chatml", "<|im_end|>"), ("gemma", "own", "<end_of_turn>"), ("llama3", "llama3", "<|eot_id|>"),
        ("turns are ordinary tokens", "chatml", "<|im_end|>")]  # fmt: skip
ANSWERS = [[turn("user", "3 plus 5?"), turn("assistant", "8")], [turn("user", "cat?"), turn("assistant", "dog")]]


@pytest.mark.parametrize(("family", "name", "end"), ENDS)
def test_it_is_trained_ends_answers_everywhere_and_is_published(
    models: dict[str, Path], tmp_path: Path, family: str, name: str, end: str
) -> None:
    template = template_of(name)
    rows = [{"id": f"0:{i}", "messages": row} for i, row in enumerate(ANSWERS)]
    chosen = {"learning_rate": 1e-2, "num_train_epochs": 60, "gate": {"num_prompts": 2, "max_new_tokens": 8,
              "min_stopped_share": 1.0}}  # fmt: skip
    sft = small_runs.run("sft", tmp_path / "sft", models[family], rows, chosen, template=template, save_steps=100)
    assert sft.metrics["gate_stopped_share"] == 1.0 and sft.metrics["gate_mean_length"] < 6

    tokenizer = AutoTokenizer.from_pretrained(str(sft.model))
    token = tokenizer.convert_tokens_to_ids(end)
    assert token not in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token == FAMILIES[family].eos
    assert tokenizer.decode([token], skip_special_tokens=True) == "", "no verifier sees it"
    generation = GenerationConfig.from_pretrained(str(sft.model))
    assert sorted(generation.eos_token_id) == sorted([tokenizer.eos_token_id, token])

    # The published model, by itself: it stops there.
    model = AutoModelForCausalLM.from_pretrained(str(sft.model))
    asked = tokenizer.apply_chat_template([ANSWERS[0][:1]], add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**asked, do_sample=False, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
    assert written[-1] == token and tokenizer.decode(written, skip_special_tokens=True) == "8"

    # Sampling.
    ((sampled,),) = generate(model, load_tokenizer(sft.model, template), prompt_ids(tokenizer, [ANSWERS[0][:1]]),
                             max_new_tokens=20, batch_size=1, temperature=0.0)  # fmt: skip
    assert (sampled.text, sampled.stopped) == ("8", True)

    # lm-eval.
    trained = load_tokenizer(sft.model, template)
    harness = wrapped(trained, sft.model, chat=True)
    said = _generated(harness, ANSWERS[0][:1])
    assert said == "8"

    # Rollouts: one that ends there has stopped.
    trainer = grpo(sft.model, template, tmp_path / "rlvr")
    assert set(trainer.eos_token_ids) == {tokenizer.eos_token_id, token}
    settings = trainer.generation_config.eos_token_id
    assert set(settings) == {tokenizer.eos_token_id, token}
    config = RLVR.model_copy(update={"non_stop_reward": -10.0})
    rewards = VerifiableReward(config, stop_token_ids(trained))(
        completions=[[turn("assistant", "#### 8")]] * 3,
        completion_ids=[[5, token], [5, tokenizer.eos_token_id], [5, 6]],
        verifier=["gsm8k"] * 3,
        ground_truth=["8"] * 3,
    )
    assert rewards == [1.0, 1.0, -10.0]


def _generated(harness: Any, prompt: list[dict[str, str]]) -> str:
    from lm_eval.api.instance import Instance

    text = harness.apply_chat_template(prompt)
    request = Instance("generate_until", {}, (text, {"until": ["\n\n\n"], "max_gen_toks": 20}), 0)
    return str(harness.generate_until([request], disable_tqdm=True)[0])


@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_pairs_train_where_a_line_ends_behind_the_turn(models: dict[str, Path], tmp_path: Path, stage: str) -> None:
    """DPO's first log-ratios are 0, and the evaluation counts the tokens that DPO counts."""
    rows = small_runs.pairs(4)
    template = template_of("chatml")
    run = small_runs.run(stage, tmp_path, models["qwen"], rows, {"max_steps": 1}, template=template)
    if stage == "dpo":
        assert run.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    tokenizer = load_tokenizer(models["qwen"], template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    _, (side, *_) = pair_accuracy.encode_pairs(tokenizer, rows, 500)
    assert side.ids[-2] == end and side.counted[-2:] == (1, 0) and side.num_counted == side.num_completion - 1
    model = load_language_model(models["qwen"]).eval()
    logits = model(input_ids=torch.tensor([side.ids])).logits[0].log_softmax(-1)
    by_hand = sum(
        logits[place - 1, side.ids[place]].item()
        for place in range(side.num_prompt, len(side.ids))
        if side.counted[place - side.num_prompt]
    )
    (measured,) = pair_accuracy.completion_logps(model, tokenizer, [side], batch_size=1)
    assert measured == pytest.approx(by_hand, abs=1e-4)


def test_a_pad_that_ends_a_turn_is_replaced(models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(models["qwen"]))
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, template_of("chatml"))
    assert loaded.pad_token_id not in stop_token_ids(loaded)
    assert load_tokenizer(tmp_path, TULU_TEMPLATE).pad_token == "<|im_end|>"


# --- Said and checked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "found"),
    [
        ("tulu", "tulu", "the tokenizer by itself would add nothing"),
        ("llama3", "tulu", "'<|begin_of_text|>' before a text. No stage lets it do so"),
        ("llama3", "llama3", "the tokenizer puts a second bos before the template's"),
        ("adds eos", "tulu", "'<|endoftext|>' behind a text. No stage"),
        ("adds both", "tulu", "'<s>' before a text and '</s>' behind a text"),
    ],
)
def test_the_preflight_says_what_the_tokenizer_would_do_by_itself(
    models: dict[str, Path], tmp_path: Path, family: str, name: str, found: str
) -> None:
    flight = fly(tmp_path, models[family], small_runs.conversations(6), template=template_of(name))
    check = flight.check("bos of the tokenizer")
    assert found in check.found and check.status == ("ok" if "nothing" in found else "noticed")
    assert found.replace("'", "&#39;").replace("<", "&lt;").replace(">", "&gt;") in flight.page and not flight.error
    assert ("set add_bos_token to true" in check.advice) == ("before a text" in found)


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_the_preflight_passes_rows_of_these_templates(
    models: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    rows = [row for row in small_runs.conversations(8) if row["messages"][0]["role"] != "system" or name != "own"]
    flight = fly(tmp_path, models[family], rows, template=template_of(name))
    assert not flight.error and flight.outputs.num_without_eos == flight.outputs.num_unstable == 0
    assert flight.outputs.num_headers == 0 == flight.outputs.num_two_bos
    facts = flight.outputs.tokenizer
    assert facts is not None and facts.eos_token_id in facts.stop_token_ids
    assert len(facts.stop_token_ids) == (2 if name in ("chatml", "own", "llama3") else 1)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused(models: dict[str, Path]) -> None:
    template = load_chat_template("chatml", add_bos_token=True)
    tokenizer = load_tokenizer(models["qwen"], template)
    with pytest.raises(ValueError, match="add_bos_token is true, and the tokenizer has no bos token"):
        TokenizerProbe.of(tokenizer, models["qwen"])


def test_an_end_of_turn_that_is_no_token_fails_the_preflight(models: dict[str, Path], tmp_path: Path) -> None:
    flight = fly(tmp_path, models["tulu"], small_runs.conversations(6), template=template_of("chatml"))
    assert flight.outputs.num_without_eos == 6 and "one of the tokenizer's added tokens" in flight.error


def test_rows_of_another_tokenisation_are_not_trained_on(models: dict[str, Path], tmp_path: Path) -> None:
    """The template that the stage is given is not that of the rows; so with a changed tokenizer or library."""
    rows = small_runs.conversations(4)
    for stage, taken in (("sft", rows), ("reward_model", small_runs.pairs(4)), ("dpo", small_runs.pairs(4))):
        config, inputs, context = stage_arguments(stage, tmp_path / stage, models["llama3"], taken, {})
        other = inputs.model_copy(update={"chat_template": load_chat_template("tulu", add_bos_token=True)})
        with pytest.raises(ValueError, match=r"rows.parquet was tokenised otherwise .*refresh preflight"):
            small_runs.FUNCTIONS[stage](config, other, context)


def test_the_published_model_is_held_against_the_rows_that_it_was_trained_on(
    world: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = Path(world["inputs"].model)
    flight = fly(tmp_path / "flight", model, small_runs.conversations(6), template=TULU_TEMPLATE)
    assert flight.outputs.tokenizer is not None

    def publish(name: str, **changes: Any) -> Path:
        facts = flight.outputs.tokenizer.model_copy(update=changes)  # type: ignore[union-attr]
        outputs = flight.outputs.model_copy(update={"tokenizer": facts}).model_dump(mode="json")
        PreflightOutputs.model_validate(outputs)
        folder = _write(tmp_path / name, _manifest("preflight", "eeee", "d9", {}, outputs))
        lineage = {**world["inputs"].lineage, "preflight-sft": str(folder)}
        inputs = world["inputs"].model_copy(update={"lineage": lineage})
        return _publish({**world, "inputs": inputs, "tmp": tmp_path / f"{name}-out"})

    assert (publish("same") / "tokenizer.json").is_file()
    publish("older", tokenisation=None, stop_token_ids=(0, 5))
    with pytest.raises(ValueError, match="other tokens than preflight-sft, on whose rows"):
        publish("other", tokenisation="0" * 64)
    with pytest.raises(ValueError, match=r"generation_config.json does not stop at the tokens \[5\]"):
        publish("stops", stop_token_ids=(0, 5))


def test_an_evaluation_prompts_as_training_did(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole stage, on a tokenizer that adds a bos: what the model is called with."""
    seen: list[list[int]] = []
    stock = type(load_language_model(models["llama3"])).forward

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        # The reading of prompts: later calls bring a token a row, and those for losses have no cache.
        if "past_key_values" in kwargs and kwargs["past_key_values"].get_seq_length() == 0:
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            seen.extend(row[mask.bool()].tolist() for row, mask in rows)
        return stock(model, *args, **kwargs)

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", forward)
    questions = [{"question": f"What is {n} plus {n}?", "answer": f"{n}\n#### {2 * n}"} for n in range(4)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {"name": "tiny_arithmetic", "metric": "exact_match,strict-match",
            "files": {"test": {"path": str(file), "format": "text"}}}  # fmt: skip
    config = EvaluationStageConfig.model_validate(
        {"subject": "sft", "kind": "language_model",
         "settings": {"tasks": [task], "max_length": 200, "precision": "float32"}}
    )  # fmt: skip
    context = StageContext(tmp_path, tmp_path, ComputeSettings(device="cpu"), lambda *_, **__: None)
    evaluate(config, EvaluationInputs(model=str(models["llama3"]), chat_template=TULU_TEMPLATE), context)
    tokenizer = load_tokenizer(models["llama3"], TULU_TEMPLATE)
    assert len(seen) == 4
    for ids in seen:
        text = tokenizer.decode(ids)
        assert text.startswith("<|user|>\n") and text.endswith("<|assistant|>\n")
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
