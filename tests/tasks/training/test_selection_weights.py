"""Weights in the loss of SFT: held against plain torch, against trainings without weights, and against fewer rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainerCallback

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.schemas.training import DPOInputs, SFTInputs
from smoltulu.tasks.training.row_weights import WEIGHTS, WeightedCollator, normalise, read_weights, token_weights
from smoltulu.tasks.training.sft import build, collate_packed, train_sft
from tests.small_runs import conversations, stage_arguments, two_processes
from tests.tiny_model import build_tiny_model

ROWS = conversations(14)
#: Two epochs of 14 rows in steps of 4: eight steps, and every fourth has two rows.
SETTINGS: dict[str, Any] = {"effective_batch_size": 4, "num_train_epochs": 2, "learning_rate": 3e-3, "seed": 5}
Weights = dict[int, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def span(first: int, last: int, weight: float) -> dict[str, Any]:
    return {"first": first, "last": last, "weight": weight}


def line(row: int, num_tokens: int, weight: float, *spans: dict[str, Any]) -> dict[str, Any]:
    return {"row": row, "num_tokens": num_tokens, "weight": weight, "spans": list(spans)}


SCHEMA = pa.schema([
    ("row", pa.int64()), ("num_tokens", pa.int32()), ("weight", pa.float64()),
    ("spans", pa.list_(pa.struct([("first", pa.int32()), ("last", pa.int32()), ("weight", pa.float64())]))),
])  # fmt: skip


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(lines, SCHEMA), file)
    return str(file)


def tokenised(file: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def arguments(
    folder: Path, base: Path, weights: Callable[[dict[str, Any]], dict[str, Any]] | None, rows: list[Any] = ROWS,
    settings: dict[str, Any] = SETTINGS, **compute: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Of the stage. `weights`: tokenised row -> its line in the weights file."""
    config, inputs, context = stage_arguments("sft", folder, base, rows, settings, **{"save_steps": 100} | compute)
    if weights is not None:
        # From the end: the order of the lines means nothing.
        lines = [weights(row) for row in reversed(tokenised(inputs.dataset))]
        inputs = SFTInputs(**inputs.model_dump(), weights=write(folder / "weights.parquet", lines))
    return config, inputs, context


