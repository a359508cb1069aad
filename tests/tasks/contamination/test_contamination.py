"""The contamination stages: the index of the benchmarks, and the check of a data set against it."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.contamination import (
    Benchmark,
    BenchmarkIndexConfig,
    BenchmarkIndexInputs,
    ContaminationInputs,
    ContaminationRules,
    ContaminationSettings,
    ContaminationStageConfig,
)
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.contamination.index import build_benchmark_index, load_benchmark
from smoltulu.tasks.contamination.merge import write_kept
from smoltulu.tasks.contamination.rows import plan_shards
from smoltulu.tasks.contamination.scan import ShortRule
from smoltulu.tasks.contamination.stage import check_contamination
from smoltulu.tasks.stage import StageContext
from tests.rows_file import read_rows, write_rows
from tests.tasks.contamination.contamination_fuzz import conversation

LEAK = "How many apples does Ann have after lunch today?"  # nine terms

ROWS = [
    conversation("0:0", "hello", LEAK, "thanks", "bye"),  # in an assistant turn: not looked at
    conversation("0:1", "hello", "hi", f"And now: {LEAK}", "2"),
    conversation("0:3", "How many apples does Ann have", "x", "after lunch today", "y"),  # over two turns
    conversation("0:4", "What about inflation \u00e9?", "z"),
]
BENCHMARK = [
    {"q": "Question: none of it", "p": "a"},
    {"q": f"Question: {LEAK}", "p": "and NOW"},
    {"q": "Question: Inflation", "p": "what"},
    {"q": "Question: hello", "p": None},
    {"q": "Question: hello", "p": ""},
]


def benchmark(tmp_path, rows=BENCHMARK, name="quiz", **rest):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = {"query_fields": ("q", "p"), "strip_prefix": "Question: "} | rest
    return Benchmark(name=name, source=DataSource(path=str(path), format="text"), **rest)


def make_context(tmp_path, name, reported=None):
    folder, work = tmp_path / name, tmp_path / f"{name}-work"
    for path in (folder, work):
        path.mkdir(exist_ok=True)
    told = [] if reported is None else reported
    return StageContext(folder, work, ComputeSettings(), lambda *steps, **metrics: told.append((*steps, metrics)))


def run(tmp_path, *benchmarks, rows=ROWS, kind="sft", group_rows=2, **rest):
    """Both stages: the index of the benchmarks, then the check of the rows."""
    recipe = ContaminationSettings(benchmarks=benchmarks, **rest)
    indexing = make_context(tmp_path, "index")
    build_benchmark_index(recipe.index_config(), BenchmarkIndexInputs(), indexing)
    dataset = write_rows(tmp_path / "dataset.parquet", rows, kind, group_rows)
    reported = []
    context = make_context(tmp_path, "folder", reported)
    inputs = ContaminationInputs(dataset=str(dataset), index=str(indexing.folder))
    outputs, metrics = check_contamination(recipe.stage_config(kind), inputs, context)
    step, num_steps, told = reported[-1]
    assert step == num_steps and told["num_rows"] == len(rows) and told["rows_per_second"] > 0
    return outputs, metrics


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stage_removes_what_hits_and_says_why(tmp_path):
    outputs, metrics = run(tmp_path, benchmark(tmp_path))
    folder = tmp_path / "folder"
    assert read_rows(folder / "rows.parquet") == [ROWS[0], ROWS[2]]
    assert lines(folder / "removed.jsonl") == [
        {"id": "0:1", "reasons": {"quiz": [1]}},
        {"id": "0:4", "reasons": {"quiz": [2]}},
    ]
    shared = {"turn": 2, "instance": 1, "benchmark": "quiz", "benchmark_row": 1, "score": 1.0, "num_terms": 11}
    assert pq.read_table(folder / "hits.parquet").to_pylist() == [
        {"row": 1, "row_id": "0:1", **shared, "text": LEAK[:-1]},
        {"row": 3, "row_id": "0:4", **shared, "turn": 0, "instance": 2, "benchmark_row": 2, "num_terms": 2,
         "text": "inflation"},
    ]  # fmt: skip
    [report] = outputs.benchmarks
    # five instances: one has a null field (left out), one an empty field (stays, never matches)
    assert (report.num_instances, report.num_skipped, report.num_unmatchable) == (4, 1, 1)
    assert (report.num_contaminated, report.num_short_hits, report.share) == (2, 1, 0.5)
    assert (outputs.num_rows_read, outputs.num_rows, outputs.num_removed) == (4, 2, 2)
    assert metrics["contaminated_share/quiz"] == 0.5 and metrics["num_removed"] == 2.0
    assert (outputs.num_hits, outputs.num_turns, outputs.mode, outputs.roles) == (2, 7, "full", ("user",))
    assert sorted(path.name for path in folder.iterdir()) == ["hits.parquet", "removed.jsonl", "rows.parquet"]


def test_policy_report_keeps_every_row(tmp_path):
    outputs, _ = run(tmp_path, benchmark(tmp_path), policy="report")
    assert (tmp_path / "folder" / "rows.parquet").read_bytes() == (tmp_path / "dataset.parquet").read_bytes()
    assert (outputs.num_removed, outputs.num_rows_contaminated) == (0, 2)
    assert lines(tmp_path / "folder" / "removed.jsonl") == []


def test_min_terms_spares_rows_hit_by_short_instances_only(tmp_path):
    outputs, _ = run(tmp_path, benchmark(tmp_path), min_terms=3)
    assert [row["id"] for row in lines(tmp_path / "folder" / "removed.jsonl")] == ["0:1"]
    assert outputs.benchmarks[0].num_contaminated == 2 and outputs.num_rows_contaminated == 2  # still reported
    run(tmp_path, benchmark(tmp_path), min_terms=12, policy="fail", fail_above=0.0)


@settings(max_examples=30)
@given(st.sets(st.integers(0, 11)), st.integers(1, 5))
def test_removed_rows_may_lie_anywhere(tmp_path_factory, numbers, group_rows):
    folder = tmp_path_factory.mktemp("kept")
    rows = [conversation(f"0:{number}", f"{number}", "\u2028") for number in range(12)]
    dataset = write_rows(folder / "rows.parquet", rows, group_rows=group_rows)
    hits = [
        {"row": number, "row_id": f"0:{number}", "benchmark": name, "benchmark_row": row, "num_terms": num_terms}
        for number in range(12)
        for name, row, num_terms in (("a", 1, 2), ("b", 7, 9), ("a", 2, 9))
        if number in numbers or num_terms < 9
    ]
    table = pa.Table.from_pylist(hits)
    pq.write_table(table, folder / "hits.parquet")
    files = folder / "hits.parquet", folder / "kept.parquet", folder / "removed.jsonl"
    assert write_kept(dataset, *files, ShortRule(min_terms=9)) == len(numbers)
    assert read_rows(files[1]) == [row for number, row in enumerate(rows) if number not in numbers]
    reasons = {"b": [7], "a": [2]}
    assert lines(files[2]) == [{"id": f"0:{number}", "reasons": reasons} for number in sorted(numbers)]
    if not numbers:
        assert files[1].read_bytes() == dataset.read_bytes()


def test_policy_fail_names_benchmark_and_share_and_keeps_the_evidence(tmp_path):
    other = benchmark(tmp_path, [{"q": "nothing", "p": "here"}], name="other")
    run(tmp_path, benchmark(tmp_path), other, policy="fail", fail_above=0.5)  # not above
    (tmp_path / "folder" / "rows.parquet").unlink()
    with pytest.raises(ValueError, match=r"40\.00% \(fail_above\) of quiz: 2 of 4 instances \(50\.00%\)") as error:
        run(tmp_path, benchmark(tmp_path), other, policy="fail", fail_above=0.4)
    assert "other" not in str(error.value)
    assert not list((tmp_path / "folder").glob("rows*"))
    assert pq.read_table(tmp_path / "folder-work" / "hits.parquet").num_rows == 2


def test_an_empty_training_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all 1 training rows hit a benchmark"):
        run(tmp_path, benchmark(tmp_path), rows=ROWS[1:2])
    with pytest.raises(ValueError, match="has no row to check"):
        run(tmp_path, benchmark(tmp_path), rows=[])
    assert not list((tmp_path / "folder").glob("rows*"))


@pytest.mark.parametrize("kind", ["preference", "rlvr"])
def test_prompts_of_other_kinds_are_searched(tmp_path, kind):
    prompt = [{"role": "user", "content": f"and now {LEAK}"}]
    answer = [{"role": "assistant", "content": f"and now {LEAK}"}]
    rest = {"chosen": answer, "rejected": answer} if kind == "preference" else {"verifier": "gsm8k"}
    clean = [{"role": "user", "content": "something else"}]
    rows = [{"id": "0:0", "prompt": prompt, **rest}, {"id": "0:1", "prompt": clean, **rest}]
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, kind=kind)
    assert [row["id"] for row in read_rows(tmp_path / "folder" / "rows.parquet")] == ["0:1"]
    assert outputs.kind == kind


def test_assistant_turns_are_searched_where_asked_for(tmp_path):
    rows = [conversation("0:0", "hello", f"And now, {LEAK}", "thanks", "bye"), *ROWS[1:]]
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, roles=("user", "assistant"))
    assert [row["id"] for row in lines(tmp_path / "folder" / "removed.jsonl")] == ["0:0", "0:1", "0:4"]
    assert outputs.roles == ("user", "assistant") and outputs.num_turns == 14
    prompt, leak = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": f"And now, {LEAK}"}]
    rows = [{"id": f"0:{n}", "prompt": prompt, "chosen": prompt, "rejected": prompt} for n in range(3)]
    rows[0]["chosen"], rows[1]["rejected"] = leak, leak
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, kind="preference", roles=("assistant",))
    assert outputs.num_removed == 2
    hits = pq.read_table(tmp_path / "folder" / "hits.parquet").to_pylist()
    assert [(hit["row_id"], hit["turn"]) for hit in hits] == [("0:0", 1), ("0:1", 2)]
    with pytest.raises(ValueError, match="each may be named once"):
        ContaminationRules(roles=("user", "user"))


def test_a_stopped_stage_takes_up_its_finished_shards(tmp_path, monkeypatch):
    import smoltulu.tasks.contamination.scan as engine

    rows = [conversation(f"0:{n}", LEAK if n == 7 else "hello", "and now") for n in range(20)]
    monkeypatch.setattr("smoltulu.tasks.contamination.rows.plan_shards", lambda path: plan_shards(path, 1))
    real, calls = engine.scan_shard, []

    def scan(index, shard, folder, **rest):
        calls.append(shard.number)
        if shard.number == 3 and len(calls) < 100:
            raise RuntimeError("power cut")
        return real(index, shard, folder, **rest)

    monkeypatch.setattr(engine, "scan_shard", scan)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, benchmark(tmp_path), rows=rows)
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "folder-work" / "shards").iterdir()}
    assert {"shard-00000", "shard-00001", "shard-00002"} <= set(finished) and "shard-00003" not in finished
    calls += [0] * 100
    before = (tmp_path / "dataset.parquet").stat()

    def write_as_before(path, *given, write=write_rows):
        write(path, *given)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return path

    monkeypatch.setitem(run.__globals__, "write_rows", write_as_before)
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows)
    assert outputs.num_rows_read == 20
    again = {path.name: path.stat().st_ino for path in (tmp_path / "folder-work" / "shards").iterdir()}
    assert finished.items() <= again.items()


def test_an_index_of_another_mode_is_refused(tmp_path):
    run(tmp_path, benchmark(tmp_path))
    config = ContaminationStageConfig(kind="sft", settings=ContaminationRules(mode="ngram"))
    inputs = ContaminationInputs(dataset=str(tmp_path / "dataset.parquet"), index=str(tmp_path / "index"))
    with pytest.raises(ValueError, match="index is for mode full"):
        check_contamination(config, inputs, make_context(tmp_path, "other"))
    with pytest.raises(ValueError, match="no benchmark index"):
        check_contamination(config, inputs.model_copy(update={"index": str(tmp_path)}), make_context(tmp_path, "other"))


def test_the_index_does_not_depend_on_what_only_the_scan_needs():
    given = Benchmark(name="x", source=DataSource(path="x.json", format="text"), query_fields=("q",))
    one = ContaminationSettings(benchmarks=(given,))
    for change in (
        {"policy": "fail"},
        {"match_threshold": 0.3},
        {"min_terms": 8},
        {"roles": ("assistant",)},
        {"ngram_size": 9},
    ):
        assert ContaminationSettings(benchmarks=(given,), **change).index_config() == one.index_config()
    ngrams = [ContaminationSettings(benchmarks=(given,), mode="ngram", ngram_size=n).index_config() for n in (8, 9)]
    assert ngrams[0] != ngrams[1] and one.index_config() not in ngrams
    assert isinstance(ngrams[0], BenchmarkIndexConfig)


def test_what_cannot_be_loaded_is_not_checked_never_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    gated = Benchmark(name="gated", source=DataSource(repository="a/b", format="text"), query_fields=("q",))
    outputs, metrics = run(tmp_path, gated, benchmark(tmp_path))
    report = outputs.benchmarks[0]
    assert report.share is None and "cannot be reached" in report.not_checked
    assert "contaminated_share/gated" not in metrics and metrics["contaminated_share/quiz"] == 0.5
    with pytest.raises(ValueError, match="none of the 1 benchmarks could be loaded"):
        run(tmp_path, gated)


@pytest.mark.parametrize(
    ("rows", "rest", "message"),
    [
        (BENCHMARK, {"query_fields": ("qq",)}, r"no column qq; query_fields may name p, q"),
        ([{"q": 3, "p": "a"}], {}, r"column 'q' of row 0 holds a int"),
        ([[1]], {}, "rows that are not objects"),
        ([], {}, "has no rows"),
    ],
)
def test_faults_of_a_benchmark_are_the_users_to_fix(tmp_path, rows, rest, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, benchmark(tmp_path, rows, **rest))


def test_a_query_of_messages_is_its_last_user_turn(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": LEAK}]
    loaded = load_benchmark(benchmark(tmp_path, [{"q": messages}, {"q": None}], query_fields=("q",), strip_prefix=""))
    assert loaded.queries == [(LEAK,), None]
    with pytest.raises(ValueError, match="holds a list"):
        load_benchmark(benchmark(tmp_path, [{"q": messages[:1]}], query_fields=("q",)))


def test_a_missing_benchmark_file_is_an_error(tmp_path):
    missing = Benchmark(name="x", source=DataSource(path=str(tmp_path / "no.json"), format="text"), query_fields=("q",))
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path, missing, benchmark(tmp_path))
