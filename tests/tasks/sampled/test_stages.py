"""Samples, scores and rows of a real, untrained model: resume bit for bit, draws that nothing else changes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.sampled import (
    SampledRowsConfig,
    SampledRowsInputs,
    SamplesConfig,
    SampleScoresConfig,
    SampleScoresInputs,
    SamplesInputs,
    SelectionRules,
)
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.evaluation.pair_accuracy import reward_scores
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.loop import nucleus
from smoltulu.tasks.job import Job
from smoltulu.tasks.models.classifiers import load_reward_model
from smoltulu.tasks.models.folders import load_language_model, load_tokenizer
from smoltulu.tasks.models.tokens import conversations, prompt_ids
from smoltulu.tasks.sampled import parts
from smoltulu.tasks.sampled.rows import choose_rows
from smoltulu.tasks.sampled.samples import write_samples
from smoltulu.tasks.sampled.scores import score_samples
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.verifiers import grade
from tests import ROOT
from tests.rows_file import write_rows
from tests.small_runs import conversations as sft_rows
from tests.small_runs import pairs as preference_rows
from tests.tiny_model import PICKY_TEMPLATE, REFUSED, TULU_TEMPLATE, build_tiny_model

#: A random model writes random bytes: some have a comma, some do not.
NO_COMMAS = json.dumps({"func_name": "validate_no_commas"})


def prompts(num: int = 11) -> list[dict[str, Any]]:
    return [
        {
            "id": f"0:{i}", "prompt": [{"role": "user", "content": "so " * (i % 5) + f"What is {i} plus {i}?"}],
            "verifier": "ifeval", "ground_truth": NO_COMMAS,
        }
        for i in range(num)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fifth token ends an answer, or a random model would hardly ever end one."""
    folder = build_tiny_model(tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("rewards"), seed=1, num_labels=1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_PROMPTS", 4)


def config(**changes: Any) -> SamplesConfig:
    usual = {
        "writer": "sft", "num_samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0,
        "precision": "float32",
    }  # fmt: skip
    return SamplesConfig(**usual | changes)


def context(folder: Path, batch: int = 8) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    compute = ComputeSettings(device="cpu", num_threads=1, per_device_eval_batch_size=batch)
    return StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)


