"""Records of flow runs in the store: what a run asked for, and how it ended. `smoltulu runs` and `gc` read them."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.layout import RUNS, record_path
from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.schemas.run import RunRecord


def begin_run(store: Store, run_name: str, graph: NodeGraph, flow_run_id: str) -> RunRecord:
    """Record the start of a run, with the keys of all artifacts that it may use: gc keeps them while it runs."""
    record = RunRecord(
        run_name=run_name,
        flow_run_id=flow_run_id,
        recipe=graph.name,
        state="Running",
        started_at=_now(),
        host=os.uname().nodename,
        pid=os.getpid(),
        stages={name: node.stage.name for name, node in graph.nodes.items()},
        keys=graph.keys(),
    )
    _write(store, record)
    return record


def end_run(store: Store, record: RunRecord, state: str, outcomes: dict[str, str], report_path: str = "") -> RunRecord:
    """Record the end of a run. `outcomes`: node -> outcome, of every node that was reached."""
    ended = record.model_copy(
        update={"state": state, "finished_at": _now(), "outcomes": outcomes, "report_path": report_path}
    )
    _write(store, ended)
    return ended


def _write(store: Store, record: RunRecord) -> None:
    file = record_path(store.root, RUNS, Path(record.run_name).name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, record.model_dump_json(indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
