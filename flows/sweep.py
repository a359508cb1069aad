"""Flow `smoltulu-sweep`: runs the cells of a sweep that are missing, each an ordinary training and its evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from smoltulu.artifacts.store import Found, Store
from smoltulu.flows.endings import Interruption, close_earlier_attempts
from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.flows.sweeping.grid import SweepCell, cells_of, load_sweep
from smoltulu.flows.sweeping.states import (
    counted,
    counts_of,
    forget_outcome,
    outcome_of,
    remember,
    states_of,
    sweep_folder,
    write_outcome,
)
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.engine.runner import reference_to, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.stage import Diverged

SweepParameter = Annotated[
    str | dict[str, Any], Field(description="a shipped sweep, the path of a YAML file, or a sweep written out")
]
Blocks = Annotated[list[str], Field(description="blocks to run, by their names; none: all of them, in their order")]


class _Cells(NodeGraph):
    """Every node of every cell once, for the record of the run: gc keeps them while it runs."""

    def __init__(self, name: str, cells: list[SweepCell]) -> None:
        super().__init__(name, cells[0].graph.compute)
        for cell in cells:
            for node in (*cell.shared_nodes, *cell.own_nodes):
                own = f"{cell.place.name}.{node}" if node in cell.own_nodes else node
                self.nodes.setdefault(own, cell.graph.nodes[node])
                self._keys.setdefault(own, cell.graph.key(node))


@with_form
@flow(
    name="smoltulu-sweep",
    task_runner=ThreadPoolTaskRunner(),  # type: ignore[arg-type]
    persist_result=False,
    validate_parameters=False,
)
@described
def smoltulu_sweep(sweep: SweepParameter = "surface-tiny", blocks: Blocks = []) -> Any:  # noqa: B006
    """Run the cells of a sweep that have no scores yet. A cell that fails ends nothing; one that diverges is a result.

    Grid, seeds and budgets can be extended at any time: finished cells are found by their keys.
    """
    shield_run_logs()
    follow_worker()
    close_earlier_attempts()
    log = get_run_logger()
    asked = load_sweep(sweep)
    known = [block.name for block in asked.blocks]
    if unknown := [name for name in blocks if name not in known]:
        raise ValueError(f"sweep {asked.name} has no block {unknown[0]!r}; its blocks: {', '.join(known)}")
    cells = [cell for cell in cells_of(asked) if not blocks or cell.block in blocks]
    store = open_store(cells[0].graph.compute)
    folder = sweep_folder(store.root, asked.name)
    remember(folder, cells)
    log.info("sweep %s: %d cells, store %s", asked.name, len(cells), store.root)
    record = begin_run(
        store, f"{asked.name}-{runtime.flow_run.name}", _Cells(asked.name, cells), str(runtime.flow_run.id)
    )
    interruption = Interruption()
    shared: dict[str, ArtifactReference] = {}  # by key
    outcomes: dict[str, str] = {}
    futures: list[PrefectFuture[Any]] = []

    @task(cache_policy=NO_CACHE, persist_result=False)
    def make(cell: SweepCell, nodes: tuple[str, ...]) -> State[dict[str, ArtifactReference]]:
        """Run nodes of a cell one after the other."""
        made: dict[str, ArtifactReference] = {}
        graph = cell.graph
        try:
            for node in nodes:
                upstream = {
                    binding.node: made.get(binding.node) or shared[graph.key(binding.node)]
                    for binding in graph.nodes[node].bindings().values()
                }
                made[node] = run_stage(graph.job(node, upstream), store, get_run_logger())
        except Exception as error:
            if (ending := interruption.state_of_stage(error)) is not None:
                return ending
            if node in cell.own_nodes:
                write_outcome(folder, cell.keys[1], "diverged" if isinstance(error, Diverged) else "failed", str(error))
            if isinstance(error, Diverged):
                return Completed(name="Diverged", message=str(error), data={})
            raise
        return Completed(name=made[nodes[-1]].outcome, data=made)

    state = "Failed"
    try:
        for cell in cells:
            for node in cell.shared_nodes:
                if (key := cell.graph.key(node)) not in shared:
                    future = make.with_options(name=cell.graph.nodes[node].stage.name, task_run_name=node).submit(
                        cell, (node,)
                    )
                    futures.append(future)
                    shared[key] = future.result()[node]  # type: ignore[index]
        waiting = [cell for cell in cells if not _has_ended(store, folder, cell, shared)]
        log.info("%d of %d cells are missing", len(waiting), len(cells))
        ended: SimpleQueue[SweepCell] = SimpleQueue()
        num_running = 0
        for cell in waiting:
            if num_running == asked.num_workers:
                outcomes |= _told(ended.get(), store, folder, log)
                num_running -= 1
            forget_outcome(folder, cell.keys[1])
            future = make.with_options(name="cell", task_run_name=cell.place.name).submit(cell, cell.own_nodes)
            future.add_done_callback(partial(_put, ended, cell))
            futures.append(future)
            num_running += 1
        for _ in range(num_running):
            outcomes |= _told(ended.get(), store, folder, log)
        state = "Failed" if "Failed" in outcomes.values() else "Completed"
    except BaseException as error:
        state = interruption.stop(error, futures)
        raise
    finally:
        end_run(store, record, state, outcomes)
    counts = counts_of(states_of(store.root, folder, remember(folder, cells)))
    message = f"sweep {asked.name}: {counted(counts)}"
    log.info(message)
    if state == "Failed":
        raise RunFailed(message)
    return Completed(name="Completed", message=message)


def _put(queue: SimpleQueue[SweepCell], cell: SweepCell, _future: PrefectFuture[Any]) -> None:
    queue.put(cell)


def _has_ended(store: Store, folder: Path, cell: SweepCell, shared: dict[str, ArtifactReference]) -> bool:
    """Whether a cell has scores that are made from these inputs, or diverged."""
    outcome = outcome_of(folder, cell.keys[1])
    if outcome is not None and outcome.state == "diverged":
        return True
    made: dict[str, ArtifactReference] = {}
    for node in cell.own_nodes:
        bindings = cell.graph.nodes[node].bindings()
        upstream = {name: made.get(one.node) or shared[cell.graph.key(one.node)] for name, one in bindings.items()}
        digests = {name: reference.digest for name, reference in upstream.items()}
        found = store.find(cell.graph.spec(node), digests)
        if not isinstance(found, Found):
            return False
        made[node] = reference_to(found, node, "Cached")
    return True


def _told(cell: SweepCell, store: Store, folder: Path, log: Any) -> dict[str, str]:
    (one,) = states_of(store.root, folder, remember(folder, [cell]))
    log.info("%s: %s%s", cell.place.name, one.state, f" ({one.message.partition('; ')[0]})" if one.message else "")
    return {cell.place.name: "Completed" if one.state == "done" else one.state.capitalize()}


if __name__ == "__main__":
    smoltulu_sweep("surface-tiny")
