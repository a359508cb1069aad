"""Records of flow runs in the store: what a run asked for, and how it ended. `smoltulu runs` and `gc` read them."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from smoltulu.artifacts.files import make_folder, read_plain, write_atomically
from smoltulu.artifacts.layout import RUNS, record_path
from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.schemas.run import RunRecord

#: Most bytes of a run's name: it is that of a folder and, with an id and a suffix, of a file.
_MAX_NAME_BYTES = 200


def _plain(run_name: str) -> str:
    """A run's name as one name of a file: Prefect takes any text for it, and an audit is called as its data."""
    plain = re.sub(r"[^\w.+-]", "-", run_name).lstrip(".")
    return plain.encode()[:_MAX_NAME_BYTES].decode(errors="ignore") or "run"


def begin_run(store: Store, run_name: str, graph: NodeGraph, flow_run_id: str) -> RunRecord:
    """Record the start of a run, with the keys of all artifacts that it may use: gc keeps them while it runs.

    Another run of this name keeps its record and report: this one then gets the beginning of its id behind its name.
    """
    identity = flow_run_id or uuid4().hex
    name = _plain(run_name)
    record = RunRecord(
        run_name=name,
        flow_run_id=flow_run_id,
        recipe=graph.name,
        state="Running",
        started_at=_now(),
        host=os.uname().nodename,
        pid=os.getpid(),
        stages={name: node.stage.name for name, node in graph.nodes.items()},
        keys=graph.keys(),
    )
    for longer in (name, f"{name}-{identity[:8]}", f"{name}-{identity}"):
        record = record.model_copy(update={"run_name": longer})
        if _claim(store, record):
            break
    return record


def extend_run(store: Store, record: RunRecord, graph: NodeGraph) -> RunRecord:
    """Record that a run uses more artifacts than it began with."""
    stages = {name: node.stage.name for name, node in graph.nodes.items()}
    longer = record.model_copy(update={"stages": record.stages | stages, "keys": record.keys | graph.keys()})
    _write(store, longer)
    return longer


def end_run(store: Store, record: RunRecord, state: str, outcomes: dict[str, str], report_path: str = "") -> RunRecord:
    """Record the end of a run. `outcomes`: node -> outcome, of every node that was reached."""
    ended = record.model_copy(
        update={"state": state, "finished_at": _now(), "outcomes": outcomes, "report_path": report_path}
    )
    _write(store, ended)
    return ended


def _claim(store: Store, record: RunRecord) -> bool:
    """Write the record of a run that begins; False where another run has this name. A retried run keeps its own."""
    file = _file(store, record)
    make_folder(file.parent, store.root)
    draft = file.with_name(f".begun.{uuid4().int}")  # gc knows names of this form as temporary
    write_atomically(draft, record.model_dump_json(indent=1))
    try:
        os.link(draft, file)  # refuses a file that is there, also where two begin at once
        return True
    except OSError:  # also on a file system without links
        if file.exists() and not _is_of(file, record.flow_run_id):
            return False
    finally:
        draft.unlink(missing_ok=True)
    _write(store, record)
    return True


def _is_of(file: Path, flow_run_id: str) -> bool:
    """Whether a record is that of a flow run; no record of a run without a server is."""
    try:
        return bool(flow_run_id) and RunRecord.model_validate_json(read_plain(file)).flow_run_id == flow_run_id
    except (OSError, ValueError):
        return False


def _file(store: Store, record: RunRecord) -> Path:
    return record_path(store.root, RUNS, record.run_name)


def _write(store: Store, record: RunRecord) -> None:
    write_atomically(_file(store, record), record.model_dump_json(indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
