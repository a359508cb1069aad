"""Flow `smoltulu-sweep`: runs the cells of a sweep that are missing, each an ordinary training and its evaluation."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from smoltulu.flows.endings import begin_interruptible, close_earlier_attempts, end_interruptible, interruption_of
from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.sweeping.engine import Made, References, SweepRun, make_nodes, page_at_end
from smoltulu.flows.sweeping.grid import SweepCell, load_sweep
from smoltulu.tasks.engine.stores import open_store

SweepParameter = Annotated[
    str | dict[str, Any], Field(description="a shipped sweep, the path of a YAML file, or a sweep written out")
]
Blocks = Annotated[list[str], Field(description="blocks to run, by their names; none: all of them, in their order")]


@task(cache_policy=NO_CACHE, persist_result=False)
def make(cell: SweepCell, nodes: tuple[str, ...], upstream: References, store_root: str) -> State[Made]:
    """Run nodes of a cell one after the other."""
    # The task opens the store itself: it may run on another machine, in another working folder.
    store = open_store(cell.graph.compute.model_copy(update={"store": store_root}), checked=False)
    try:
        made = make_nodes(cell, nodes, upstream, store, get_run_logger())
    except Exception as error:
        interruption = interruption_of(str(runtime.flow_run.id))
        if interruption is not None and (ending := interruption.state_of_stage(error)) is not None:
            return ending
        raise
    if made.diverged:
        return Completed(name="Diverged", message=made.diverged, data=made)
    return Completed(name=made.references[nodes[-1]].outcome, data=made)


@with_form
@flow(
    name="smoltulu-sweep",
    task_runner=ThreadPoolTaskRunner(),  # type: ignore[arg-type]
    persist_result=False,
    validate_parameters=False,
)
@described
def smoltulu_sweep(sweep: SweepParameter, blocks: Blocks = []) -> Any:  # noqa: B006
    """Run the cells of a sweep that have no scores yet. A cell that fails ends nothing; one that diverges is a result.

    Grid, seeds and budgets can be extended at any time: finished cells are found by their keys.
    """
    shield_run_logs()
    follow_worker()
    close_earlier_attempts()
    log = get_run_logger()
    if not isinstance(blocks, list) or not all(isinstance(name, str) for name in blocks):
        raise ValueError(f'blocks: give a list of names, e.g. ["main"]; given: {blocks!r:.200}')
    asked, flow_run_id = load_sweep(sweep), str(runtime.flow_run.id)
    run = SweepRun(asked, f"{asked.name}-{runtime.flow_run.name}", log, blocks=blocks, flow_run_id=flow_run_id)
    interruption = begin_interruptible(flow_run_id)
    futures: list[PrefectFuture[Any]] = []

    def submit(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> PrefectFuture[Any]:
        is_shared = nodes[0] in cell.shared_nodes
        name = cell.graph.nodes[nodes[0]].stage.name if is_shared else "cell"
        named = make.with_options(name=name, task_run_name=nodes[0] if is_shared else cell.place.name)
        futures.append(named.submit(cell.to_send, nodes, upstream, str(run.store_root)))
        return futures[-1]

    state, page = "Failed", ""
    try:
        state = run.run(submit)
        page, _ = page_at_end(run, log)
    except BaseException as error:
        state = interruption.stop(error, futures)
        raise
    finally:
        end_interruptible(flow_run_id)
        run.end(state, page)
    message = run.counted()
    log.info(message)
    if state == "Failed":
        raise RunFailed(message)
    return Completed(name="Completed", message=message)
