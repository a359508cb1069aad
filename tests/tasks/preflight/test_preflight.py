"""The preflight on a two-layer model: counts, checks, dry run, report. See docs/preflight.md."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import types
import weakref
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smoltulu.artifacts.keys import folder_records, records_digest
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import ArtifactReference, Spec
from smoltulu.schemas.budget import Budget
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings, StageCompute
from smoltulu.schemas.preflight import (
    PreflightConfig,
    PreflightInputs,
    PreflightOutputs,
    PreflightSettings,
)
from smoltulu.schemas.run import StageRun
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.preflight import dry_run
from smoltulu.tasks.preflight.checks import Check, checks
from smoltulu.tasks.preflight.rollout_memory import kv_bytes
from smoltulu.tasks.preflight.stage import PERCENTILES, length_report, overlong_share
from smoltulu.tasks.report import html_report, stage_table
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.stages import STAGES
from tests import small_runs
from tests.rows_file import read_rows, write_rows
from tests.small_runs import turn
from tests.tiny_model import EOS, PAD, PICKY_TEMPLATE, REFUSED, TULU_TEMPLATE, build_tiny_model, build_tokenizer

Rows = list[dict[str, Any]]
ASKED, NOT_RENDERED = turn("user", "Good morning"), turn("assistant", REFUSED)
NASTY = '</pre><script>alert(1)</script><img src="https://evil.example/x.png">\u202e'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True)
class Flight:
    """A preflight that came to its end, passed or failed (`error`)."""

    config: PreflightConfig
    outputs: PreflightOutputs
    error: str
    folder: Path

    @property
    def page(self) -> str:
        return (self.folder / "logs" / "report.html").read_text("utf-8")

    @property
    def rows(self) -> Rows:
        from pyarrow import parquet

        return parquet.read_table(self.folder.parent / "out" / self.outputs.file).to_pylist()

    def check(self, name: str) -> Check:
        (check,) = (check for check in checks(self.config, self.outputs) if check.name == name)
        return check


def fly(
    folder: Path, model: Path, rows: Rows, kind: str = "conversations", *, template: str = PICKY_TEMPLATE,
    compute: dict[str, Any] | None = None, checks: dict[str, Any] | None = None, **config: Any,
) -> Flight:  # fmt: skip
    """Run the stage's function on rows."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    source = write_rows(folder / "rows.parquet", rows)
    settings = PreflightSettings(**{"dry_run": False} | (checks or {}))
    chosen = PreflightConfig(**{"kind": kind, "max_length": 128, "overlong": "truncate", "settings": settings} | config)
    machinery = ComputeSettings(**{"device": "cpu", "num_threads": 1} | (compute or {}))
    context = StageContext(folder / "out", folder / "work", machinery, lambda *args, **kwargs: None)
    inputs = PreflightInputs(model=str(model), dataset=str(source), chat_template=template)
    try:
        outputs, _ = STAGES["preflight"].function(chosen, inputs, context)
        return Flight(chosen, outputs, "", folder / "out")
    except ValueError as error:
        report = json.loads((folder / "work" / "logs" / "report.json").read_text())
        return Flight(chosen, PreflightOutputs.model_validate(report["outputs"]), str(error), folder / "work")


PPO: dict[str, Any] = {"algorithm": "ppo", "num_steps": None, "num_generations": None, "num_episodes": 64}


def prompts(count: int) -> Rows:
    return [
        {"prompt": [turn("user", f"What is {i} plus {i % 7}?")], "verifier": "gsm8k", "ground_truth": f"{i}"}
        for i in range(count)
    ]


def distinct_pairs(count: int) -> Rows:
    return [row for row in small_runs.pairs(count + 1) if row["chosen"] != row["rejected"]][:count]


