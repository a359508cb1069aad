"""Flow `smoltulu-audit`: checks data sets against benchmarks and counts their languages, without training.

The shards of a data set are mapped tasks, so a task runner with several machines (Dask) distributes them. Each shard
writes into the work folder of the contamination artifact. All workers must therefore see the store as a folder, and an
interrupted scan resumes with the missing shards.
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
from pydantic import Field, ValidationError

from smoltulu.artifacts.store import Store
from smoltulu.flows.endings import Interruption, close_earlier_attempts
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.graphs.audit_graph import AuditGraph
from smoltulu.flows.logs import shield_run_logs
from smoltulu.flows.recipe import check_secrets
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.schemas.common import problems_of
from smoltulu.schemas.contamination import ContaminationOutputs, ContaminationRules, Shard, ShardResult
from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.report.audit import searched, write_audit_report
from smoltulu.tasks.report.contamination_table import table_rows
from smoltulu.tasks.report.text import artifact_key

Data = Annotated[
    list[str], Field(min_length=1, description="files, folders, or Hub data sets (owner/name, owner/name@revision)")
]
Settings = Annotated[AuditSettings, Field(description="benchmarks, mode, format of the rows, and how stages run")]


@task(cache_policy=NO_CACHE, persist_result=False)
def make(job: Job, store_root: str) -> State[ArtifactReference]:
    """Run one stage, or find its artifact."""
    # The task opens the store itself: it may run on another machine, in another working folder.
    store = open_store(job.compute.model_copy(update={"store": store_root}))
    reference = run_stage(job, store, get_run_logger())
    return Completed(name=reference.outcome, message=reference.path, data=reference)


@task(name="scan", task_run_name="scan-{shard.number}", cache_policy=NO_CACHE, persist_result=False, retries=1)
def scan(shard: Shard, index: str, folder: str, rules: ContaminationRules) -> ShardResult:
    """Scan one shard; returns at once if it was scanned before."""
    from smoltulu.tasks.contamination.scan import scan_shard

    return scan_shard(Path(index), shard, Path(folder), roles=rules.roles, match_threshold=rules.match_threshold)


@with_form
@flow(
    name="smoltulu-audit",
    task_runner=ThreadPoolTaskRunner(max_workers=4),  # type: ignore[arg-type]
    persist_result=False,
    validate_parameters=False,
)
@described
def audit_data(data: Data, settings: Settings = AuditSettings()) -> dict[str, dict[str, str]]:  # noqa: B008
    """Audit every data set; nothing is trained. Returns node -> outcome and key.

    The results are artifacts of the store: a repeated audit finds them there.
    """
    shield_run_logs()
    close_earlier_attempts()
    log = get_run_logger()
    data, settings = _checked(data, settings)
    graph = AuditGraph(data, settings)
    store = open_store(settings.compute)
    log.info("audit of %s: %d benchmarks, store %s", ", ".join(data), len(graph.benchmarks), store.root)
    for report in graph.unreachable:
        log.warning("%s: not checked: %s", report.name, report.not_checked)
    record = begin_run(store, f"{graph.name}-{runtime.flow_run.name}", graph, str(runtime.flow_run.id))
    made: dict[str, ArtifactReference] = {}
    state, path = "Completed", ""
    try:
        _make_all(graph, store, made)
        results = graph.results(made)
        for result in results:
            path = str(write_audit_report(result, load_registry(), store.root.parent / "reports"))
            log.info("%s: report: %s", result.label, path)
            _show(result)
    except BaseException as error:
        state = Interruption().stop(error)
        raise
    finally:
        end_run(store, record, state, {name: reference.outcome for name, reference in made.items()}, path)
    return {name: {"outcome": reference.outcome, "key": reference.key} for name, reference in made.items()}


def _checked(data: Any, settings: Any) -> tuple[list[str], AuditSettings]:
    """The flow's parameters. Prefect does not check them: its message would not say what to do."""
    if not isinstance(data, list) or not all(isinstance(one, str) for one in data):
        raise ValueError(f'data: give a list of files, folders or Hub data sets, e.g. ["rows.jsonl"]; given: {data!r}')
    if isinstance(settings, dict):
        check_secrets(settings, "audit's result")
    try:
        return data, AuditSettings.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  settings.{problem}" for problem in problems_of(error))
        raise ValueError(f"the settings of the audit are wrong:\n{problems}") from None


def _make_all(graph: AuditGraph, store: Store, made: dict[str, ArtifactReference]) -> None:
    """Run every node of the graph and add it to `made`. Independent nodes run in parallel."""

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
    """Scan the shards as mapped tasks. The stage finds their results in its work folder and only merges them."""
    from smoltulu.tasks.contamination.rows import plan_shards

    job = graph.job(name, made)
    log = get_run_logger()
    if store.obtain(job.spec, job.input_digests, name, log) is not None:
        return
    shards = plan_shards(Path(job.inputs.dataset))  # type: ignore[attr-defined]
    # Opened as the stage opens it. Otherwise the stage would take the results for left-overs and remove them.
    with store.producer(job.spec, partial(log.info, "%s: waiting for %s", name)) as key_folder:
        folder = store.open_work(key_folder, job.input_digests, partial(log.warning, "%s: %s", name)) / "shards"
    folder.mkdir(exist_ok=True)
    rules = job.config.settings  # type: ignore[attr-defined]
    index = job.inputs.index  # type: ignore[attr-defined]
    scan.map(shards, unmapped(index), unmapped(str(folder)), unmapped(rules)).result()


def _show(result: AuditResult) -> None:
    """Show the table in Prefect's UI."""
    rows = [
        {
            "benchmark": row.title,
            "N": row.num_instances,
            "found": row.num_found,
            "share": row.share,
            **{f"found, {mode}": found for mode, (found, _) in row.also.items()},
            **{f"share, {mode}": share for mode, (_, share) in row.also.items()},
            "paper": row.paper,
            "remarks": row.remarks,
        }
        for row in table_rows(result, load_registry())
    ]
    create_table_artifact(
        key=artifact_key(f"audit-{result.label}"),
        table=rows,
        description=f"audit of {result.label}: {searched(result)}",
    )