def sample(
    folder: Path, model: Path, rows: list[dict[str, Any]], batch: int = 8, template: str = TULU_TEMPLATE, **changes: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """Outputs, and the lines of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_rows(folder / "rows.parquet", rows)
    inputs = SamplesInputs(model=str(model), dataset=str(file), chat_template=template)
    outputs, _ = write_samples(config(**changes), inputs, context(folder, batch))
    return outputs, parquet.read_table(folder / "out" / outputs.file).to_pylist()


def scored(
    folder: Path, samples: Path, reward_model: Path | None = None, verifier: bool = True
) -> tuple[Any, list[dict[str, Any]]]:
    precision = {"reward_precision": "float32"} if reward_model else {}
    inputs = SampleScoresInputs(
        samples=str(samples), reward_model=reward_model and str(reward_model), chat_template=TULU_TEMPLATE
    )
    outputs, _ = score_samples(SampleScoresConfig(verifier=verifier, **precision), inputs, context(folder))
    return outputs, parquet.read_table(folder / "out" / outputs.file).to_pylist()


def rows_of(folder: Path, samples: Path, scores: Path, **rules: Any) -> tuple[Any, list[dict[str, Any]]]:
    settings = SampledRowsConfig(rules=SelectionRules(**{"score": "verifier", "make": "pairs", **rules}), writer="sft")
    inputs = SampledRowsInputs(samples=str(samples), scores=str(scores))
    outputs, _ = choose_rows(settings, inputs, context(folder))
    return outputs, list(stored_rows(folder / "out" / outputs.file))


# ------------------------------------------------------------------------------------------------------------ samples


def test_a_model_answers_every_prompt(tmp_path: Path, model: Path) -> None:
    rows = prompts()
    outputs, lines = sample(tmp_path, model, rows)
    assert [line["id"] for line in lines] == [row["id"] for row in rows] and outputs.num_asked == 11
    assert all(line["prompt"] == row["prompt"] for line, row in zip(lines, rows, strict=True))
    assert all((line["verifier"], line["ground_truth"]) == ("ifeval", NO_COMMAS) for line in lines)
    written = [one for line in lines for one in line["samples"]]
    assert len(written) == 33 and outputs.num_written_tokens == sum(one["num_tokens"] for one in written)
    assert outputs.num_ended == sum(one["ended"] for one in written)
    assert all(one["ended"] or one["num_tokens"] == 12 for one in written)
    assert len({one["text"] for one in written}) > 30


def test_greedy_is_what_the_model_finds_likeliest(tmp_path: Path, model: Path) -> None:
    rows = prompts(3)
    _, lines = sample(tmp_path, model, rows, temperature=0.0, num_samples=1)
    tokenizer = load_tokenizer(model, TULU_TEMPLATE)
    network = load_language_model(model).eval()
    for line, ids in zip(lines, prompt_ids(tokenizer, [row["prompt"] for row in rows]), strict=True):
        made = list(ids)
        with torch.no_grad():
            for _ in range(12):
                made.append(int(network(torch.tensor([made])).logits[0, -1].argmax()))
                if made[-1] == tokenizer.eos_token_id:
                    break
        assert line["samples"][0]["text"] == tokenizer.decode(made[len(ids) :], skip_special_tokens=True)


def test_a_killed_stage_goes_on_and_ends_with_the_same_file(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prompts()
    sample(tmp_path / "whole", model, rows)
    calls: list[int] = []

    def counted(engine: Any, asked: Any, *args: Any) -> Any:
        calls.append(len(asked))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(engine, asked, *args)

    generate = TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "broken", model, rows)
    # A damaged part is made again, a whole one is not. Another batch size goes on with the same numbers.
    torn = min((tmp_path / "broken" / "work" / "parts").glob("0*/part.parquet"))
    torn.write_bytes(torn.read_bytes()[:-1])
    sample(tmp_path / "broken", model, rows, batch=3)
    assert sorted(calls[:3]) == [9, 12, 12] and len(calls) == 5
    whole, broken = (tmp_path / name / "out" / "samples.parquet" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    # Parts of other settings do not count.
    sample(tmp_path / "broken", model, rows, seed=1)
    assert len(calls) == 8


def test_a_process_that_is_killed_while_it_writes(tmp_path: Path, model: Path) -> None:
    """SIGKILL after the first part: no handler runs, nothing is tidied up."""
    rows = prompts(24)
    _, lines = sample(tmp_path / "whole", model, rows, num_samples=16, max_new_tokens=48)
    code = (
        "import sys; from pathlib import Path; import smoltulu.tasks.sampled.parts as parts; parts.PART_PROMPTS = 4\n"
        "from tests.tasks.sampled.test_stages import prompts, sample\n"
        "sample(Path(sys.argv[1]), Path(sys.argv[2]), prompts(24), num_samples=16, max_new_tokens=48)"
    )
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, "-c", code, str(broken), str(model)], cwd=ROOT, env=dict(os.environ))
    deadline = time.monotonic() + 100
    while not list(broken.glob("work/parts/0*/.complete")):
        assert time.monotonic() < deadline and process.poll() is None, "no part was written"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_whole = len(list(broken.glob("work/parts/0*/.complete")))
    assert num_whole < 6, "it was done before it was killed"
    _, again = sample(broken, model, rows, num_samples=16, max_new_tokens=48)
    assert again == lines
    assert (broken / "out" / "samples.parquet").read_bytes() == (tmp_path / "whole/out/samples.parquet").read_bytes()


def test_what_a_prompt_is_answered_depends_on_no_other(tmp_path: Path, model: Path) -> None:
    rows = prompts()
    _, lines = sample(tmp_path / "all", model, rows)
    by_id = {line["id"]: line for line in lines}
    assert sample(tmp_path / "ones", model, rows, batch=1)[1] == lines
    _, few = sample(tmp_path / "few", model, rows, num_prompts=5)
    assert len(few) == 5 and all(line == by_id[line["id"]] for line in few)
    # More samples begin with fewer.
    _, more = sample(tmp_path / "more", model, rows, num_samples=5)
    assert [line["samples"][:3] for line in more] == [line["samples"] for line in lines]
    assert sample(tmp_path / "other", model, rows, seed=1)[1] != lines


def test_two_processes_write_the_same_files(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_PROMPTS", 128)  # what a process of its own has
    rows = prompts(140)
    sample(tmp_path / "one", model, rows, num_samples=2)
    scored(tmp_path / "scores", tmp_path / "one" / "out" / "samples.parquet")
    compute = ComputeSettings(
        device="cpu", num_threads=1, per_device_eval_batch_size=8, num_processes=2, launcher="warm"
    )
    samples = tmp_path / "one" / "out" / "samples.parquet"
    jobs = {
        "samples": (config(num_samples=2), SamplesInputs(
            model=str(model), dataset=str(tmp_path / "one" / "rows.parquet"), chat_template=TULU_TEMPLATE
        ), samples),
        "sample_scores": (
            SampleScoresConfig(verifier=True), SampleScoresInputs(samples=str(samples)),
            tmp_path / "scores" / "out" / "scores.parquet",
        ),
    }  # fmt: skip
    for name, (settings, inputs, expected) in jobs.items():
        spec = Spec(stage=name, version=1, config=scientific(settings), inputs={}, externals={})
        work = tmp_path / "two" / name
        (work / "output").mkdir(parents=True)
        run_child(Job(name, STAGES[name], settings, compute, spec, inputs), work, work / "output", logging.getLogger())
        assert (work / "output" / expected.name).read_bytes() == expected.read_bytes()


def test_prompts_of_every_kind_of_rows(tmp_path: Path, model: Path) -> None:
    """Of a conversation, all before its last answer; of a pair, its prompt."""
    talks, ranked = sft_rows(4), preference_rows(4)
    _, lines = sample(tmp_path / "sft", model, talks)
    assert [line["prompt"] for line in lines] == [row["messages"][:-1] for row in talks]
    assert {line["verifier"] for line in lines} == {""}
    _, lines = sample(tmp_path / "pairs", model, ranked)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in ranked]


def test_prompts_that_are_not_asked_are_counted(tmp_path: Path, model: Path) -> None:
    rows = prompts(4)
    rows[1]["prompt"][0]["content"] = "so " * 300
    rows[2]["prompt"][0]["content"] = REFUSED
    rows.append(rows[0] | {"id": "0:4"})
    outputs, lines = sample(tmp_path, model, rows, template=PICKY_TEMPLATE)
    assert [line["id"] for line in lines] == ["0:0", "0:3"]
    assert (outputs.num_repeated, outputs.num_too_long, outputs.num_not_rendered) == (1, 1, 1)
    outputs, lines = sample(tmp_path / "short", model, prompts(), max_prompt_length=24)
    assert 0 < outputs.num_too_long < 11 and outputs.num_asked + outputs.num_too_long == 11


def test_samples_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        ValueError, match=r"max_new_tokens 256 leaves no room for a prompt: the model has 256 positions"
    ):
        sample(tmp_path / "a", model, prompts(1), max_new_tokens=256)
    with pytest.raises(
        ValueError, match=r"none of 2 prompts can be asked: 2 have more than 3 tokens.*raise max_prompt"
    ):
        sample(tmp_path / "b", model, prompts(2), max_prompt_length=3)
    file = write_rows(tmp_path / "empty.parquet", [], kind="rlvr")
    inputs = SamplesInputs(model=str(model), dataset=str(file), chat_template=TULU_TEMPLATE)
    with pytest.raises(ValueError, match="no rows whose prompts could be asked"):
        write_samples(config(), inputs, context(tmp_path / "c"))


def test_the_nucleus_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(
        nucleus(probabilities, 0.6), torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0.0]])
    )
    torch.testing.assert_close(nucleus(probabilities, 1e-9), torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]]))


def test_top_p_leaves_out_what_is_unlikely(tmp_path: Path, model: Path) -> None:
    """At a vanishing top_p only the likeliest token is left: samples are greedy."""
    rows = prompts(3)
    _, greedy = sample(tmp_path / "greedy", model, rows, temperature=0.0, num_samples=1)
    _, narrow = sample(tmp_path / "narrow", model, rows, top_p=1e-6)
    for one, several in zip(greedy, narrow, strict=True):
        assert [sample["text"] for sample in several["samples"]] == [one["samples"][0]["text"]] * 3
    assert sample(tmp_path / "wide", model, rows, top_p=0.5)[1] != sample(tmp_path / "all", model, rows)[1]


# ----------------------------------------------------------------------------------------------------- scores and rows


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_PROMPTS", 4)
        sample(folder, model, prompts(30), num_samples=8, max_new_tokens=24)
    return folder / "out" / "samples.parquet"


def test_scores_are_those_of_verifiers_and_reward_model(tmp_path: Path, written: Path, reward_model: Path) -> None:
    lines = parquet.read_table(written).to_pylist()
    outputs, scores = scored(tmp_path, written, reward_model)
    assert outputs.num_scored == 240 and sum(outputs.outcomes.values()) == 240 and outputs.num_without_reward == 0
    assert outputs.outcomes["right"] and outputs.outcomes["wrong"]
    tokenizer, network = load_tokenizer(reward_model, TULU_TEMPLATE), load_reward_model(reward_model).eval()
    for line, score in zip(lines[:3], scores[:3], strict=True):
        assert score["id"] == line["id"]
        for number, one in enumerate(line["samples"]):
            verdict = grade("ifeval", one["text"], NO_COMMAS)
            assert (score["outcomes"][number], score["reasons"][number]) == (verdict.outcome, verdict.reason)
            (whole,) = conversations(tokenizer, [[*line["prompt"], {"role": "assistant", "content": one["text"]}]])
            (expected,) = reward_scores(network, tokenizer, [whole.input_ids], batch_size=1)
            assert score["rewards"][number] == pytest.approx(expected, abs=1e-5)


def test_only_what_is_asked_for_is_scored(tmp_path: Path, written: Path, reward_model: Path) -> None:
    _, scores = scored(tmp_path / "a", written)
    assert all(len(line["outcomes"]) == 8 and line["rewards"] == [] for line in scores)
    outputs, scores = scored(tmp_path / "b", written, reward_model, verifier=False)
    assert all(line["outcomes"] == [] and len(line["rewards"]) == 8 for line in scores) and outputs.outcomes == {}


def test_scoring_goes_on_after_a_kill(
    tmp_path: Path, written: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(tmp_path / "whole", written, reward_model)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reward_scores(*args, **kwargs)

    monkeypatch.setattr("smoltulu.tasks.sampled.scores.reward_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "broken", written, reward_model)
    scored(tmp_path / "broken", written, reward_model)
    assert len(calls) == 3 + 6  # of eight parts, two were done
    whole, broken = (tmp_path / name / "out" / "scores.parquet" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()


def test_samples_of_before_there_were_tools_are_scored(tmp_path: Path, written: Path) -> None:
    """They took hours, and their key is the same."""
    table = parquet.read_table(written)
    older = tmp_path / "older.parquet"
    with (
        parquet.ParquetFile(written) as file,
        parquet.ParquetWriter(older, table.schema.remove(table.schema.get_field_index("whole_prompt"))) as writer,
    ):
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group).drop_columns(["whole_prompt"]))
    scored(tmp_path / "older", older)
    scored(tmp_path / "now", written)
    made = (tmp_path / name / "out" / "scores.parquet" for name in ("older", "now"))
    assert len({file.read_bytes() for file in made}) == 1


def test_scores_that_cannot_be_given(tmp_path: Path, model: Path, written: Path, reward_model: Path) -> None:
    sample(tmp_path / "sft", model, sft_rows(2))
    with pytest.raises(ValueError, match=r"prompts without a verifier cannot be graded, e\.g\. 0:0"):
        scored(tmp_path / "a", tmp_path / "sft" / "out" / "samples.parquet")
    with pytest.raises(ValueError, match="holds no samples of this version"):
        scored(tmp_path / "b", write_rows(tmp_path / "rows.parquet", prompts(1)))
    with pytest.raises(ValueError, match="not a reward model"):
        scored(tmp_path / "c", written, model)
    broken = load_reward_model(reward_model)
    broken.score.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "nan")
    load_tokenizer(reward_model, TULU_TEMPLATE).save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"scores of the reward model are NaN or infinite"):
        scored(tmp_path / "d", written, tmp_path / "nan")


def test_rows_and_where_they_are_from(tmp_path: Path, written: Path, reward_model: Path) -> None:
    _, scores = scored(tmp_path / "scores", written, reward_model)
    file = tmp_path / "scores" / "out" / "scores.parquet"
    samples = {line["id"]: line for line in parquet.read_table(written).to_pylist()}
    worth = {line["id"]: line for line in scores}
    for name, rules in {
        "pairs": {}, "best": {"make": "best"}, "tied": {"ties": "reward_model"}, "rewards": {"score": "reward_model"},
    }.items():  # fmt: skip
        outputs, rows = rows_of(tmp_path / name, written, file, **rules)
        lineage = parquet.read_table(tmp_path / name / "out" / outputs.lineage_file).to_pylist()
        assert outputs.num_rows == len(rows) == len(lineage) == outputs.fates["used"] > 0, name
        assert sum(outputs.fates.values()) == 30
        assert len({line["prompt_id"] for line in lineage}) == len(lineage)  # no prompt twice
        for row, line in zip(rows, lineage, strict=True):
            asked, number = samples[line["prompt_id"]], line["chosen_number"]
            good = asked["samples"][number]
            assert row["id"] == line["id"] and good["ended"] and line["chosen_num_tokens"] == good["num_tokens"]
            if name == "best":
                assert row["messages"] == [*asked["prompt"], {"role": "assistant", "content": good["text"]}]
                assert line["rejected_number"] is None
            else:
                bad = asked["samples"][line["rejected_number"]]
                assert row["prompt"] == asked["prompt"]
                assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (good["text"], bad["text"])
                assert good["text"] != bad["text"]
            said = worth[line["prompt_id"]]
            assert (line["chosen_outcome"], line["chosen_reward"]) == (
                said["outcomes"][number],
                said["rewards"][number],
            )
            if name == "rewards":
                assert line["chosen_reward"] > line["rejected_reward"]
            else:
                assert line["chosen_outcome"] == "right" and line["rejected_outcome"] in (None, "wrong")
        assert sum(bar.count for bar in outputs.histogram) == (240 if name == "rewards" else 30)
        assert 0 < len(outputs.examples) <= 6 and outputs.examples[0].id == rows[0]["id"]
    rows_of(tmp_path / "again", written, file)
    assert (tmp_path / "again/out/rows.parquet").read_bytes() == (tmp_path / "pairs/out/rows.parquet").read_bytes()


def test_no_row_at_all_is_refused_with_the_reasons(tmp_path: Path, written: Path, reward_model: Path) -> None:
    scored(tmp_path / "scores", written, reward_model)
    file = tmp_path / "scores" / "out" / "scores.parquet"
    with pytest.raises(ValueError, match=r"no prompt gives a row: .*have scores that are too close; lower min_margin"):
        rows_of(tmp_path / "rows", written, file, score="reward_model", min_margin=1e9)


def test_a_difference_in_length_is_said(
    tmp_path: Path, written: Path, reward_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scored(tmp_path / "scores", written, reward_model)
    file = tmp_path / "scores" / "out" / "scores.parquet"
    outputs, _ = rows_of(tmp_path / "rows", written, file, max_length_ratio=1.01)
    (warning,) = outputs.warnings
    assert "tokens on average and rejected ones" in warning and warning in caplog.text
    assert outputs.lengths.chosen is not None and outputs.lengths.rejected is not None