# --- Counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("max_length", [10, 30, 45, 200])
def test_every_source_row_is_accounted_for(model: Path, tmp_path: Path, max_length: int, overlong: str) -> None:
    tokenizer = build_tokenizer()
    for kind, rows in (("conversations", small_runs.conversations(24)), ("pairs", small_runs.pairs(24))):
        turns = "messages" if kind == "conversations" else "prompt"
        rows = [*rows[:7], {**rows[7], "id": "bad", turns: [NOT_RENDERED]}, *rows[7:]]
        free = {"max_overlong_share": 1, "max_faulty_share": 1, "max_unstable_share": 1}
        flight = fly(tmp_path / kind, model, rows, kind, max_length=max_length, overlong=overlong, checks=free)
        counts = flight.outputs
        assert counts.num_source_rows == 25 and counts.num_malformed == 1
        assert counts.num_rows + counts.num_dropped + counts.num_empty + counts.num_malformed == 25
        if overlong == "drop":
            assert counts.num_dropped == counts.num_overlong and counts.num_truncated == 0
        else:
            assert counts.num_dropped == 0 and counts.num_truncated <= counts.num_overlong
            assert counts.num_overlong <= counts.num_truncated + counts.num_empty
        assert overlong_share(counts) == counts.num_overlong / 25
        # Against lengths that are counted here.
        sides = ("messages",) if kind == "conversations" else ("chosen", "rejected")
        whole = [
            max(len(tokenizer.apply_chat_template(row.get("prompt", []) + row[side])["input_ids"]) for side in sides)
            for row in rows if "bad" not in row["id"]
        ]  # fmt: skip
        assert counts.num_overlong == sum(length > max_length for length in whole)
        assert counts.lengths.percentiles["100"] == max(whole) and sum(counts.lengths.histogram) == 24
        if not counts.num_rows:
            assert "none of 25" in flight.error
            continue
        written = flight.rows
        assert len(written) == counts.num_rows and 7 not in [row["row"] for row in written]
        names = ["input_ids"] if kind == "conversations" else ["prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids"]
        assert counts.num_tokens == sum(len(row[name]) for row in written for name in names)
        assert counts.longest <= max_length


def test_prompts_of_rlvr_are_kept_as_they_are_or_dropped(model: Path, tmp_path: Path) -> None:
    rows = prompts(10)
    rows[4]["prompt"][0]["content"] = "word " * 200
    flight = fly(tmp_path, model, rows, "prompts", overlong="drop")
    source = read_rows(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "out" / "rows.parquet") == source[:4] + source[5:]
    assert source[5]["ground_truth"] == "5"
    assert (flight.outputs.num_dropped, flight.outputs.num_overlong, flight.outputs.num_trained_tokens) == (1, 1, 0)


def test_a_row_that_is_not_rendered_costs_its_batch_nothing(model: Path, tmp_path: Path) -> None:
    good = small_runs.conversations(30)
    bad: Rows = [{"messages": [NOT_RENDERED]}, {"messages": []}, {"messages": [ASKED, NOT_RENDERED]}] * 2
    rows = [row for i, row in enumerate(good) for row in ([bad[i], row] if i < len(bad) else [row])]
    flight = fly(tmp_path / "mixed", model, rows, checks={"max_faulty_share": 1})
    alone = fly(tmp_path / "alone", model, good)
    assert flight.outputs.num_malformed == len(bad) and flight.outputs.first_rows["num_malformed"] == (0, 2, 4)
    assert [row["input_ids"] for row in flight.rows] == [row["input_ids"] for row in alone.rows]
    assert flight.outputs.num_trained_tokens == alone.outputs.num_trained_tokens
    assert fly(tmp_path / "strict", model, rows).error.startswith("6 of 36 rows (16.67 %) are not rendered")


@given(st.lists(st.integers(0, 3000), max_size=60))
def test_percentiles_and_histogram(lengths: list[int]) -> None:
    report = length_report(lengths)
    assert sum(report.histogram) == len(lengths) and len(report.histogram) <= 42
    ranked = sorted(lengths)
    for percent in PERCENTILES:
        value = report.percentiles[str(percent)]
        if lengths:
            assert value in ranked
            assert 100 * sum(length <= value for length in ranked) >= percent * len(ranked)
            assert 100 * sum(length < value for length in ranked) < percent * len(ranked)


def test_length_report_by_hand() -> None:
    report = length_report([*range(1, 101)])
    assert report.mean == 50.5 and report.percentiles["5"] == 5 and report.percentiles["99"] == 99
    assert report.bin_width == 5 and report.histogram[:2] == (4, 5) and report.histogram[-1] == 1
    assert length_report([]).percentiles["50"] == 0


# --- Checks -------------------------------------------------------------------------------------------------------


def test_good_rows_pass_every_check(model: Path, tmp_path: Path) -> None:
    for kind, rows in (("conversations", small_runs.conversations(20)), ("pairs", distinct_pairs(20))):
        flight = fly(tmp_path / kind, model, rows, kind)
        assert {check.name: check.status for check in checks(flight.config, flight.outputs)
                if check.status != "ok"} == {}  # fmt: skip


def replaced(rows: Rows, wanted: int, messages: list[dict[str, str]]) -> Rows:
    return [*rows[:wanted], {"messages": messages}, *rows[wanted + 1 :]]


