"""What users of the trainers report as bugs, each with a test that fails where it would hit us, named after reports.

A name such as `test_trl_2059_...` stands for github.com/huggingface/trl/issues/2059; reports of the same trap share a
test. The mathematics is in `test_formulas.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.schemas.training import DPOSettings
from smoltulu.tasks.data.formats import MalformedRow, adapt
from smoltulu.tasks.models.chat_template import check_chat_template
from smoltulu.tasks.models.folders import load_language_model, load_tokenizer, save_model
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.verifiers import verify
from tests.small_runs import SETTINGS, Run, conversations, pairs, run, trainer_of, turn
from tests.tiny_model import EOS, PAD, TULU_TEMPLATE, build_tiny_model

STAGES = list(SETTINGS)
ROWS = {"sft": conversations(4), "reward_model": pairs(4), "dpo": pairs(4)}
LONG = "so " * 200  # more than any max_length here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An SFT of three steps, two rows each."""
    settings = {"max_steps": 3, "num_train_epochs": 2, "effective_batch_size": 2}
    return run("sft", tmp_path_factory.mktemp("trained"), base, ROWS["sft"], settings)


def model_with_tokenizer(base: Path, folder: Path, change: dict[str, Any]) -> Path:
    """The base model whose tokenizer_config.json says something else."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


# ------------------------------------------------------------------------------------------- it never stops: eos, pad


@pytest.mark.parametrize("pad_token", [EOS, None])
def test_trl_1623_2059_3091_smol_course_159_closing_eos_is_trained_where_pad_was_eos(
    base: Path, tmp_path: Path, pad_token: str | None
) -> None:
    """Masking all pad tokens masks the closing eos too where they are the same (also alignment-handbook#127)."""
    model = model_with_tokenizer(base, tmp_path / "model", {"pad_token": pad_token})
    assert AutoTokenizer.from_pretrained(str(model)).pad_token == pad_token
    trainer = trainer_of("sft", tmp_path / "run", model, ROWS["sft"], {}, packing=False)
    tokenizer = trainer.processing_class
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.eos_token == EOS
    assert trainer.model.get_input_embeddings().num_embeddings >= len(tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    last = batch["attention_mask"].sum(dim=1) - 1
    assert (batch["labels"][torch.arange(4), last] == tokenizer.eos_token_id).all()
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()
    assert (batch["labels"] == tokenizer.pad_token_id).sum() == 0


def test_open_r1_603_494_saved_model_stops_at_the_trained_eos(base: Path, tmp_path: Path) -> None:
    """Also where the base model's generation config names another eos: generation would run past ours."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    GenerationConfig(bos_token_id=5, eos_token_id=6, pad_token_id=7).save_pretrained(str(model))
    finished = run("sft", tmp_path / "run", model, ROWS["sft"], {"max_steps": 1})
    tokenizer = AutoTokenizer.from_pretrained(str(finished.model))
    for ids in (
        GenerationConfig.from_pretrained(str(finished.model)),
        AutoModelForCausalLM.from_pretrained(str(finished.model)).config,
    ):
        assert (ids.eos_token_id, ids.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id]) == EOS + PAD


# ----------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("stage", STAGES)
def test_lm_evaluation_harness_1841_1098_no_second_bos(base: Path, tmp_path: Path, stage: str) -> None:
    """A tokenizer that puts bos before every text must not put it before a rendered conversation.

    Also alignment-handbook#127. A template writes a bos where a model wants one; Tulu's writes none.
    """
    from tokenizers.processors import TemplateProcessing

    model = tmp_path / "model"
    shutil.copytree(base, model)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(str(model))
    bos = tokenizer.bos_token_id
    assert AutoTokenizer.from_pretrained(str(model))("cat")["input_ids"][0] == bos  # the trap is set

    trainer = trainer_of(stage, tmp_path / "run", model, ROWS[stage], {})
    turns = {"input_ids": "messages", "prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    for given, row in zip(ROWS[stage], trainer.train_dataset, strict=True):
        for column, source in turns.items():
            if column in row:
                # bos is eos here: there is one for every turn that the assistant closes, and none at the beginning.
                assert row[column][0] != bos
                assert row[column].count(bos) == sum(turn["role"] == "assistant" for turn in given[source])


def test_open_instruct_1806_1800_saved_model_carries_the_template_it_was_trained_with(trained: Run) -> None:
    """Another template in reinforcement learning or evaluation than in training loses points in silence."""
    assert AutoTokenizer.from_pretrained(str(trained.model)).chat_template == TULU_TEMPLATE


def test_lighteval_649_a_prompt_is_the_beginning_of_its_conversation(trained: Run) -> None:
    """In tokens: what the model is prompted with is what it was trained to continue."""
    tokenizer = AutoTokenizer.from_pretrained(str(trained.model))
    for row in ROWS["dpo"]:
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)


def test_template_with_the_eos_outside_of_what_is_trained_is_refused() -> None:
    """Its SFT would learn every answer, and never to end one."""
    outside = TULU_TEMPLATE.replace("message['content'] + eos_token", "message['content']").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    )
    assert outside != TULU_TEMPLATE
    with pytest.raises(ValueError, match="put the eos inside"):
        check_chat_template(outside, "outside")
    check_chat_template(TULU_TEMPLATE, "tulu")


def test_template_without_generation_markers_is_refused() -> None:
    """TRL: "not training-compatible" with assistant_only_loss; without that, it would train on all tokens."""
    bare = TULU_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="no generation markers"):
        check_chat_template(bare, "tulu")


# ------------------------------------------------------------------------------------------------- accumulation, loss


@pytest.mark.parametrize("stage", STAGES)
def test_trl_2456_2604_2615_5619_5710_unsloth_1178_accumulation_changes_neither_loss_nor_gradient(
    base: Path, tmp_path: Path, stage: str
) -> None:
    """Logged loss and gradient norm of the same four rows as 4x1 and 1x4 (also trl#2175, trl#4104)."""
    logged = [
        run(stage, tmp_path / str(size), base, ROWS[stage], {"max_steps": 1}, per_device_train_batch_size=size).history[
            0
        ]
        for size in (4, 1)
    ]
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-6)
    assert logged[1]["grad_norm"] == pytest.approx(logged[0]["grad_norm"], rel=1e-5)
    assert logged[1]["num_tokens"] == logged[0]["num_tokens"]


def test_trl_2964_2458_5406_length_normalised_dpo_is_the_default(base: Path, tmp_path: Path) -> None:
    settings = DPOSettings(learning_rate=5e-7, effective_batch_size=128, max_length=2048)
    assert (settings.loss_type, settings.beta) == ("sigmoid_norm", 5.0)
    trainer = trainer_of("dpo", tmp_path, base, ROWS["dpo"], {})
    assert trainer.settings.loss_type == "sigmoid_norm"


@pytest.mark.parametrize(("version", "off"), [("2.10.1", False), ("2.11.0+cu130", True), ("2.13.0", True)])
def test_trl_7181_cudnn_attention_is_off(
    version: str, off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch 2.11 on its backward pass gives NaN in bfloat16. The switch exists without a GPU as well."""
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "one")
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        prepare_torch(StageContext(tmp_path, tmp_path, ComputeSettings(), lambda *args, **kwargs: None))
        assert torch.backends.cuda.cudnn_sdp_enabled() != off
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.gpu
def test_trl_7181_gradient_of_attention_is_finite_on_this_gpu(tmp_path: Path) -> None:
    """The case of the report: a length of 64 modulo 128, a mask, and a head whose logits are all near -120."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        prepare_torch(StageContext(tmp_path, tmp_path, ComputeSettings(), lambda *args, **kwargs: None))
        torch.manual_seed(0)
        length, width = 704, 64
        query, key, value = (
            0.1 * torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        query[..., 0], key[..., 0] = 1.0, -120.0 * width**0.5
        query.requires_grad_()
        causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=causal).float().sum().backward()
        assert query.grad is not None and torch.isfinite(query.grad).all()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("stage", STAGES)
def test_trl_2435_1371_smol_course_61_open_instruct_1685_nan_stops_the_training(
    base: Path, tmp_path: Path, stage: str
) -> None:
    """transformers' filter would log the loss of the step before instead, and train on to the end."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    # DPO's reference is the same model, and comes first; that DPO itself stops is in test_dpo.py.
    said = (
        "no finite log-probability" if stage == "dpo" else "loss is nan at step 1; the checkpoints before it are kept"
    )
    with pytest.raises(ValueError, match=said):
        run(stage, tmp_path / "run", model, ROWS[stage], {"max_steps": 2, "num_train_epochs": 2})
    assert not (tmp_path / "run" / "out" / "model").exists()


def test_bfloat16_weights_are_trained_as_float32_masters(base: Path, tmp_path: Path) -> None:
    """At 5e-7 an update is far below bfloat16's spacing of 1/256 of a weight: it would be rounded away, each time."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    model.save_pretrained(str(tmp_path / "model"))
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(tmp_path / "model"))
    start = load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"]
    assert start.dtype == torch.bfloat16
    assert load_language_model(tmp_path / "model").dtype == torch.float32
    finished = run("sft", tmp_path / "run", tmp_path / "model", ROWS["sft"], {"max_steps": 1, "learning_rate": 5e-7})
    end = load_file(finished.model / "model.safetensors")["model.norm.weight"]
    assert end.dtype == torch.float32 and (end != start.float()).all() and torch.equal(end.bfloat16(), start)


# ---------------------------------------------------------------------------------------------- rows that are too long


@pytest.mark.parametrize("stage", STAGES)
def test_trl_6025_3927_rows_left_with_nothing_to_train_are_left_out_and_said(
    base: Path, tmp_path: Path, stage: str
) -> None:
    """Kept, they give a loss of 0 and a gradient of NaN; dropped in silence, nobody knows."""
    long = {
        "sft": {"id": "0:x", "messages": [turn("user", LONG), turn("assistant", "4")]},
        "reward_model": ROWS["dpo"][0] | {"id": "0:x", "chosen": [turn("assistant", LONG)]},
        "dpo": ROWS["dpo"][0] | {"id": "0:x", "prompt": [turn("user", LONG)]},
    }[stage]
    settings = {"max_steps": 1, "effective_batch_size": 4}
    finished = run(stage, tmp_path, base, [*ROWS[stage], long], settings)
    report = json.loads((tmp_path / "preflight" / "out" / "logs" / "report.json").read_text())["outputs"]
    assert (report["num_source_rows"], report["num_rows"], report["num_dropped"] + report["num_empty"]) == (5, 4, 1)
    assert finished.history[0]["loss"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_trl_6668_nothing_to_train_at_all_is_an_error(base: Path, tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match=r"none of 4 \w+ has anything to train on within 8 tokens; raise max_length"):
        run(stage, tmp_path, base, ROWS[stage], {"max_steps": 1, "max_length": 8})


def test_trl_1271_6263_a_cut_row_keeps_its_beginning(base: Path, tmp_path: Path) -> None:
    """As Tulu 3 cuts: at the end, whose eos is lost with it; the preflight counts them."""
    rows = [{"id": f"0:{i}", "messages": [turn("user", "cat"), turn("assistant", LONG)]} for i in range(2)]
    trainer = trainer_of("sft", tmp_path / "sft", base, rows, {"max_length": 32})
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert len(row["input_ids"]) == 32 and tokenizer.decode(row["input_ids"]).startswith("<|user|>\ncat\n<|assistant|>")
    assert tokenizer.eos_token_id not in row["labels"] and row["labels"][-1] == row["input_ids"][-1]

    pair = ROWS["dpo"][1] | {"chosen": [turn("assistant", LONG)]}
    trainer = trainer_of("dpo", tmp_path / "dpo", base, [pair, pair], {"max_length": 48})
    row = trainer.train_dataset[0]
    assert len(row["prompt_ids"] + row["chosen_ids"]) == 48
    assert trainer.data_collator([row])["num_chosen"].tolist() == [48 - len(row["prompt_ids"])]


# ------------------------------------------------------------------------------------------------------------- resume


def test_trl_3179_3635_2657_3247_axolotl_3305_3940_resume_goes_on_where_it_stopped(
    base: Path, trained: Run, tmp_path: Path
) -> None:
    """Not from step 0, with the same weights, and neither a step nor a token counted twice.

    Also open-instruct#1823, axolotl#406, #554, #1631, open-r1#450 and transformers#33336. That all four stages end
    bitwise the same, also after a torn checkpoint, is in `test_training.py`.
    """
    shutil.copytree(trained.checkpoints.parent, tmp_path / "work")
    (tmp_path / "work" / "checkpoints" / "checkpoint-3" / CHECKPOINT_MARKER).unlink()
    settings = {"max_steps": 3, "num_train_epochs": 2, "effective_batch_size": 2}
    again = run("sft", tmp_path, base, ROWS["sft"], settings)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "2\n"
    assert [row["step"] for row in again.history] == [1, 2, 3]
    for name in ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch"):
        assert [row[name] for row in again.history] == [row[name] for row in trained.history], name
    one, other = (load_file(folder / "model.safetensors") for folder in (again.model, trained.model))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_opendm_7_open_instruct_1701_checkpoints_hold_more_than_weights(trained: Run) -> None:
    """And only as many are kept as asked for: a full disk ends a training as surely as a crash."""
    kept = sorted(path.name for path in trained.checkpoints.glob("checkpoint-*"))
    assert "checkpoint-3" in kept and len(kept) <= ComputeSettings().save_total_limit + 1
    last = trained.checkpoints / "checkpoint-3"
    assert {path.name for path in last.iterdir()} == {"shards", "state.json", "trainer_state.json", CHECKPOINT_MARKER}
    stored, state = (
        load_file(last / "shards" / "rank-0-of-1.safetensors"),
        json.loads((last / "state.json").read_text()),
    )
    for name, value in load_file(trained.model / "model.safetensors").items():
        if name == "lm_head.weight" and f"model.weights.{name}" not in stored:
            continue  # tied
        assert torch.equal(stored[f"model.weights.{name}"], value)
        assert (
            stored[f"model.optimizer.{name}.exp_avg_sq"].any() and state["numbers"][f"model.optimizer.{name}.step"] == 3
        )
    assert state["schedules"]["model"]["last_epoch"] == 3


# -------------------------------------------------------------------------------------------------------- saved models


def test_open_instruct_1820_1809_1671_a_model_that_does_not_load_as_it_was_is_not_saved(
    base: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_language_model(base), load_tokenizer(base, TULU_TEMPLATE)
    assert save_model(model, tokenizer, tmp_path / "good") == model.num_parameters()
    model.register_parameter("forgotten", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match=r"other tensors than the trained one: .*forgotten"):
        save_model(model, tokenizer, tmp_path / "bad")


# ---------------------------------------------------------------------------------------------------- rows of the data


def test_string_prompt_beside_conversations_becomes_messages() -> None:
    """The Tulu preference mixture; TRL: `can only concatenate str (not "list") to str`."""
    question, good, bad = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")
    row = {"id": "x", "prompt": "q", "chosen": [question, good], "rejected": [question, bad], "source": "s"}
    adapted = adapt(row, DataSource(path="rows.jsonl", format="preference"))
    assert adapted == {"prompt": [question], "chosen": [good], "rejected": [bad]}


@pytest.mark.parametrize("change", [{"rejected": "a"}, {"rejected": ""}, {"chosen": None}])
def test_open_instruct_1597_pairs_that_teach_nothing_are_malformed(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedRow):
        adapt(
            {"prompt": "q", "chosen": "a", "rejected": "b"} | change, DataSource(path="rows.jsonl", format="preference")
        )


# --------------------------------------------------------------------------------------------------------------- RLVR


def test_open_r1_293_an_unreadable_ground_truth_gives_no_reward() -> None:
    """It gave the full one."""
    for verifier in ("gsm8k", "math", "constraint"):
        assert verify(verifier, r"#### 7 \boxed{7}", "") is None


def test_open_instruct_1530_numbers_are_compared_as_numbers() -> None:
    """The sign belongs to the number, and 18.00 is 18."""
    assert verify("gsm8k", "#### -5", "-5") == 1.0 and verify("gsm8k", "#### -5", "5") == 0.0
    assert verify("gsm8k", "#### 18.00", "18") == 1.0


def test_grpo_groups_must_fill_a_step() -> None:
    with pytest.raises(ValidationError, match="12 is not a multiple of num_generations 8"):
        GRPOSettings(
            learning_rate=1e-6, effective_batch_size=12, num_steps=1, max_prompt_length=64, max_completion_length=8
        )
