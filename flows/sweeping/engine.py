"""Runs what is missing of a sweep. How a cell is started is the caller's: as a task of Prefect, or in a thread.

Shared nodes first, one after the other; then cells, `num_workers` at a time, in the order of their blocks; then the
cells at edges that a run may add. What a cell came to is written down here, by one thread, as soon as it ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from smoltulu.artifacts import layout, readable
from smoltulu.artifacts.store import Found, Log, Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.runs import begin_run, end_run, extend_run
from smoltulu.flows.sweeping.checks import check_apart, check_fractions, check_selection, check_steps
from smoltulu.flows.sweeping.extension import edge_blocks, num_edge_cells, with_extension, write_extension
from smoltulu.flows.sweeping.forecast import by_block, check_limit, estimate, forecast_of
from smoltulu.flows.sweeping.grid import SweepCell, cells_of, store_of
from smoltulu.flows.sweeping.results import up_to_date_page
from smoltulu.flows.sweeping.scores import load_scores
from smoltulu.flows.sweeping.states import (
    CellState,
    State,
    check_unchanged,
    counted,
    counts_of,
    forget_outcome,
    outcome_of,
    records_of,
    remember,
    states_of,
    sweep_folder,
    write_outcome,
)
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.sweep import Place, SweepBlock, SweepSettings, places
from smoltulu.tasks.engine.runner import reference_to, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.stage import Diverged

References = dict[str, ArtifactReference]


@dataclass(frozen=True)
class Made:
    """What nodes of a cell came to. diverged: why its training led nowhere; empty where it did not."""

    references: Mapping[str, ArtifactReference]
    diverged: str = ""


class Future(Protocol):
    """Of `concurrent.futures` and of Prefect."""

    def result(self) -> Any: ...
    def add_done_callback(self, fn: Callable[[Any], Any]) -> Any: ...


#: Starts nodes of a cell: (cell, nodes, what they are made from) -> a future of `Made`.
Submit = Callable[[SweepCell, tuple[str, ...], References], Future]


def make_nodes(cell: SweepCell, nodes: Sequence[str], upstream: References, store: Store, log: Log) -> Made:
    """Run nodes of a cell one after the other. Errors: as `run_stage`, but for a training that diverged."""
    made = dict(upstream)
    for node in nodes:
        try:
            made[node] = run_stage(cell.graph.job(node, made), store, log)
        except Diverged as error:
            if node != cell.training:
                raise
            return Made({}, diverged=str(error))
    return Made({node: made[node] for node in nodes})


class _Cells(NodeGraph):
    """Every node of every cell once, for the record of the run: gc keeps them while it runs."""

    def __init__(self, name: str, cells: Sequence[SweepCell]) -> None:
        super().__init__(name, cells[0].graph.compute)
        for cell in cells:
            own = cell.own_nodes
            for node in (*cell.shared_nodes, *own):
                name, key = f"{cell.place.name}.{node}" if node in own else node, cell.graph.key(node)
                if self._keys.get(name, key) != key:  # of another size or arm
                    name = f"{name}.{key[:12]}"
                self.nodes[name], self._keys[name] = cell.graph.nodes[node], key


class SweepRun:
    """One run of a sweep. Call `run`, and `end` whatever it came to."""

    def __init__(
        self,
        asked: SweepSettings,
        run_name: str,
        log: Log,
        *,
        blocks: Sequence[str] = (),
        minutes: float | None = None,
        flow_run_id: str = "",
    ) -> None:
        """Check everything that can be checked before anything runs.

        blocks   names of those to run; none: all, and then cells at edges
        minutes  no cell starts that is not forecast to end within so many; none: no limit

        Raises:
            ValueError: no such block; cells that the recipe, its schedule or the forecast limit does not allow, or that
                have ended as other trainings.
        """
        self.log, self._own, self._blocks = log, asked, tuple(blocks)
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.store_root = store_of(asked)
        self.folder = sweep_folder(self.store_root, asked.name)
        self._outcomes: dict[str, str] = {}  # by name of the cell
        self._left: list[Place] = []  # that are asked for and have not ended
        self._num_running = 0
        self._shared: References = {}  # by key
        self._broken: dict[str, str] = {}  # key of what cells share and could not be made -> why
        self._take(with_extension(asked, self.folder))
        self.store = open_store(self.cells[0].graph.compute)
        self.forecast = forecast_of(self.sweep, self.store_root, self.states())
        self._check_limit()
        remember(self.store_root, self.folder, self._whole)
        log.info("sweep %s: %d cells, store %s", asked.name, len(self.cells), self.store_root)
        self._record = begin_run(self.store, run_name, _Cells(asked.name, self.cells), flow_run_id)

    def _take(self, sweep: SweepSettings) -> None:
        """The cells of a sweep; of blocks, where these are asked for."""
        known = [block.name for block in sweep.blocks]
        if unknown := [name for name in self._blocks if name not in known]:
            raise ValueError(f"sweep {sweep.name} has no block {unknown[0]!r}; its blocks: {', '.join(known)}")
        self.sweep, self._whole = sweep, list(cells_of(sweep))
        self.cells = [cell for cell in self._whole if not self._blocks or cell.block in self._blocks]
        records = records_of(self._whole)
        self._records = {record.place: record for record in records}
        check_fractions(sweep, self._whole)
        check_selection(sweep, self._whole)
        check_apart(sweep, records)
        check_unchanged(self.store_root, self.folder, records)

    def _check_limit(self) -> None:
        if self.sweep.max_hours is not None:
            estimate(self.forecast, self.cells, self.store)
            states = {one.cell.place: one for one in self.states()}
            if (note := check_limit(self.sweep, by_block(self.sweep, self.forecast, states))) is not None:
                self.log.warning("%s", note)

    def run(self, submit: Submit) -> str:
        """Run what is missing. Returns the state: Completed, or Failed where a cell failed."""
        self._run_cells(self.cells, submit)
        # Of half a grid the best rate is often the last one: edges are for a grid that has ended.
        while not self._blocks and not self._left and (added := self._added()):
            self._run_cells(added, submit)
        return "Failed" if "Failed" in self._outcomes.values() else "Completed"

    def end(self, state: str, page: str = "") -> None:
        """Write down how the run ended."""
        end_run(self.store, self._record, state, self._outcomes, page)

    def states(self) -> list[CellState]:
        """The state of every cell that was asked for."""
        return states_of(self.store_root, self.folder, [self._records[cell.place] for cell in self.cells])

    def counted(self) -> str:
        """Their number in each state, in words."""
        return f"sweep {self.sweep.name}: {counted(counts_of(self.states()))}"

    def _run_cells(self, cells: Sequence[SweepCell], submit: Submit) -> None:
        for cell in cells:
            self._make_shared(cell, submit)
        able = [cell for cell in cells if cell.place.name not in self._outcomes]
        for note in check_steps(self.sweep, able, self._shared):
            self.log.warning("%s", note)
        waiting = [cell for cell in able if not self._has_ended(cell)]
        self._left = [cell.place for cell in waiting]
        self.log.info("%d of %d cells are missing%s", len(waiting), len(cells), self._time_left())
        self.forecast.begin()
        ended: SimpleQueue[tuple[SweepCell, Future]] = SimpleQueue()
        for cell in waiting:
            if self._num_running == self.sweep.num_workers:
                self._take_in(*ended.get())
            if self._is_late(cell):
                num_left = len(self._left) - self._num_running
                self.log.warning("the time is over: %d cells are left for the next run", num_left)
                break
            forget_outcome(self.folder, self._records[cell.place])
            future = submit(cell, cell.own_nodes, self._upstream(cell))
            future.add_done_callback(partial(_put, ended, cell))
            self._num_running += 1
        while self._num_running:
            self._take_in(*ended.get())

    def _make_shared(self, cell: SweepCell, submit: Submit) -> None:
        """What a cell shares with others; where that cannot be made it fails, unless it has ended already."""
        for node in cell.shared_nodes:
            key = cell.graph.key(node)
            if key not in self._shared and key not in self._broken:
                try:
                    self._shared[key] = submit(cell, (node,), self._upstream(cell)).result().references[node]
                except Exception as error:
                    self._broken[key] = str(error)
            if key in self._broken:
                (now,) = states_of(self.store_root, self.folder, [self._records[cell.place]])
                if now.state in ("done", "diverged"):
                    self._outcomes[cell.place.name] = "Cached" if now.state == "done" else "Diverged"
                else:
                    self._close(cell, "failed", self._broken[key])
                return

    def _upstream(self, cell: SweepCell) -> References:
        keys = {node: cell.graph.key(node) for node in cell.shared_nodes}
        return {node: self._shared[key] for node, key in keys.items() if key in self._shared}

    def _is_late(self, cell: SweepCell) -> bool:
        if self._deadline is None:
            return False
        seconds = self.forecast.of(cell.place)
        return time.monotonic() + (seconds.value if seconds else 0.0) > self._deadline

    def _take_in(self, cell: SweepCell, future: Future) -> None:
        """A cell has ended."""
        self._num_running -= 1
        state: State
        try:
            made = future.result()
            state, message = ("diverged", made.diverged) if made.diverged else ("done", "")
        except Exception as error:
            state, message = "failed", str(error)
        self._left.remove(cell.place)
        if state == "done":
            self.forecast.learn(self.store_root, self._records[cell.place])
        self._close(cell, state, message)

    def _close(self, cell: SweepCell, state: State, message: str) -> None:
        """Write down what a cell came to, and tell it."""
        if state in ("failed", "diverged"):
            write_outcome(self.folder, self._records[cell.place], state, message)
        self._outcomes[cell.place.name] = "Completed" if state == "done" else state.capitalize()
        why = f" ({message.partition('; ')[0]})" if message else ""
        self.log.info("%s: %s%s; %s%s", cell.place.name, state, why, self._so_far(), self._time_left())

    def _so_far(self) -> str:
        ended = Counter(self._outcomes.values())
        done = f"{ended['Completed'] + ended['Cached']} done"
        others = [f"{ended[name.capitalize()]} {name}" for name in ("diverged", "failed") if ended[name.capitalize()]]
        waiting = f"{len(self._left) - self._num_running} to go"
        return ", ".join([done, *others, *([f"{self._num_running} running"] if self._num_running else []), waiting])

    def _time_left(self) -> str:
        seconds = self.forecast.time_left(self._left)
        return f", about {readable.duration(seconds)} left" if seconds else ""

    def _has_ended(self, cell: SweepCell) -> bool:
        """Whether a cell has scores that are made from these inputs, or diverged."""
        outcome = outcome_of(self.folder, self._records[cell.place])
        if outcome is not None and outcome.state == "diverged":
            self._outcomes[cell.place.name] = "Diverged"
            return True
        made = self._upstream(cell)
        for node in cell.own_nodes:
            bindings = cell.graph.nodes[node].bindings()
            digests = {name: made[binding.node].digest for name, binding in bindings.items() if binding.node in made}
            spec = cell.graph.spec(node)
            found = self.store.find(spec, digests)
            if not isinstance(found, Found):
                if node != cell.evaluation and layout.read_pointer(self.store.folder(spec)) is None:
                    continue  # never made or removed since, as models are large: its scores say what it was
                return False
            self.store.touch(found)
            made[node] = reference_to(found, node, "Cached")
        self._outcomes[cell.place.name] = "Cached"
        return True

    def _added(self) -> list[SweepCell]:
        """Cells that somebody added since this run began; without these, cells beyond edges that hold an optimum."""
        before = set(self._records)
        try:
            whole = with_extension(self._own, self.folder)
            if not places(whole).keys() - before:
                whole = self._with_edges(whole)
            if not places(whole).keys() - before:
                return []
            self._take(whole)
            remember(self.store_root, self.folder, self._whole)
        except ValueError as error:
            self.log.warning("no cells are added: %s", error)
            return []
        self._record = extend_run(self.store, self._record, _Cells(self.sweep.name, self.cells))
        return [cell for cell in self.cells if cell.place not in before]

    def _with_edges(self, sweep: SweepSettings) -> SweepSettings:
        """With blocks beyond edges that hold an optimum, written down in this store. ValueError as `load_scores`."""
        if (left := sweep.max_edge_cells - num_edge_cells(sweep)) <= 0:
            return sweep
        states, blocks = self.states(), list[SweepBlock]()
        for arm in sweep.arms:
            if any(one.state == "done" and one.cell.place.arm == arm for one in states):
                scores = load_scores(sweep, self.store_root, states, arm)
                blocks += edge_blocks(sweep.with_blocks(blocks), scores, left - sum(len(one.seeds) for one in blocks))
        if not blocks:
            return sweep
        num_cells = sum(len(one.seeds) for one in blocks)
        self.log.info("%d cells are added where the best learning rate of a task is the last one", num_cells)
        return write_extension(self._own, self.folder, blocks)


def page_at_end(run: SweepRun, log: Log) -> tuple[str, list[str]]:
    """The page of a run and its verdicts; none where that fails. Hours of training are not lost to a figure."""
    try:
        page, words = up_to_date_page(run.sweep, run.store_root)
        return str(page), words
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        log.warning("no page, although the cells are whole: %s", said)
        return "", []


def _put(queue: SimpleQueue[tuple[SweepCell, Future]], cell: SweepCell, future: Future) -> None:
    queue.put((cell, future))
