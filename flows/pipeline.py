"""Flow `smoltulu`: runs every stage of a recipe as a Prefect task that returns a typed artifact reference."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from smoltulu.artifacts import readable
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.endings import begin_interruptible, close_earlier_attempts, end_interruptible, interruption_of
from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import choice, described, listed, with_form
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.machine.dask_workers import asking_for, check_devices, offered, runner_client
from smoltulu.flows.machine.places import default_home
from smoltulu.flows.machine.rates import rates_of
from smoltulu.flows.planning.forecast import forecast_if_missing
from smoltulu.flows.recipe import (
    check_evaluation,
    check_stage_names,
    language_notes,
    load_recipe,
    preset_descriptions,
    stage_descriptions,
)
from smoltulu.flows.reporting import RunReport
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference, Forecast
from smoltulu.schemas.publish import PublishOutputs
from smoltulu.schemas.recipe import ExtendingRecipe, Recipe
from smoltulu.schemas.run import RunSummary
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.publish.push import check_push_access, push_model
from smoltulu.tasks.report import artifact_key, markdown, stage_table
from smoltulu.tasks.report.verdict import sentences

_PRESETS, _STAGES = preset_descriptions(), stage_descriptions()

#: Of a task that has ended its state is there at once; of one that an interruption could not end it never is.
_STATE_SECONDS = 1.0

RecipeParameter = Annotated[
    Annotated[str, choice(_PRESETS, title="preset")]
    | Annotated[str, Field(title="path of a YAML file")]
    | Recipe
    | ExtendingRecipe,
    Field(
        description="a preset, the path of a YAML file, or a recipe written out (`extends` a preset or whole). Presets:"
        + listed(_PRESETS)
    ),
]
Overrides = Annotated[
    dict[str, Any], Field(description='dotted recipe fields and their values, e.g. {"dpo.learning_rate": 5e-7}')
]
Until = Annotated[
    Annotated[str, choice(_STAGES)] | None,
    Field(description="last stage to run, e.g. dpo; its models are still evaluated. Stages:" + listed(_STAGES)),
]
Refresh = Annotated[
    list[Annotated[str, choice(_STAGES)]],
    Field(description="stages to make again although they are cached, e.g. [sft]"),
]


@task(cache_policy=NO_CACHE, persist_result=False)
def make(
    graph: NodeGraph,
    node: str,
    upstream: dict[str, ArtifactReference],
    store_root: str,
    refresh: bool,
    forecast: Forecast | None,
) -> State[ArtifactReference]:
    """Make or find one node, here or on a worker on another machine, which sees the store under the same path."""
    log, began = get_run_logger(), time.monotonic()
    store = open_store(graph.compute.model_copy(update={"store": store_root}), checked=False)
    job = replace(graph.job(node, upstream, refresh=refresh), forecast=forecast)
    try:
        reference = run_stage(job, store, log)
    except Exception as error:
        interruption = interruption_of(str(runtime.flow_run.id))
        if interruption is not None and (ending := interruption.state_of_stage(error)) is not None:
            return ending
        raise
    took = readable.duration(time.monotonic() - began)
    log.info("%s: %s %s (%s)", node, reference.outcome.lower(), reference.key[:12], took)
    if reference.outcome != "Cached":
        try:
            create_table_artifact(
                key=artifact_key(f"{graph.name}-{node}"),
                table=stage_table(reference, job.stage.outputs),
                description=f"{node}, {took}",
            )
        except Exception as error:  # a server that is gone for a while must not fail a stage that is committed
            log.warning("%s: its table is not in Prefect's UI: %s", node, error)
    return Completed(name=reference.outcome, message=took, data=reference)


@with_form
@flow(
    name="smoltulu",
    task_runner=ThreadPoolTaskRunner(),  # type: ignore[arg-type]
    persist_result=False,
    validate_parameters=False,  # by load_recipe, whose message says what to do
)
@described
def smoltulu(
    recipe: RecipeParameter = "smoltulu-1130",
    overrides: Overrides = {},  # noqa: B006 - Prefect reads the default for its form
    until: Until = None,
    refresh: Refresh = [],  # noqa: B006
) -> dict[str, str]:
    """Run contamination check, SFT, reward model, DPO, RLVR, evaluation and publishing, as the recipe says.

    The store provides finished stages. An interrupted stage resumes from its last checkpoint. Returns node -> key.
    """
    shield_run_logs()
    follow_worker()
    close_earlier_attempts()
    log = get_run_logger()
    checked = load_recipe(recipe, overrides)
    check_stage_names(checked, until, refresh)
    check_evaluation(checked)
    token = os.environ.get("HF_TOKEN")
    for sentence in (
        *checked.batch_notes(),
        *checked.audit_notes(),
        *checked.evaluation_notes(),
        *checked.mup_notes(),
        *language_notes(checked),
        *checked.near_duplicate_notes(),
        *checked.sampled_notes(),
        *checked.selection_notes(),
    ):
        log.warning(sentence)
    graph = Graph(checked, until)
    if checked.publish is not None and any(node.stage.makes(PublishOutputs) for node in graph.nodes.values()):
        note = check_push_access(checked.publish, token, checked.base_model.repository)
        if note is not None:
            log.warning(note)
    store = open_store(checked.compute)
    log.info("recipe %s: %d steps, store %s", checked.name, len(graph.nodes), store.root)
    devices = {name: node.stage.num_devices(graph.compute_of(node)) for name, node in graph.nodes.items()}
    client = runner_client()
    on_workers = [] if client is None else offered(client)
    if client is not None and (told := check_devices(on_workers, devices)) is not None:
        log.warning(told)
    rates = rates_of(default_home(), checked.compute.device)

    record = begin_run(store, f"{checked.name}-{runtime.flow_run.name}", graph, str(runtime.flow_run.id))
    report = RunReport(graph, store, record)
    interruption = begin_interruptible(record.flow_run_id)
    began: dict[str, float] = {}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    stopped: set[str] = set()
    made: dict[str, ArtifactReference] = {}

    def take_in(name: str, has_ended: bool = True) -> None:
        """What a node came to. Of one that never began, as an earlier one failed, there is nothing to say."""
        futures[name].wait(timeout=_STATE_SECONDS)  # else its state is what the server has heard of so far
        state = futures[name].state
        if state.is_completed():
            made[name] = futures[name].result()
        elif state.is_failed() or state.is_crashed() or state.is_cancelled():
            failures[name] = _message(futures[name])
            if not state.is_failed():
                stopped.add(name)
        elif has_ended and not state.is_pending():  # of a Dask worker that was killed nothing comes back
            failures[name] = f"{name}: ended without a result: {_message(futures[name])}"

    @task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=[10, 60])
    def push(published: ArtifactReference) -> str:
        assert checked.publish is not None
        folder = PublishOutputs.model_validate(published.outputs).folder
        files = read_manifest(Path(published.path)).files
        own = {name.removeprefix(f"{folder}/"): one for name, one in files.items() if name.startswith(f"{folder}/")}
        return push_model(Path(published.path) / folder, own, checked.publish, token).reason

    futures: dict[str, PrefectFuture[Any]] = {}  # node -> ArtifactReference
    error: BaseException | None = None
    pushed, state = "", "Failed"
    try:
        # A stage is submitted when it can begin: while it waits for a slot, Prefect must not show it as Running.
        ended: SimpleQueue[str] = SimpleQueue()
        waiting, done, num_running = dict(graph.nodes), set[str](), 0
        while waiting or num_running:
            for name, node in list(waiting.items()):
                before = {*(binding.node for binding in node.bindings().values()), *node.after}
                if num_running == checked.compute.max_parallel_stages:
                    break
                if before <= done:
                    del waiting[name]
                    num_running += 1
                    upstream: dict[str, Any] = {earlier: futures[earlier] for earlier in before}
                    named = make.with_options(name=node.stage.name, task_run_name=name)
                    refreshed = node.stage.name in refresh
                    forecast = None
                    if before <= made.keys():
                        forecast = forecast_if_missing(graph, store, name, made, rates, log, refreshed)
                    with asking_for(devices[name], on_workers):
                        futures[name] = named.submit(
                            graph.part((*before, name)), name, upstream, str(store.root.absolute()), refreshed, forecast
                        )
                    began[name] = time.monotonic()
                    futures[name].add_done_callback(partial(_put, ended, seconds, began, name))
            running = [name for name in futures if name not in done]
            _look_on(report, made, failures, seconds, running)  # while they run
            done.add(name := ended.get())
            take_in(name)
            num_running -= 1
        for name, reference in made.items():
            if graph.nodes[name].stage.makes(PublishOutputs):
                pushed = push(reference)
                log.info("%s: %s", name, pushed)
    except BaseException as raised:
        # Cancelled, or the process must end: no stage may outlive its flow.
        error, state = raised, interruption.stop(raised, futures.values())
        for name in futures.keys() - done:
            with contextlib.suppress(Exception):  # of one that has not ended the server is asked, which may be gone
                take_in(name, has_ended=False)
        raise
    finally:
        end_interruptible(record.flow_run_id)
        if error is None:
            state = "Failed" if failures else "Completed"
        finished = [made[name] for name in graph.nodes if name in made]
        outcomes = {reference.node: reference.outcome for reference in finished} | dict.fromkeys(failures, "Failed")
        if state == "Cancelled":  # a stage that had failed before has failed
            outcomes |= dict.fromkeys(stopped, "Cancelled")
        # Written before the report and again after it: an error in the report must not leave the run "Running".
        run = end_run(store, record, state, outcomes)
        said = "; ".join(failures.values()) or (None if error is None else repr(error))
        said = "cancelled" if state == "Cancelled" else said
        summary = report.write(run, finished, failures, seconds, error=said, pushed=pushed)
        end_run(store, record, state, outcomes, report_path=str(report.page))
        _tell(graph, summary, report.page)
    if failures:
        raise RunFailed("; ".join(failures.values()))
    return {reference.node: reference.key for reference in finished}


def _look_on(report: RunReport, *so_far: Any) -> None:
    """Write the page of what there is so far. An error in it must not end the run."""
    try:
        report.write_while_running(*so_far)
    except Exception as error:
        get_run_logger().warning("the report is not up to date: %s", error)


def _put(
    queue: SimpleQueue[str],
    seconds: dict[str, float],
    began: dict[str, float],
    name: str,
    _future: PrefectFuture[Any],
) -> None:
    seconds[name] = time.monotonic() - began.get(name, time.monotonic())
    queue.put(name)


def _message(future: PrefectFuture[Any]) -> str:
    """The error of a task that failed, was cancelled or crashed."""
    try:
        future.result()
    except BaseException as error:
        return str(error)
    return future.state.message or ""


def _tell(graph: Graph, summary: RunSummary, page: Path) -> None:
    """Say in the log and in Prefect's UI what the run came to."""
    log = get_run_logger()
    num_cached = sum(run.outcome == "Cached" for run in summary.stages)
    if num_cached < len(graph.nodes):  # else the page of the run that made them is still complete
        create_markdown_artifact(key=artifact_key(f"{graph.recipe.name}-run"), markdown=markdown(summary))
    if summary.verdict.num_tests:
        for pair, what in sentences(summary.verdict):
            log.info("%s: %s", pair, what)
    log.info("%d of %d stages cached; report: %s", num_cached, len(graph.nodes), page.resolve())


if __name__ == "__main__":
    smoltulu("tiny")
