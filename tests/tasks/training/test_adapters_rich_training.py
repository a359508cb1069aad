"""Rows with tools, reasoning and turns that are not trained on: from the rows file to a step of every training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.tasks.data.formats import adapt
from smoltulu.tasks.data.held_out import asked
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.data.stage import build_dataset
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import IGNORED, conversations, prompt_ids
from smoltulu.tasks.sampled.samples import asked_of, stored_prompt
from smoltulu.tasks.training import grpo, ppo
from tests.families import FAMILIES, build_family
from tests.rich_rows import ASKED, HERMES, TOOLS, call, calling
from tests.small_ppo import SETTINGS as PPO_SETTINGS
from tests.small_ppo import context
from tests.small_runs import FUNCTIONS, stage_arguments, training_inputs, turn
from tests.tasks.preflight.test_preflight import fly, training_of
from tests.tasks.training.test_grpo import SETTINGS, TRUTH
from tests.tiny_model import TULU_TEMPLATE

#: The same row but for what is trained on, a row of another length, and one with tools.
BAD, GOOD = turn("assistant", "BAD answer"), turn("assistant", "GOOD answer")
ROWS: list[dict[str, Any]] = [
    {"id": "0:0", "messages": [turn("user", "a"), BAD | {"train": False}, turn("user", "b"), GOOD]},
    {"id": "0:1", "messages": [turn("user", "a longer one"), BAD, turn("user", "b"), GOOD | {"train": False}]},
    {"id": "0:2", "messages": ASKED, "tools": TOOLS},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_family(tmp_path_factory.mktemp("model"), FAMILIES["qwen"])
    config = json.loads((folder / "config.json").read_text())
    # Signatures of tools are long for a tokenizer of 400 tokens.
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def without_train(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row | {"messages": [{key: value for key, value in one.items() if key != "train"} for one in row["messages"]]}
        for row in rows
    ]


def hide(row: dict[str, Any], text: str, tokenizer: Any) -> dict[str, Any]:
    """A tokenised row, the labels of a text and of the end of its turn taken out by hand."""
    hidden = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
    (start,) = [at for at in range(len(row["labels"])) if row["input_ids"][at : at + len(hidden)] == hidden]
    return row | {"labels": [*row["labels"][:start], *[IGNORED] * len(hidden), *row["labels"][start + len(hidden) :]]}


def test_an_answer_that_is_not_trained_on_has_no_part_in_two_steps_of_sft(model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "max_length": 600, "effective_batch_size": 2}
    config, inputs, given = stage_arguments("sft", tmp_path / "ours", model, ROWS, settings, HERMES)
    FUNCTIONS["sft"](config, inputs, given)
    config, inputs, given = stage_arguments("sft", tmp_path / "hand", model, without_train(ROWS), settings, HERMES)
    file, tokenizer = Path(inputs.dataset), load_tokenizer(model, HERMES)
    table = parquet.read_table(file)
    rows = table.to_pylist()
    by_hand = [hide(rows[0], "BAD answer", tokenizer), hide(rows[1], "GOOD answer", tokenizer), rows[2]]
    assert by_hand != rows
    ours = parquet.read_table(tmp_path / "ours" / "preflight" / "out" / "rows.parquet").to_pylist()
    assert ours == by_hand
    parquet.write_table(type(table).from_pylist(by_hand, table.schema), file)
    FUNCTIONS["sft"](config, inputs, given)
    weights = [load_file(tmp_path / name / "out" / "model" / "model.safetensors") for name in ("ours", "hand")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    history = [json.loads(line) for line in (tmp_path / "ours" / "out" / "logs" / "history.jsonl").open()]
    assert len([one for one in history if "loss" in one]) == 2


def test_preference_pairs_with_tools_train(model: Path, tmp_path: Path) -> None:
    pair = {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [calling(call(city="Köln"))], "tools": TOOLS}
    rows = [{"id": "0:0", **pair}, {"id": "0:1", **pair, "chosen": [turn("assistant", "No.")]}]
    settings = {"max_steps": 1, "max_length": 600}
    config, inputs, given = stage_arguments("dpo", tmp_path, model, rows, settings, HERMES)
    FUNCTIONS["dpo"](config, inputs, given)
    assert parquet.read_table(inputs.dataset).num_rows == 2


def test_from_a_users_file_to_a_step(model: Path, tmp_path: Path) -> None:
    """Tools, reasoning, a weight of 0: what the file says is what is trained on."""
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    lines: list[dict[str, Any]] = [
        {
            "messages": [
                turn("user", "Rain in Bonn?"),
                {"role": "assistant", "content": None, "reasoning": "I must look.", "tool_calls": [
                    {"id": "a1", "type": "function", "function": function}]},
                {"role": "tool", "content": "dry", "tool_call_id": "a1"},
                turn("assistant", "No rain."),
            ],
            "tools": json.dumps(TOOLS),
        },
        {"messages": [turn("user", "a"), BAD | {"weight": 0}, turn("user", "b"), GOOD | {"weight": 1}]},
        {"messages": [turn("user", "a"), turn("assistant", "plain")]},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = DataSource(path=str(file), format="messages")
    data = DatasetStageConfig(kind="sft", data=DataSet(sources=(source,)))
    made = context(tmp_path / "dataset")
    outputs, _ = build_dataset(data, DatasetInputs(), made)
    assert outputs.num_rows == 3
    rows = list(stored_rows(made.folder / outputs.file))
    assert rows[0]["messages"][1] == {
        "role": "assistant", "content": "", "reasoning_content": "I must look.",
        "tool_calls": [{"id": "a1", "type": "function", "function": function | {"arguments": {"city": "Bonn"}}}],
    }  # fmt: skip
    assert rows[0]["tools"] == TOOLS and rows[1]["messages"][1] == BAD | {"train": False}
    assert rows[2] == {"id": "0:2", "messages": lines[2]["messages"]}
    settings = {"max_steps": 1, "max_length": 600, "effective_batch_size": 2}
    config, inputs, given = stage_arguments("sft", tmp_path / "sft", model, rows, settings, HERMES)
    tokenizer = load_tokenizer(model, HERMES)
    trained = [
        tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        for row in parquet.read_table(inputs.dataset).to_pylist()
    ]
    call_text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'
    assert trained == [
        f"<think>\nI must look.\n</think>\n{call_text}No rain.<|im_end|>", "GOOD answer<|im_end|>", "plain<|im_end|>",
    ]  # fmt: skip
    FUNCTIONS["sft"](config, inputs, given)
    assert (given.folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("is_implicit", [False, True])
def test_turns_of_a_pairs_prompt_keep_whether_they_count(is_implicit: bool) -> None:
    """It matters where `trained_turns` is all."""
    prompt = [turn("user", "a"), BAD | {"train": False}, turn("user", "b")]
    sides = {"chosen": [turn("assistant", "c")], "rejected": [turn("assistant", "d")]}
    row = {name: prompt + side for name, side in sides.items()} if is_implicit else {"prompt": prompt, **sides}
    assert adapt(row, DataSource(path="x.jsonl", format="preference")) == {"prompt": prompt, **sides}


def test_the_preflight_counts_rich_rows_and_says_which_a_template_refuses(model: Path, tmp_path: Path) -> None:
    flight = fly(tmp_path / "hermes", model, ROWS, template=HERMES, max_length=600)
    outputs = flight.outputs
    assert not flight.error and outputs.refusals == {}
    assert (outputs.num_with_tools, outputs.num_with_reasoning, outputs.num_untrained_turns) == (1, 1, 2)
    for name in ("Rows with tools", "Rows with reasoning", "Answers that are not trained on"):
        assert f"<dt>{name}</dt>" in flight.page
    tulu = fly(tmp_path / "tulu", model, ROWS, template=TULU_TEMPLATE, max_length=600)
    reason = (
        "the chat template leaves out text: reasoning_content, tool_calls, turns of role tool, tools; name a template "
        "that renders it, or leave it out of the rows (ignore)"
    )
    assert tulu.outputs.num_malformed == 1 and tulu.outputs.refusals == {reason: 1}
    assert tulu.outputs.num_rows == 2 and f"1 rows: {reason}" in tulu.error
    # In parts, and in pages, nothing of a row is lost.
    assert "I must look." in tulu.page and "dry, 21" in tulu.page and "The weather of a city." in tulu.page


PROMPTS = [
    {"id": f"0:{i}", "prompt": prompt, "verifier": "constraint", "ground_truth": TRUTH} | more
    for i, (prompt, more) in enumerate(
        [(ASKED[:1], {"tools": TOOLS}), (ASKED[:3], {"tools": TOOLS}), ([turn("user", "Hello?")], {})] * 4
    )
]


def test_the_dry_run_tries_the_longest_prompt_with_its_tools(model: Path, tmp_path: Path) -> None:
    settings = training_of("rlvr", max_prompt_length=600) | {"max_length": 600}
    compute = {"per_device_train_batch_size": 2}
    flight = fly(
        tmp_path, model, PROMPTS, template=HERMES, checks={"dry_run": True, "max_faulty_share": 1}, compute=compute,
        **settings,
    )  # fmt: skip
    run = flight.outputs.dry_run
    assert run is not None and run.num_tokens == 2 * (flight.outputs.longest + 20)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_rollouts_of_prompts_with_tools_begin_as_everywhere(model: Path, tmp_path: Path, algorithm: str) -> None:
    """TRL renders a prompt with the trainer's tools; those of the row come from here."""
    config = RLVRSettings.model_validate(SETTINGS | {"algorithm": algorithm, "max_prompt_length": 600})
    made = training_inputs("rlvr", tmp_path, model, PROMPTS, config, ComputeSettings(device="cpu"), HERMES)
    assert list(stored_rows(Path(made.dataset))) == PROMPTS
    trainer = grpo.build(config, RLVRInputs(**made.model_dump()), context(tmp_path / "run"))
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = load_tokenizer(model, HERMES)
    scored = trainer._generate_and_score_completions(batch)
    seen = [
        [token for token, mask in zip(ids, masks, strict=True) if mask]
        for ids, masks in zip(scored["prompt_ids"].tolist(), scored["prompt_mask"].tolist(), strict=True)
    ]
    rows = {row["id"]: row for row in PROMPTS}
    asked = [rows[one["id"]] for one in batch]
    assert seen == prompt_ids(tokenizer, [row["prompt"] for row in asked], [row.get("tools") for row in asked])


