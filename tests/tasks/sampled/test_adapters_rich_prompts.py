"""Prompts with tools and results through samples, scores, chosen rows, and evaluation: nothing of them is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from smoltulu.schemas.data import DataSource
from smoltulu.schemas.sampled import (
    SampledRowsConfig,
    SampledRowsInputs,
    SampleScoresConfig,
    SampleScoresInputs,
    SamplesInputs,
    SelectionRules,
)
from smoltulu.tasks.data.formats import MalformedRow, adapt
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.evaluation.cell import _digests
from smoltulu.tasks.evaluation.pair_accuracy import encode_pairs
from smoltulu.tasks.evaluation.reward_benchmark_rows import _question
from smoltulu.tasks.evaluation.sampling import encode_prompts
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import pairs, prompt_ids
from smoltulu.tasks.models.turns import Prompt
from smoltulu.tasks.sampled.rows import choose_rows
from smoltulu.tasks.sampled.samples import write_samples
from smoltulu.tasks.sampled.scores import score_samples
from smoltulu.tasks.trainer.gate import prompt_of
from tests.families import FAMILIES, build_family
from tests.rich_rows import ASKED, HERMES, TOOLS
from tests.rows_file import write_rows
from tests.small_runs import turn
from tests.tasks.sampled.test_stages import NO_COMMAS, config, context

ROWS: list[dict[str, Any]] = [
    {"id": f"0:{i}", "prompt": prompt, "verifier": "ifeval", "ground_truth": NO_COMMAS} | more
    for i, (prompt, more) in enumerate([(ASKED[:3], {"tools": TOOLS}), (ASKED[:3], {}), (ASKED[:1], {})])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_family(tmp_path_factory.mktemp("model"), FAMILIES["qwen"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def test_a_prompt_with_tools_from_its_row_to_the_rows_that_are_chosen(tmp_path: Path, model: Path) -> None:
    file = write_rows(tmp_path / "rows.parquet", ROWS)
    given = context(tmp_path / "samples")
    inputs = SamplesInputs(model=str(model), dataset=str(file), chat_template=HERMES)
    outputs, _ = write_samples(config(num_samples=6), inputs, given)
    # The same messages with other tools are another prompt.
    assert outputs.num_asked == 3 and outputs.num_repeated == 0
    samples = given.folder / outputs.file
    # A random model hardly ever ends an answer.
    table = parquet.read_table(samples)
    lines = table.to_pylist()
    for one in (one for line in lines for one in line["samples"]):
        one["ended"] = True
    parquet.write_table(type(table).from_pylist(lines, table.schema), samples)
    scores, _ = score_samples(
        SampleScoresConfig(verifier=True),
        SampleScoresInputs(samples=str(samples), chat_template=HERMES),
        context(tmp_path / "scores"),
    )
    rules = SampledRowsConfig(rules=SelectionRules(score="verifier", make="best"), writer="sft")
    made = SampledRowsInputs(samples=str(samples), scores=str(tmp_path / "scores" / "out" / scores.file))
    chosen_context = context(tmp_path / "chosen")
    chosen, _ = choose_rows(rules, made, chosen_context)
    source = DataSource(sampled="mine", format="messages")
    read = list(read_rows(source, sampled={"mine": str(chosen_context.folder / chosen.file)}))
    assert read
    asked = {row["id"]: row for row in ROWS}
    for row in read:
        prompt = asked[row["id"].split("/")[0]]
        assert row["messages"][:-1] == prompt["prompt"] and row.get("tools") == prompt.get("tools")
        taken = adapt(row, source)
        assert taken["messages"] == row["messages"] and taken.get("tools") == row.get("tools")


def test_evaluation_asks_and_ranks_with_the_same_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(model, HERMES)
    prompts, tools = [row["prompt"] for row in ROWS], [row.get("tools") for row in ROWS]
    expected = prompt_ids(tokenizer, prompts, tools)
    assert encode_prompts(tokenizer, prompts, 1000, tools) == (expected, 0)
    assert len({tuple(ids) for ids in expected}) == 3
    assert [prompt_of({"prompt": Prompt(*one)}, tokenizer) for one in zip(prompts, tools, strict=True)] == expected
    sides = {"chosen": [turn("assistant", "No.")], "rejected": [turn("assistant", "Yes.")]}
    rows = [{"id": str(i), "prompt": row["prompt"], **sides} for i, row in enumerate(ROWS)]
    rows[0]["tools"] = TOOLS
    _, texts = encode_pairs(tokenizer, rows, 1000)
    trained = pairs(tokenizer, rows, "last")
    assert [list(text.ids) for text in texts[::2]] == [pair.prompt_ids + pair.chosen_ids for pair in trained]
    # Rows that ask the same with other tools are not the same question.
    digests = _digests(ROWS, ("prompt",), ("ground_truth",))
    assert len({one["doc_hash"] for one in digests.values()}) == 3


def test_a_reward_benchmark_takes_no_tools() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": json.dumps(TOOLS)}
    with pytest.raises(MalformedRow, match="tools"):
        _question(row, DataSource(path="x.jsonl", format="preference"), "0", needs_subset=False)