@pytest.mark.parametrize(
    ("name", "messages", "field", "status"),
    [
        ("Length", [ASKED, turn("assistant", "word " * 100)], "num_overlong", "fails"),
        ("eos cut off", [ASKED, turn("assistant", "word " * 100)], "num_eos_lost", "noticed"),
        ("Trained tokens", [turn("user", "word " * 100), turn("assistant", "3")], "num_empty", "fails"),
        ("Template renders", [ASKED, NOT_RENDERED], "num_malformed", "fails"),
        ("Special tokens in the data", [turn("user", f"a{EOS}"), turn("assistant", "3")], "num_special", "noticed"),
        ("Special tokens in the data", [ASKED, turn("assistant", f"a{PAD}b")], "num_special_trained", "noticed"),
        ("Headers in the data", [turn("user", "<|user|>"), turn("assistant", "3")], "num_headers", "noticed"),
        ("Duplicates", small_runs.conversations(1)[0]["messages"], "num_duplicates", "noticed"),
    ],
)
def test_a_finding_names_its_row(
    model: Path, tmp_path: Path, name: str, messages: Any, field: str, status: str
) -> None:
    strict = {"max_overlong_share": 0.01, "max_unstable_share": 0}
    flight = fly(tmp_path, model, replaced(small_runs.conversations(20), 13, messages), max_length=80, checks=strict)
    assert getattr(flight.outputs, field) == 1 and flight.outputs.first_rows[field] == (13,)
    check = flight.check(name)
    assert (check.status, check.rows) == (status, (13,)) and check.found.startswith("1 of 20 rows (5.00 %)")
    assert (check.found in flight.error) == (status == "fails")
    assert "Row 13: " in flight.page


def test_pairs_with_equal_sides(model: Path, tmp_path: Path) -> None:
    rows = distinct_pairs(20)
    same = [turn("assistant", "the same")]
    rows[3] = {**rows[3], "chosen": same, "rejected": same}
    # These differ behind the cut only.
    rows[5] |= {"chosen": [turn("assistant", "so " * 80 + "a")], "rejected": [turn("assistant", "so " * 80 + "b")]}
    flight = fly(tmp_path / "strict", model, rows, "pairs", max_length=60)
    assert flight.outputs.first_rows["num_equal"] == (3, 5) and flight.check("Sides differ").status == "fails"
    assert "gradient 0" in flight.error
    relaxed = fly(tmp_path / "relaxed", model, rows, "pairs", max_length=60, checks={"max_faulty_share": 0.1})
    assert relaxed.check("Sides differ").status == "noticed" and not relaxed.error


def test_every_problem_is_said_at_once(model: Path, tmp_path: Path) -> None:
    rows = small_runs.conversations(20)
    for number, content in ((2, "word " * 100), (3, "word " * 100), (4, "word " * 100)):
        rows = replaced(rows, number, [ASKED, turn("assistant", content)])
    rows = replaced(rows, 5, [ASKED, NOT_RENDERED])
    flight = fly(tmp_path, model, rows, max_length=80)
    assert "3 of 20 rows (15.00 %) are longer than max_length 80 and cut (rows 2, 3, 4)" in flight.error
    assert "allowed: preflight.max_overlong_share 0.1" in flight.error and "raise max_length" in flight.error
    assert "1 of 20 rows (5.00 %) are not rendered by the chat template and left out (rows 5)" in flight.error
    assert str(tmp_path / "work" / "logs" / "report.html") in flight.error and 'class="bad' in flight.page
    assert not (tmp_path / "out" / "logs").exists()


def test_a_template_that_trains_no_eos_fails(model: Path, tmp_path: Path) -> None:
    template = TULU_TEMPLATE.replace("message['content'] + eos_token", "message['content']")
    flight = fly(tmp_path, model, small_runs.conversations(6), template=template)
    assert flight.outputs.num_without_eos == 6 and flight.check("Ends in eos").status == "fails"
    assert "never learns to stop" in flight.error


def test_a_template_that_writes_bos_twice_fails(model: Path, tmp_path: Path) -> None:
    template = "{{- bos_token + bos_token -}}\n" + TULU_TEMPLATE
    flight = fly(tmp_path, model, small_runs.conversations(6), template=template)
    assert flight.outputs.num_two_bos == 6 and flight.check("One bos").status == "fails"


