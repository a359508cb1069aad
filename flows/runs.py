"""Records of flow runs in the store: what a run asked for, and how it ended. `smoltulu runs` and `gc` read them."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime

from smoltulu.artifacts.files import make_folder, write_atomically
from smoltulu.artifacts.layout import RUNS, record_path
from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.schemas.run import RunRecord

#: Most bytes of a run's name: it is that of a folder and, with a suffix, of a file.
_MAX_NAME_BYTES = 200


def _plain(run_name: str) -> str:
    """A run's name as one name of a file: Prefect takes any text for it, and an audit is called as its data."""
    plain = re.sub(r"[^\w.+-]", "-", run_name).lstrip(".")
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore") or "run"


def begin_run(store: Store, run_name: str, graph: NodeGraph, flow_run_id: str) -> RunRecord:
    """Record the start of a run, with the keys of all artifacts that it may use: gc keeps them while it runs."""
    record = RunRecord(
        run_name=_plain(run_name),
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
    file = record_path(store.root, RUNS, record.run_name)
    make_folder(file.parent, store.root)
    write_atomically(file, record.model_dump_json(indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
