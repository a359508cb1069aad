"""Records of runs: one per run, whatever they are called."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.artifacts.store import Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.gc import Rules, plan_gc
from smoltulu.artifacts.upkeep.removal import remove
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.compute import ComputeSettings

GRAPH = NodeGraph("tiny", ComputeSettings())
IDS = ("0123abcd-0000-4000-8000-000000000001", "4567abcd-0000-4000-8000-000000000002")


def test_two_runs_of_one_name_have_two_records(tmp_path: Path) -> None:
    """`--flow-run-name night` twice: the second overwrote record and report of the first."""
    store = Store(tmp_path)
    first, second = (begin_run(store, "tiny-night", GRAPH, identity) for identity in IDS)
    assert (first.run_name, second.run_name) == ("tiny-night", "tiny-night-4567abcd")
    end_run(store, first, "Completed", {})
    end_run(store, second, "Failed", {})
    states = {run.run_name: run.state for run in Catalogue(tmp_path).runs()}
    assert states == {"tiny-night": "Completed", "tiny-night-4567abcd": "Failed"}
    # Another attempt of a run is the same run.
    assert begin_run(store, "tiny-night", GRAPH, IDS[0]).run_name == "tiny-night"
    assert begin_run(store, "tiny-night", GRAPH, IDS[1]).run_name == "tiny-night-4567abcd"
    # Without a server there is no id, so nothing says that it is the same run.
    assert len({begin_run(store, "audit", GRAPH, "").run_name for _ in range(3)}) == 3


@pytest.mark.parametrize("event", ["os.rename", "os.link", "os.remove"])
def test_what_a_kill_at_the_beginning_leaves_is_removed_by_gc(tmp_path: Path, event: str) -> None:
    if (child := os.fork()) == 0:
        sys.addaudithook(lambda name, arguments: os.kill(os.getpid(), signal.SIGKILL) if name == event else None)
        begin_run(Store(tmp_path), "tiny-night", GRAPH, IDS[0])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for path in (tmp_path / "runs").iterdir():
        os.utime(path, (0, 0))
    remove(plan_gc(Catalogue(tmp_path), Rules()), tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")] == []


def test_a_record_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny-night.json").write_text("{")
    assert begin_run(Store(tmp_path), "tiny-night", GRAPH, IDS[0]).run_name == "tiny-night-0123abcd"
    assert (tmp_path / "runs" / "tiny-night.json").read_text() == "{"


def test_runs_that_begin_at_once_get_a_record_each(tmp_path: Path) -> None:
    names: list[str] = []
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        names.append(begin_run(Store(tmp_path), "audit", GRAPH, "").run_name)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == len(list((tmp_path / "runs").iterdir())) == 8


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    names = [begin_run(Store(tmp_path), "tiny-night", GRAPH, identity).run_name for identity in (*IDS, IDS[0])]
    assert names == ["tiny-night", "tiny-night-4567abcd", "tiny-night"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1))
def test_any_name_is_a_file_in_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    record = begin_run(Store(tmp_path), name, GRAPH, "")
    assert json.loads((tmp_path / "runs" / f"{record.run_name}.json").read_text())["run_name"] == record.run_name
    assert Catalogue(tmp_path).run(record.run_name) == record