def test_a_tokenizer_that_adds_a_second_bos_is_noticed(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = build_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer.save_pretrained(model)
    template = "{{- bos_token -}}\n" + TULU_TEMPLATE
    flight = fly(tmp_path / "flight", model, small_runs.conversations(6), template=template)
    assert flight.outputs.num_two_bos == 0 and flight.outputs.tokenizer is not None
    assert flight.outputs.tokenizer.adds_bos and flight.check("bos of the tokenizer").status == "noticed"


def test_a_template_that_asks_otherwise_than_it_trains_fails(model: Path, tmp_path: Path) -> None:
    template = TULU_TEMPLATE.replace("add_generation_prompt -%}\n{{- '<|assistant|>\\n' -}}",
                                     "add_generation_prompt -%}\n{{- '<|assistant|> ' -}}")  # fmt: skip
    assert template != TULU_TEMPLATE
    flight = fly(tmp_path, model, small_runs.conversations(6), template=template)
    assert flight.outputs.num_unstable == 6 and flight.check("Prompt as in generation").status == "fails"


def test_positions_and_vocabulary_of_the_model(model: Path, tmp_path: Path) -> None:
    rows = small_runs.conversations(6)
    assert fly(tmp_path / "a", model, rows, max_length=300).check("Positions").status == "noticed"
    long = replaced(rows, 2, [ASKED, turn("assistant", "word " * 300)])
    free = {"max_overlong_share": 1}
    flight = fly(tmp_path / "b", model, long, max_length=300, checks=free)
    assert flight.check("Positions").status == "fails" and "256 positions" in flight.error
    answers = training_of("rlvr", max_completion_length=250)
    assert fly(tmp_path / "c", model, prompts(4), **answers).check("Positions").status == "fails"

    smaller = build_tiny_model(tmp_path / "model")
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    weights = load_file(smaller / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:258].contiguous()
    save_file(weights, smaller / "model.safetensors", {"format": "pt"})
    flight = fly(tmp_path / "d", smaller, rows)
    assert flight.outputs.num_beyond_embeddings == 6 and flight.check("Vocabulary").status == "noticed"


@pytest.mark.parametrize(("changes", "num_rollouts", "num_needed", "raised"), [
    ({"effective_batch_size": 32, "num_generations": 8}, 32, 4, "num_generations"),
    ({"effective_batch_size": 16, "num_generations": 8, "steps_per_generation": 2}, 32, 4, "num_generations"),
    ({"algorithm": "rloo", "effective_batch_size": 8, "num_generations": 2}, 8, 4, "num_generations"),
    (PPO | {"effective_batch_size": 4}, 4, 4, "num_samples_per_prompt"),
    (PPO | {"effective_batch_size": 4, "num_minibatches": 2, "num_samples_per_prompt": 2}, 8, 4, "num_samples_per"),
])  # fmt: skip
def test_fewer_prompts_than_a_batch_of_rollouts_needs(
    model: Path, tmp_path: Path, changes: dict[str, Any], num_rollouts: int, num_needed: int, raised: str
) -> None:
    """Such a training had no step, and said that it was stopped and to run it again."""
    training = training_of("rlvr", **changes)
    few = fly(tmp_path / "few", model, prompts(num_needed - 1), **training)
    assert (
        f"{num_needed - 1} prompts are left, and a batch of {num_rollouts} rollouts needs {num_needed} different ones; "
        f"allowed: at least {num_needed}; lower effective_batch_size, raise {raised}"
    ) in few.error
    assert few.check("Prompts of a step").status == "fails" and "Prompts of a step" in few.page
    enough = fly(tmp_path / "enough", model, prompts(num_needed), **training)
    assert not enough.error and enough.check("Prompts of a step").status == "ok"
    # A cached preflight of the same rows is asked for this training too.
    assert len(STAGES["preflight"].gate_failures(few.config, few.outputs, {})) == 1  # type: ignore[misc]


@pytest.mark.parametrize(("held_out", "said"), [
    ({"num_prompts": 9}, "needs 4 different ones, beside 9 that are held out; allowed: at least 13"),
    ({"num_prompts": 2, "kinds": ["gsm8k"]}, "beside 14 that are held out; allowed: at least 18"),
    ({"num_prompts": 8, "kinds": ["math"]}, "no prompt is of kind math, which rlvr.held_out.kinds names"),
    ({"num_prompts": 8}, ""),
])  # fmt: skip
def test_held_out_prompts_must_be_there(model: Path, tmp_path: Path, held_out: dict[str, Any], said: str) -> None:
    """Before SFT, not days later."""
    training = training_of("rlvr", effective_batch_size=32, num_generations=8, held_out={"every_steps": 1, **held_out})
    flight = fly(tmp_path, model, prompts(12), **training)
    assert said in flight.error and bool(flight.error) == bool(said) and flight.outputs.kinds == {"gsm8k": 12}


def test_a_fall_of_few_prompts_of_held_out_kinds_says_nothing(model: Path, tmp_path: Path) -> None:
    """Three of three lost are p = 1/4: the limit would never end a run."""
    rows = [*prompts(20), *({**row, "id": f"1:{i}", "verifier": "math"} for i, row in enumerate(prompts(3)))]
    held_out = {"every_steps": 1, "num_prompts": 8, "kinds": ["math"], "max_kinds_drop": 0.1}
    training = training_of("rlvr", effective_batch_size=32, num_generations=8, num_steps=9, held_out=held_out)
    flight = fly(tmp_path, model, rows, **training)
    assert "3 prompts are of held-out kinds" in flight.error and "at least 8" in flight.error


# --- Dry run ------------------------------------------------------------------------------------------------------


KINDS = {"sft": "conversations", "dpo": "pairs", "reward_model": "pairs", "rlvr": "prompts"}


def rows_for(subject: str, count: int) -> Rows:
    return {"sft": small_runs.conversations, "rlvr": prompts}.get(subject, distinct_pairs)(count)


def training_of(subject: str, **changes: Any) -> dict[str, Any]:
    """What the config of a preflight says of the training that it is for."""
    settings = {"learning_rate": 1e-3, "effective_batch_size": 4, "precision": "float32"}
    if subject == "rlvr":
        settings |= {"max_prompt_length": 128, "max_completion_length": 20}
        settings |= {} if changes.get("algorithm") == "ppo" else {"num_steps": 9, "num_generations": 4}
    else:
        settings |= {"max_length": 128}
    settings = {name: value for name, value in (settings | changes).items() if value is not None}
    made = STAGES[subject].config.model_validate(settings)
    return {"kind": KINDS[subject], "subject": subject, "training_settings": made.model_dump(mode="json")}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("subject", list(KINDS))
def test_dry_run_of_every_stage(model: Path, tmp_path: Path, subject: str, packing: bool) -> None:
    compute = {
        "packing": packing, "activation_checkpointing": not packing, "per_device_train_batch_size": 1,
        "stages": {subject: StageCompute(per_device_train_batch_size=2)},
    }  # fmt: skip
    options = {"compute": compute} | training_of(subject)
    with_run = fly(tmp_path / "a", model, rows_for(subject, 12), checks={"dry_run": True}, **options)
    without = fly(tmp_path / "b", model, rows_for(subject, 12), **options)
    run = with_run.outputs.dry_run
    assert run is not None and not with_run.error
    assert (run.subject, run.device, run.precision) == (subject, "cpu", "float32")
    assert (run.per_device_train_batch_size, run.asked_batch_size) == (2, 2)
    assert run.packing == (packing and subject != "rlvr") and run.activation_checkpointing != packing
    assert run.seconds > 0 and run.peak_memory_bytes >= 0
    assert with_run.outputs.disk_bytes is not None and "Disk of the training" in with_run.page
    if subject == "sft":
        lengths = sorted(len(row["input_ids"]) for row in with_run.rows)
        assert run.num_tokens == sum(lengths[-2:])
    if subject == "rlvr":
        assert run.num_tokens == 2 * (with_run.outputs.longest + 20)
    assert sorted(path.name for path in (tmp_path / "a" / "work").iterdir()) == ["parts"]
    # It changes no row and no key.
    assert without.outputs == with_run.outputs.model_copy(update={"dry_run": None})
    digests = {hashlib.sha256((f.folder / f.outputs.file).read_bytes()).hexdigest() for f in (with_run, without)}
    assert len(digests) == 1
    assert scientific(with_run.config) == scientific(without.config) == scientific(
        PreflightConfig(kind=KINDS[subject], max_length=128, overlong="truncate")
    )  # fmt: skip


@pytest.mark.parametrize("subject", ["sft", "dpo"])
def test_dry_run_trains_the_adapter_where_the_training_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    """Else a model that LoRA is chosen for, because training all of it does not fit, could not pass."""
    import torch

    trained: list[int] = []

    class Watched(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            trained.append(sum(value.numel() for group in groups for value in group["params"]))
            super().__init__(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    rows = rows_for(subject, 4)
    for lora in (None, {"r": 4}):
        options = training_of(subject, lora=lora)
        flight = fly(tmp_path / str(lora), model, rows, checks={"dry_run": True}, **options)
        run = flight.outputs.dry_run
        assert run is not None and run.lora_r == (lora and 4)
        assert ("LoRA of rank 4" if lora else "every weight") in flight.page
    num_all = sum(value.numel() for value in load_file(model / "model.safetensors").values())
    # Per layer q, k, v, o of 32 x 32 and gate, up, down of 32 x 64: r x (in + out) each.
    assert trained == [num_all, 2 * 4 * (4 * 64 + 3 * 96)]


def test_dry_run_takes_what_costs_most(model: Path, tmp_path: Path) -> None:
    for number, (kind, rows) in enumerate((("conversations", small_runs.conversations(30)),
                                           ("pairs", distinct_pairs(30)))):  # fmt: skip
        flight = fly(tmp_path / str(number), model, rows, kind)
        file, written = flight.folder / flight.outputs.file, flight.rows

        def cost(row: dict[str, Any], packed: bool) -> int:
            if "input_ids" in row:
                return len(row["input_ids"])
            prompt, chosen, rejected = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            return prompt + chosen + rejected if packed else 2 * (prompt + max(chosen, rejected))

        for packed in (True, False):
            costs = [cost(row, packed) for row in dry_run._longest(file, 4, packed).to_pylist()]
            assert costs == sorted((cost(row, packed) for row in written), reverse=True)[:4]
        assert len(dry_run._longest(file, 99, True)) == 30


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    step = dry_run.Step(loss=2.0, grad_norm=1.0, num_tokens=7, seconds=1.0)
    monkeypatch.setattr(dry_run, "device_of", lambda compute: "cuda")
    monkeypatch.setattr(dry_run, "_measured", lambda train, device: (step, 8))
    monkeypatch.setattr(dry_run, "_free", lambda device: None)


def test_dry_run_on_a_gpu_names_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: all that would touch it is set aside, what is written about it stays."""
    import torch

    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    options = {"checks": {"dry_run": True}} | training_of("sft")
    run = fly(tmp_path, model, small_runs.conversations(4), **options).outputs.dry_run
    assert run is not None and (run.device, run.num_tokens, run.peak_memory_bytes) == ("a GPU", 7, 8)


def test_memory_of_rollouts_by_hand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-1.7B: 24 layers, 32 heads of 64; and the tiny model through the stage."""
    import torch

    smollm2 = {"num_hidden_layers": 24, "num_attention_heads": 32, "hidden_size": 2048}
    assert kv_bytes(smollm2, 32, 4096, 2) == 32 * 4096 * 24 * 2 * 2048 * 2
    grouped = smollm2 | {"num_key_value_heads": 8, "head_dim": 128}
    assert kv_bytes(grouped, 1, 1, 4) == 24 * 2 * 8 * 128 * 4

    options: dict[str, Any] = training_of("rlvr", beta=0.1, steps_per_generation=2) | {"checks": {"dry_run": True}}
    flight = fly(tmp_path / "cpu", model, prompts(4), **options)
    run = flight.outputs.dry_run
    weights = 4 * sum(value.numel() for value in load_file(model / "model.safetensors").values())
    longest = flight.outputs.longest + 20
    # Weights, two moments, reference; two layers, whose two heads of keys and values have 16 dimensions each.
    config = json.loads((model / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    assert run is not None and run.generation_bytes == 4 * weights + 8 * longest * 2 * 2 * width * 4
    assert "rollouts are generated" in flight.page

    # A GPU that has less is refused, before anything is trained.
    pretend_a_gpu(monkeypatch)
    small = types.SimpleNamespace(total_memory=run.generation_bytes - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    refused = fly(tmp_path / "cuda", model, prompts(4), **options)
    assert "rlvr: 8 rollouts of up to" in refused.error and "lower max_completion_length" in refused.error


def test_a_preflight_that_is_made_again_has_the_same_content(model: Path, tmp_path: Path) -> None:
    """Seconds, memory and thresholds differ; if they counted, all trainings would be made again."""
    rows = small_runs.conversations(4)
    digests = {
        records_digest(folder_records(fly(tmp_path / str(share), model, rows, checks={"max_overlong_share": share})
                                      .folder))
        for share in (0.5, 0.6)
    }  # fmt: skip
    assert len(digests) == 1


def test_a_cached_preflight_is_held_against_todays_thresholds(model: Path, tmp_path: Path) -> None:
    """They are in no key: without this a tightened one would change nothing."""
    store, template = Store(tmp_path / "store"), TULU_TEMPLATE
    source = write_rows(tmp_path / "rows.parquet", small_runs.conversations(4))
    inputs = PreflightInputs(model=str(model), dataset=str(source), chat_template=template)
    compute = ComputeSettings(device="cpu", num_threads=1, min_free_disk_gb=0, launcher="inline")

    def asked(share: float) -> Job:
        checks = PreflightSettings(max_overlong_share=share, dry_run=False)
        config = PreflightConfig(kind="conversations", max_length=40, overlong="truncate", settings=checks)
        spec = Spec(stage="preflight", version=1, config=scientific(config), inputs={}, externals={})
        return Job("preflight-sft", STAGES["preflight"], config, compute, spec, inputs)

    assert asked(1.0).spec == asked(0.1).spec
    assert run_stage(asked(1.0), store, logging.getLogger("test")).outcome == "Completed"
    assert run_stage(asked(1.0), store, logging.getLogger("test")).outcome == "Cached"
    with pytest.raises(ValueError, match=r"preflight-sft: .* by today's thresholds: .*max_length 40.*_share 0\.1"):
        run_stage(asked(0.1), store, logging.getLogger("test"))


@pytest.mark.parametrize("most", [3, 1, 0])
def test_out_of_memory_halves_the_batch_until_it_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A CPU is never out of memory in a way that can be caught, so the error is raised in the place of CUDA's."""
    import torch
    import transformers

    real, tried, models = transformers.Trainer.training_step, [], []

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        rows = trainer.args.per_device_train_batch_size
        if not tried or tried[-1] != rows:
            assert [old() for old in models] == [None] * len(models), "the model of the try before is still there"
            tried.append(rows)
            models.append(weakref.ref(model))
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss: torch.Tensor = real(trainer, model, inputs, *args)
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    config: dict[str, Any] = training_of("sft", effective_batch_size=8) | {
        "compute": {"per_device_train_batch_size": 8},
        "checks": {"dry_run": True},
    }
    if most == 0:
        flight = fly(tmp_path, model, small_runs.conversations(12), **config)
        assert tried == [8, 4, 2, 1] and flight.outputs.dry_run is None
        assert "out of memory with one of the longest rows alone (" in flight.error and "Not made" in flight.page
        assert ", add a sft.lora block, or take a larger device" in flight.error
        return
    flight = fly(tmp_path, model, small_runs.conversations(12), **config)
    run = flight.outputs.dry_run
    assert run is not None and run.asked_batch_size == 8
    assert (tried, run.per_device_train_batch_size) == (([8, 4, 2], 2) if most == 3 else ([8, 4, 2, 1], 1))
    check = flight.check("Memory")
    assert check.status == "noticed" and f"{run.per_device_train_batch_size} fit" in check.found


def test_one_device_may_be_too_small_for_a_sharded_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    import transformers

    def training_step(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    for kind in ("fsdp2", "ddp"):
        config: dict[str, Any] = training_of("sft", effective_batch_size=8) | {
            "compute": {"num_processes": 2, "parallel": kind}, "checks": {"dry_run": True},
        }  # fmt: skip
        flight = fly(tmp_path / kind, model, small_runs.conversations(8), **config)
        assert bool(flight.error) == (kind == "ddp") and flight.outputs.dry_run is None
    assert caplog.text.count("compute.parallel fsdp2 divides the training among 2") == 1


def test_the_tokenizers_threads_are_as_before(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    fly(tmp_path, model, small_runs.conversations(3), compute={"num_threads": 2})
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and "RAYON_NUM_THREADS" not in os.environ


# --- Planned steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"num_train_epochs": 1.5}, {"max_tokens": 700}, {"max_steps": 2}])
def test_planned_steps_are_those_that_the_trainer_takes(model: Path, tmp_path: Path, budget: dict[str, Any]) -> None:
    rows = small_runs.conversations(10)
    flight = fly(tmp_path / "flight", model, rows)
    planned = Budget(effective_batch_size=4, **budget).num_steps(flight.outputs.num_rows, flight.outputs.num_tokens)
    settings = {"effective_batch_size": 4, **budget}
    done = small_runs.run("sft", tmp_path / "training", model, rows, settings, save_steps=100)
    assert done.outputs.num_steps == planned


def test_a_token_budget_on_no_rows_is_no_division_by_zero(model: Path, tmp_path: Path) -> None:
    rows = [{"id": "bad", "messages": [{"role": "user", "content": "hi"}]}]
    flight = fly(tmp_path, model, rows, **training_of("sft", max_tokens=700))
    assert "none of 1 rows has anything to train on" in flight.error and "Planned steps" not in flight.page


# --- Report -------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags, what is loaded from elsewhere, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("kind", ["conversations", "pairs", "prompts"])
def test_the_page_loads_nothing_and_escapes_everything(model: Path, tmp_path: Path, kind: str) -> None:
    rows = {"conversations": small_runs.conversations, "prompts": prompts}.get(kind, distinct_pairs)(12)
    said = [turn("user", NASTY + EOS), turn("assistant", NASTY)]
    rows[0] |= {"messages": said} if kind == "conversations" else {"prompt": said[:1]}
    if kind == "conversations":
        flight = fly(tmp_path, model, rows, checks={"dry_run": True}, **training_of("sft"))
    else:
        training = training_of("rlvr", num_steps=3) if kind == "prompts" else training_of("dpo")
        flight = fly(tmp_path, model, rows, max_length=250, **training)
    page = _Page(flight.page)
    assert not {"script", "img", "link", "iframe"} & set(page.tags) and page.loaded == []
    assert "default-src 'none'" in flight.page and "\u202e" not in flight.page
    # Token by token, and as the row that spells a special token.
    assert "<script>alert(1)</script>" in page.words and "Row 0: special" in page.words
    assert ("trained" in flight.page.split("</style>")[1]) and 'class="bar"' in flight.page
    assert "Planned steps" in page.words and "3, effective batch 4" in page.words
    report = json.loads((flight.folder / "logs" / "report.json").read_text())
    assert {check["status"] for check in report["checks"]} <= {"ok", "noticed", "fails"}
    assert report["outputs"] == flight.outputs.model_dump(mode="json")


def test_trained_tokens_are_marked(model: Path, tmp_path: Path) -> None:
    flight = fly(tmp_path, model, [{"messages": [turn("user", "cat"), turn("assistant", "3")]}])
    tokens = flight.page.partition('<pre class="tokens">')[2].partition("</pre>")[0]
    assert tokens.endswith('<span class="t trained">3</span><span class="t trained">&lt;|endoftext|&gt;</span>')
    assert tokens.count("trained") == 2


def test_a_run_shows_one_line_a_training(model: Path, tmp_path: Path) -> None:
    from tests.tasks.report.test_report import sample_run

    flight = fly(tmp_path / "flight", model, small_runs.conversations(12), max_length=60)
    outputs = flight.outputs.model_dump(mode="json")
    summary, manifests, _, _ = sample_run(tmp_path / "store")
    spec = manifests["sft"].spec.model_copy(update={"stage": "preflight"})
    made = {"preflight-sft": manifests["sft"].model_copy(update={"spec": spec, "outputs": outputs})}
    stages = tuple(
        StageRun(node=node, stage="preflight", outcome="Completed") for node in ("preflight-sft", "preflight-dpo")
    )
    summary = summary.model_copy(update={"stages": stages})
    section = html_report(summary, made, {}, "").partition('<section id="preflight">')[2].partition("</section>")[0]
    assert "12 of 12" in section and f"{flight.outputs.num_tokens:,}" in section and section.count("<tr>") == 2
    assert '<section id="preflight">' not in html_report(summary, {}, {}, "")

    reference = ArtifactReference(
        stage="preflight", node="preflight-sft", key="ab" * 32, digest="", path="", outputs=outputs, metrics={}
    )
    table = {row["metric"]: row["value"] for row in stage_table(reference, PreflightOutputs)}
    assert table["Rows"] == "12 of 12" and table["Trained"].endswith(" %")


# --- Real rows ----------------------------------------------------------------------------------------------------


def test_real_rows(model: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data")) / "train"
    if not folder.is_dir():
        pytest.skip(f"no real data under {folder}; SMOLTULU_REAL_DATA names it")
    with gzip.open(folder / "oasst_octopack.jsonl.gz", "rt") as stream:
        read = [json.loads(line) for line in stream]
    rows = [{"messages": [turn("user", row["prompt"]), turn("assistant", row["completion"])]} for row in read]
    flight = fly(tmp_path, model, rows, max_length=4096, checks={"max_unstable_share": 1, "max_overlong_share": 1})
    counts = flight.outputs
    assert counts.num_source_rows == len(rows) and counts.num_without_eos == counts.num_malformed == 0
    assert counts.num_rows + counts.num_empty == len(rows)
    assert 0 < counts.num_trained_tokens < counts.num_tokens
