"""Flow `smoltulu-audit`: data sets against benchmarks, and their languages, without training.

The shards of a data set are mapped tasks: a task runner that has more machines (Dask) spreads them. What they leave is
in the work folder of the contamination artifact, so the store has to be a folder that all workers see, and a scan that
was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task, unmapped
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.audit_graph import INDEX, AuditGraph
from smoltulu.flows.logs import shield_run_logs
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.schemas.contamination import ContaminationOutputs, Shard, ShardResult
from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.engine.launch import stop_children
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.report.audit import write_audit_report
from smoltulu.tasks.report.contamination_table import table_rows
from smoltulu.tasks.report.text import artifact_key

Data = Annotated[
    list[str], Field(min_length=1, description="files, folders, or Hub data sets (owner/name, owner/name@revision)")
]


@task(cache_policy=NO_CACHE, persist_result=False)
def make(job: Job, store_root: str) -> State[ArtifactReference]:
    """One stage, made or found."""
    # Opened here: this may be another machine, with another working folder.
    store = open_store(job.compute.model_copy(update={"store": store_root}))
    reference = run_stage(job, store, get_run_logger())
    return Completed(name=reference.outcome, message=reference.path, data=reference)


@task(name="scan", task_run_name="scan-{shard.number}", cache_policy=NO_CACHE, persist_result=False, retries=1)
def scan(shard: Shard, index: str, folder: str, settings: AuditSettings) -> ShardResult:
    """One shard; at once where it was scanned before."""
    from smoltulu.tasks.contamination.scan import scan_shard

    return scan_shard(Path(index), shard, Path(folder), roles=settings.roles, match_threshold=settings.match_threshold)


@flow(name="smoltulu-audit", task_runner=ThreadPoolTaskRunner(max_workers=4), persist_result=False)  # type: ignore[arg-type]
def audit_data(data: Data, settings: AuditSettings = AuditSettings()) -> dict[str, dict[str, str]]:  # noqa: B008
    """Audit every data set; nothing is trained. Returns node -> outcome and key.

    The results are artifacts of the store: the same audit again is found there.
    """
    shield_run_logs()
    log = get_run_logger()
    graph = AuditGraph(data, settings)
    store = open_store(settings.compute)
    log.info("audit of %s: %d benchmarks, store %s", ", ".join(data), len(graph.benchmarks), store.root)
    for report in graph.unreachable:
        log.warning("%s: not checked: %s", report.name, report.not_checked)
    record = begin_run(store, f"{graph.name}-{runtime.flow_run.name}", graph, str(runtime.flow_run.id))
    made: dict[str, ArtifactReference] = {}
    state, path = "Failed", ""
    try:
        _make_all(graph, store, made)
        results = graph.results(made)
        for result in results:
            path = str(write_audit_report(result, load_registry(), store.root.parent / "reports"))
            log.info("%s: report: %s", result.label, path)
            _show(result)
        state = "Completed"
    except BaseException:
        stop_children()
        raise
    finally:
        end_run(store, record, state, {name: reference.outcome for name, reference in made.items()}, path)
    return {name: {"outcome": reference.outcome, "key": reference.key} for name, reference in made.items()}


def _make_all(graph: AuditGraph, store: Store, made: dict[str, ArtifactReference]) -> None:
    """Every node of the graph into `made`; what does not depend on each other runs side by side."""

    def submit(name: str) -> Any:
        node = graph.nodes[name]
        named = make.with_options(name=node.stage.name, task_run_name=name)
        return named.submit(graph.job(name, made), str(store.root))

    first = {name: submit(name) for name, node in graph.nodes.items() if not node.inputs}
    for name, future in first.items():
        made[name] = future.result()
    languages = {name: submit(name) for name, node in graph.nodes.items() if node.stage.makes(LanguageOutputs)}
    for name, node in graph.nodes.items():
        if node.stage.makes(ContaminationOutputs):
            _scan_ahead(graph, store, name, made)
            made[name] = submit(name).result()
    for name, future in languages.items():
        made[name] = future.result()


def _scan_ahead(graph: AuditGraph, store: Store, name: str, made: dict[str, ArtifactReference]) -> None:
    """Scan the shards as mapped tasks into the folder in which the stage then finds them; it only merges."""
    from smoltulu.tasks.contamination.scan import plan_shards

    job = graph.job(name, made)
    log = get_run_logger()
    digests = {key: record.digest for key, record in job.input_records.items()}
    if store.obtain(job.spec, digests, name, log) is not None:
        return
    shards = plan_shards(Path(job.inputs.dataset))  # type: ignore[attr-defined]
    # Opened as the stage opens it, or the stage would take what lies there for left-overs and remove it.
    with store.producer(job.spec, partial(log.info, "%s: waiting for %s", name)) as key_folder:
        folder = store.open_work(key_folder) / "shards"
    folder.mkdir(exist_ok=True)
    index = made[INDEX].path
    scan.map(shards, unmapped(index), unmapped(str(folder)), unmapped(graph.settings)).result()


def _show(result: AuditResult) -> None:
    """The table in Prefect's UI."""
    rows = [
        {
            "benchmark": row.title,
            "N": row.num_instances,
            "found": row.num_found,
            "share": row.share,
            "paper": row.paper,
            "remarks": row.remarks,
        }
        for row in table_rows(result, load_registry())
    ]
    create_table_artifact(key=artifact_key(f"audit-{result.label}"), table=rows, description=f"audit of {result.label}")