def trained(*of_stage: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What was logged, without measured times, and the weights at the end."""
    train_sft(*of_stage)
    folder = of_stage[2].folder
    history = [json.loads(row) for row in (folder / "logs" / "history.jsonl").open()]
    logged = [
        {name: row[name] for name in row if name not in ("tokens_per_second", "peak_memory_gb")} for row in history
    ]
    return logged, load_file(folder / "model" / "model.safetensors")


def uneven(row: dict[str, Any]) -> dict[str, Any]:
    """Every row another weight; rows 3 and 10 none; every third row a span, that of row 6 with weight 0."""
    number, length = row["row"], len(row["input_ids"])
    spans = [span(length - 5, length - 2, 0.0 if number == 6 else 4.0)] if number % 3 == 0 and number != 3 else []
    return line(number, length, 0.0 if number in (3, 10) else 0.25 + number % 5, *spans)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_weights_of_tokens_by_hand() -> None:
    row = {"weight": 0.5, "spans": [span(0, 2, 3.0), span(4, 6, 2.0)], "labels": [7, 7, -100, 7, 7, 7, 7]}
    assert token_weights(row) == [0.0, 3.0, 0.0, 0.5, 2.0, 2.0, 0.5]
    # Cut: a span ends with the row, or lies behind its end.
    assert token_weights(row | {"labels": row["labels"][:5]}) == [0.0, 3.0, 0.0, 0.5, 2.0]
    assert token_weights(row | {"labels": row["labels"][:2]}) == [0.0, 3.0]
    assert token_weights(row | {"labels": row["labels"][:3], "spans": [span(3, 9, 2.0)]}) == [0.0, 0.5, 0.0]


def of_row(tokens: list[int], weight: float, *spans: dict[str, Any], labels: list[int] | None = None) -> dict[str, Any]:
    return {"row": tokens[0], "input_ids": tokens, "labels": labels or tokens, "weight": weight, "spans": list(spans)}


def test_a_batch_has_no_row_and_no_label_of_weight_0() -> None:
    collate = WeightedCollator(collate_packed)
    rows = [of_row([5, 6, 7], 0.5, span(2, 3, 0.0)), of_row([8, 9], 0.0), of_row([3, 4], 0.0, span(1, 2, 2.0))]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 4]]
    assert batch[WEIGHTS].tolist() == [[0, 0.5, 0, 0, 2.0]] and "is_blank" not in batch
    blank = collate([rows[1], of_row([1, 2, 3], 2.0, labels=[1, -100, -100])])
    assert blank["is_blank"] and blank["labels"].tolist() == [[-100, -100]] and blank[WEIGHTS].tolist() == [[0, 0]]
    assert blank["input_ids"].tolist() == [[8, 9]]
    held_out = [{name: value for name, value in row.items() if name not in ("weight", "spans")} for row in rows]
    assert collate(held_out)["labels"].tolist() == collate_packed(held_out)["labels"].tolist()


def batch_of(*weights: float) -> dict[str, torch.Tensor]:
    return {WEIGHTS: torch.tensor([weights], dtype=torch.float64)}


def alone() -> Any:
    return SimpleNamespace(reduce=lambda own, how: own)


def test_weights_have_mean_1_over_the_step_and_all_processes_by_hand() -> None:
    batches = [batch_of(0, 1, 2), batch_of(3)]
    assert normalise(batches, alone()) == 3
    assert [batch[WEIGHTS].tolist() for batch in batches] == [[[0, 0.5, 1]], [[1.5]]]
    # Another process has two tokens with a sum of 4: the mean is 10 / 5.
    batches = [batch_of(0, 1, 2), batch_of(3)]
    there = torch.tensor([4.0, 2.0], dtype=torch.float64)
    assert normalise(batches, SimpleNamespace(reduce=lambda own, how: own + there)) == 5  # type: ignore[arg-type]
    assert [batch[WEIGHTS].tolist() for batch in batches] == [[[0, 0.5, 1]], [[1.5]]]
    nothing = [batch_of(0, 0)]
    assert normalise(nothing, alone()) == 0 and nothing[0][WEIGHTS].tolist() == [[0, 0]]


@given(st.floats(1e-300, 1e100), st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_equal_weights_are_exactly_1_in_float32(constant: float, num_tokens: list[int]) -> None:
    batches = [batch_of(0.0, *[constant] * number) for number in num_tokens]
    normalise(batches, alone())
    assert all(
        batch[WEIGHTS].dtype == torch.float32 and set(batch[WEIGHTS][0, 1:].tolist()) == {1.0} for batch in batches
    )


# ------------------------------------------------------------------------------------------------------------ bad input

MIX = [line(0, 9, 1.0), line(1, 9, 1.0, span(0, 2, 1.0), span(2, 9, 0.5))]


@pytest.mark.parametrize(("lines", "message"), [
    ([*MIX, line(2, 9, -0.5)], "row 2 has the weight -0.5; allowed are numbers from 0 to 1e[+]100"),
    ([*MIX, line(2, 9, float("nan"))], "row 2 has the weight nan"),
    ([*MIX, line(2, 9, float("inf"))], "row 2 has the weight inf"),
    ([*MIX, line(2, 9, 1.0, span(0, 1, 1.0), span(1, 2, -1.0))], "row 2 has the weight -1"),
    ([*MIX, line(2, 9, 1.0, span(0, 1, float("nan")))], "row 2 has the weight nan"),
    ([*MIX, line(1, 9, 1.0)], "has 2 lines of row 1; allowed is one"),
    ([*MIX, line(2, 9, 1.0, span(3, 10, 1.0))], r"row 2 of 9 tokens has a span of its tokens \[3, 10\); allowed are"),
    ([*MIX, line(2, 9, 1.0, span(3, 3, 1.0))], r"tokens \[3, 3\)"),
    ([*MIX, line(2, 9, 1.0, span(-1, 3, 1.0))], r"tokens \[-1, 3\)"),
    ([*MIX, line(2, 9, 1.0, span(3, 5, 1.0), span(4, 6, 1.0))], r"row 2 .* tokens \[4, 6\)"),
    ([*MIX, line(2, 9, 1.0, span(5, 6, 1.0), span(3, 5, 1.0))], r"tokens \[3, 5\)"),
    ([line(0, 9, 0.0), line(1, 9, 0.0, span(0, 2, 0.0))], "every weight is 0, so there is nothing to train on"),
    ([], "no weights file: it has no line"),
    ([*MIX, {"row": 2, "num_tokens": 9, "weight": None, "spans": []}], "a value is missing"),
    ([*MIX, {"row": 2, "num_tokens": 9, "weight": 1.0, "spans": None}], "a value is missing"),
    ([*MIX, line(2, 9, 1.0, {"first": 1, "last": None, "weight": 1.0})], "a value is missing"),
])  # fmt: skip
def test_weights_that_are_none_are_refused(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    assert len(read_weights(write(tmp_path / "good.parquet", MIX))) == 2
    with pytest.raises(ValueError, match=message):
        read_weights(write(tmp_path / "weights.parquet", lines))


@pytest.mark.parametrize("table", [
    {"row": [0], "num_tokens": [3], "weight": [1.0]},
    {"row": ["a"], "num_tokens": [3], "weight": [1.0], "spans": [[]]},
    {"row": [0], "num_tokens": [3], "weight": [1.0], "spans": [[{"first": 0, "weight": 1.0}]]},
    {"row": [0], "num_tokens": [3], "weight": [1.0], "spans": [2.0]},
])  # fmt: skip
def test_another_file_is_no_weights_file(tmp_path: Path, table: dict[str, Any]) -> None:
    parquet.write_table(pa.table(table), tmp_path / "weights.parquet")
    with pytest.raises(ValueError, match="is no weights file"):
        read_weights(str(tmp_path / "weights.parquet"))
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(ValueError, match="is no weights file"):
        read_weights(str(tmp_path / "text"))


def test_weights_are_of_these_rows(base: Path, tmp_path: Path) -> None:
    """A row that the preflight cut has its prefix; a dropped one may be there; a row of other tokens may not."""
    config, inputs, context = arguments(tmp_path, base, None, settings=SETTINGS | {"max_length": 40})
    _, whole, _ = arguments(tmp_path / "whole", base, None)
    lengths = {row["row"]: len(row["input_ids"]) for row in tokenised(whole.dataset)}
    assert max(lengths.values()) > 40

    def rows_with(**lines: Any) -> Any:
        made = {number: line(number, length, 1.0 + number) for number, length in lengths.items()}
        made |= {int(name[1:]): one for name, one in lines.items()}
        file = write(tmp_path / "weights.parquet", [one for one in made.values() if one])
        return build(config, SFTInputs(**inputs.model_dump(), weights=file), context).train_dataset

    rows = rows_with(r99=line(99, 3, 7.0), r3=line(3, lengths[3], 2.0, span(1, 3, 0.5)))
    assert [row["weight"] for row in rows] == [2.0 if row["row"] == 3 else 1.0 + row["row"] for row in rows]
    assert [row["spans"] for row in rows][3] == [span(1, 3, 0.5)] and not rows[4]["spans"]
    assert {len(row["input_ids"]) for row in rows} == {min(length, 40) for length in lengths.values()}
    with pytest.raises(ValueError, match="weights of another row set: there is none of row 4"):
        rows_with(r4=None)
    with pytest.raises(
        ValueError, match=r"weights of another row set: row 4 has \d+ tokens \(max_length 40\), there 7"
    ):
        rows_with(r4=line(4, 7, 1.0))


def test_no_other_training_takes_weights() -> None:
    with pytest.raises(ValueError, match="weights"):
        DPOInputs(model="m", dataset="d", chat_template="", reference_logps="r", weights="w")  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_equal_weights_are_the_training_without_any_bit_for_bit(base: Path, tmp_path: Path, packing: bool) -> None:
    """Whatever the constant, which the spans have too."""
    plain = trained(*arguments(tmp_path / "plain", base, None, packing=packing))
    for constant in (1.0, 0.3) if packing else (7e-5,):

        def equal(row: dict[str, Any], weight: float = constant) -> dict[str, Any]:
            return line(row["row"], len(row["input_ids"]), weight, span(1, 4, weight))

        history, weights = trained(*arguments(tmp_path / str(constant), base, equal, packing=packing))
        assert history == plain[0] and len(history) == 8
        assert weights.keys() == plain[1].keys()
        assert all(torch.equal(value, plain[1][name]) for name, value in weights.items())


def reference(
    base: Path, rows: list[dict[str, Any]], weights: list[list[float]]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Plain torch: of every optimizer step the loss, sum(w CE) / sum(w), and the model's parameters after it."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["learning_rate"], eps=1e-8, weight_decay=0.0)
    num_steps, step = 8, 0
    for epoch in range(2):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SETTINGS["seed"] + epoch)).tolist()
        for start in range(0, len(rows), 4):
            total, above, metrics = torch.tensor(0.0), torch.tensor(0.0), []
            for number in order[start : start + 4]:
                row = rows[number]
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
                losses = cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="none")
                of_tokens = torch.tensor(weights[number][1:])
                above, total = above + (of_tokens * losses).sum(), total + of_tokens.sum()
                right = logits.argmax(-1) == torch.tensor(row["labels"][1:])
                metrics += right[of_tokens > 0].tolist()
            loss = above / total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = SETTINGS["learning_rate"] * (num_steps - step) / num_steps
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield loss.item(), {"mean_token_accuracy": sum(metrics) / len(metrics), "model": model}


@pytest.mark.parametrize(("per_device", "packing"), [(4, True), (1, True), (2, False)])
def test_uneven_weights_are_the_plain_loop(base: Path, tmp_path: Path, per_device: int, packing: bool) -> None:
    """Rows and spans, weights of 0 among both; the reference knows of labels, not of how the stage leaves rows out."""
    stage = arguments(tmp_path, base, uneven, packing=packing, per_device_train_batch_size=per_device)
    history, weights = trained(*stage)
    rows = tokenised(stage[1].dataset)
    per_token = []
    for row in rows:
        of = uneven(row)
        made = [of["weight"]] * len(row["input_ids"])
        for one in of["spans"]:
            made[one["first"] : one["last"]] = [one["weight"]] * 3
        per_token.append([weight * (label != -100) for weight, label in zip(made, row["labels"], strict=True)])
    steps = list(reference(base, rows, per_token))
    assert len(steps) == len(history) == 8
    for (loss, plain), ours in zip(steps, history, strict=True):
        assert ours["loss"] == pytest.approx(loss, rel=1e-6)
        assert ours["mean_token_accuracy"] == pytest.approx(plain["mean_token_accuracy"], abs=1e-7)
    before = load_file(base / "model.safetensors")
    for name, value in steps[-1][1]["model"].named_parameters():
        moved = float((value.detach() - before[name]).abs().max())
        assert moved > 1e-3
        torch.testing.assert_close(weights[name], value.detach(), rtol=0, atol=2e-5 * moved)
    # Nothing of this is so without the weights.
    plain_loss, _ = trained(*arguments(tmp_path / "plain", base, None, packing=packing))
    assert abs(plain_loss[0]["loss"] / history[0]["loss"] - 1) > 1e-3


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_weight_0_is_a_row_that_is_not_there(base: Path, tmp_path: Path, packing: bool) -> None:
    """Loss, every gradient and all that is logged, bit for bit. Two micro-batches, and a third of such rows alone."""
    few = arguments(tmp_path / "few", base, None, ROWS[:6], packing=packing)
    names = set(range(6))

    def only_six(row: dict[str, Any]) -> dict[str, Any]:
        return line(row["row"], len(row["input_ids"]), 0.7 if row["row"] in names else 0.0)

    more = arguments(tmp_path / "more", base, only_six, ROWS[:12], packing=packing)
    results = []
    for stage, cut in ((few, [[0, 1, 2], [3, 4, 5]]), (more, [[6, 0, 1, 7, 2], [8, 9], [3, 4, 10, 5, 11]])):
        trainer = build(*stage)
        collated = [trainer.data_collator([trainer.train_dataset[number] for number in numbers]) for numbers in cut]
        batches, num_items = trainer.get_batch_samples(iter(collated), len(cut), "cpu")
        trainer.model.train()
        for batch in batches:
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items).backward()
        logs: dict[str, float] = {}
        trainer.log(logs)
        gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
        results.append((num_items, logs, gradients))
    assert results[0][0] == results[1][0] and results[0][1] == results[1][1]
    assert results[0][1]["num_tokens"] > 0
    assert all(torch.equal(value, results[1][2][name]) and value.any() for name, value in results[0][2].items())


# ---------------------------------------------------------------------------------------------------------- trainings


def test_a_step_without_any_weight_moves_nothing(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of one row a step, the second to fourth weigh nothing: Adam's moments would go on moving the model."""
    settings = SETTINGS | {"effective_batch_size": 1, "num_train_epochs": 1, "weight_decay": 0.1}
    order = torch.randperm(6, generator=torch.Generator().manual_seed(SETTINGS["seed"])).tolist()

    def some(row: dict[str, Any]) -> dict[str, Any]:
        return line(row["row"], len(row["input_ids"]), 0.0 if row["row"] in order[1:4] else 2.0)

    stage = arguments(tmp_path, base, some, ROWS[:6], settings, per_device_train_batch_size=1)
    trainer = build(*stage)
    seen: list[torch.Tensor] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (moments,) = [one["exp_avg"] for key, one in trainer.optimizer.state.items() if key is weight]
            seen.append(torch.cat([weight.detach().flatten(), moments.flatten()]).clone())

    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    trainer.add_callback(Look())
    trainer.train()
    stood_still = [torch.equal(one, other) for one, other in pairwise(seen)]
    assert stood_still == [True, True, True, False, False]
    history, weights = trained(*stage)
    assert [row["loss"] == 0 for row in history] == [False, True, True, True, False, False]
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert caplog.text.count("every weight is 0, so it moves nothing") == 6


def test_weights_of_tokens_that_nobody_trains_are_an_error(base: Path, tmp_path: Path) -> None:
    """Before anything is trained, however seldom losses are logged."""
    stage = arguments(tmp_path, base, lambda row: line(row["row"], len(row["input_ids"]), 0.0, span(0, 1, 1.0)))
    with pytest.raises(ValueError, match="no supervised token of any row has a weight above 0"):
        build(*stage)


def test_a_resume_ends_with_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Its last checkpoint torn, a training goes on from the one before: in the middle of an epoch."""
    stage = arguments(tmp_path, base, uneven, save_steps=6)
    whole = trained(*stage)
    (tmp_path / "work" / "checkpoints" / "checkpoint-8" / CHECKPOINT_MARKER).unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    again = trained(*stage)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "6\n"
    assert again[0] == whole[0] and all(torch.equal(value, again[1][name]) for name, value in whole[1].items())


def test_the_held_out_loss_has_no_weights(base: Path, tmp_path: Path) -> None:
    """Of rows whose numbers are those of training rows without weight."""
    settings = SETTINGS | {"max_steps": 1, "learning_rate": 1e-12}
    found = []
    for name in ("plain", "weighted"):
        config, inputs, context = stage_arguments(
            "sft", tmp_path / name, base, ROWS, settings, held_out=ROWS[2:6], save_steps=100
        )
        if name == "weighted":
            lines = [uneven(row) for row in tokenised(inputs.dataset)]
            inputs = SFTInputs(**inputs.model_dump(), weights=write(tmp_path / "weights.parquet", lines))
        outputs, _ = train_sft(config, inputs, context)
        assert outputs.held_out_loss is not None
        found.append((outputs.held_out_loss.losses[0], outputs.held_out_loss.num_counted))
    assert found[0] == found[1]


def test_two_processes_train_as_one(base: Path, tmp_path: Path) -> None:
    """13 rows in steps of 4: the last has one. Some micro-batches have no weight, and the second step has none."""
    rows, settings = ROWS[:13], SETTINGS | {"num_train_epochs": 1}
    order = torch.randperm(13, generator=torch.Generator().manual_seed(SETTINGS["seed"])).tolist()

    def some(row: dict[str, Any]) -> dict[str, Any]:
        return uneven(row) | ({"weight": 0.0, "spans": []} if row["row"] in order[4:8] else {})

    stage = arguments(tmp_path / "one", base, some, rows, settings, per_device_train_batch_size=2)
    history, weights = trained(*stage)
    two = two_processes("sft", tmp_path, base, rows, settings, per_device_train_batch_size=1, weights=stage[1].weights)(
        "two"
    )
    logged = [json.loads(row) for row in (two / "output" / "logs" / "history.jsonl").open()]
    assert [row["loss"] > 0 for row in logged] == [row["loss"] > 0 for row in history] == [True, False, True, True]
    for ours, alone_ in zip(logged, history, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy"):
            assert ours[name] == pytest.approx(alone_[name], rel=1e-5), name
    for name, value in load_file(two / "output" / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-5)