def test_ppo_asks_prompts_with_tools_as_they_are_everywhere(model: Path, tmp_path: Path) -> None:
    settings = PPO_SETTINGS | {"max_prompt_length": 600, "critic": {"initial": "policy"}}
    config = RLVRSettings.model_validate(settings)
    made = training_inputs("rlvr", tmp_path, model, PROMPTS, config, ComputeSettings(device="cpu"), HERMES)
    trainer = ppo.build(config, RLVRInputs(**made.model_dump()), context(tmp_path / "run"))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(model, HERMES)
    episodes = trainer._asked(0, range(3))
    expected = prompt_ids(tokenizer, [row["prompt"] for row in PROMPTS[:3]], [TOOLS, TOOLS, None])
    assert [one["prompt_ids"] for one in episodes] == expected


def test_a_question_is_held_out_whatever_it_is_offered() -> None:
    with_tools = PROMPTS[0]
    assert asked(with_tools) == asked({key: value for key, value in with_tools.items() if key != "tools"})
    assert asked(PROMPTS[1]) != asked(PROMPTS[0])


def test_samples_keep_the_whole_prompt() -> None:
    plain, rich = [turn("user", "a")], ASKED[:3]
    assert stored_prompt(plain, None) == {"prompt": plain, "whole_prompt": ""}
    assert asked_of(stored_prompt(plain, None)) == (plain, None)
    assert asked_of(stored_prompt(rich, TOOLS)) == (rich, TOOLS) and asked_of(stored_prompt(rich, None)) == (rich, None)
    assert stored_prompt(rich, TOOLS)["prompt"][1] == {"role": "assistant", "content": ""}


def test_a_plain_row_has_the_tokens_that_it_always_had(model: Path) -> None:
    tokenizer = load_tokenizer(model, HERMES)
    row = [turn("system", "s"), turn("user", "u"), turn("assistant", "a")]
    (made,) = conversations(tokenizer, [row])
    theirs = tokenizer.apply_chat_template(
        [row], tokenize=True, return_dict=True, padding=False, return_assistant_tokens_mask=True
    )
    assert [made.input_ids] == theirs["input_ids"] and [made.mask] == theirs["assistant_masks"]
