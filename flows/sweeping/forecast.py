"""How long the cells of a sweep take: from those that are finished, else from what the sweep or a plan says of them.

What decides is the kind of a cell: its tokens, batch, size and arm. The seconds of a finished one were measured beside
`num_workers - 1` others, so these are divided by `num_workers`; what nobody measured is told a cell at a time.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from smoltulu.artifacts import layout, readable
from smoltulu.artifacts.store import Store, read_manifest
from smoltulu.flows.planning.plan import plan
from smoltulu.flows.sweeping.grid import SweepCell
from smoltulu.flows.sweeping.states import CellRecord, CellState, State, counts_of
from smoltulu.schemas.sweep import Place, SweepSettings, places
from smoltulu.schemas.training import SupervisedSettings
from smoltulu.tasks.evaluation.stage import evaluation

#: Finished cells of a kind that are looked at.
_MAX_SAMPLES = 5
Basis = Literal["measured", "scaled", "declared", "estimated"]


class Kind(NamedTuple):
    """What decides how long a cell takes."""

    max_tokens: int
    log2_batch: float
    size: str
    arm: str


def kind_of(place: Place) -> Kind:
    """The kind of a cell."""
    return Kind(place.max_tokens, place.log2_batch, place.size, place.arm)


class Duration(NamedTuple):
    """Seconds of a finished cell."""

    training: float
    evaluation: float


class Seconds(NamedTuple):
    """Of a cell, and where they are from."""

    value: float
    basis: Basis


@dataclass
class Forecast:
    """What is known of the durations of cells.

    num_parameters  size -> its parameters, where the sweep gives them
    measured        kind -> durations of finished cells
    declared        kind -> seconds a cell, as the sweep's author expects
    estimated       kind -> seconds a cell, as a plan estimates
    """

    num_workers: int
    num_parameters: Mapping[str, int | None]
    measured: dict[Kind, list[Duration]] = field(default_factory=lambda: defaultdict(list))
    declared: dict[Kind, float] = field(default_factory=dict)
    estimated: dict[Kind, float] = field(default_factory=dict)
    _began: float = 0.0
    _expected: float = 0.0
    _num_ended: int = 0

    def of(self, place: Place) -> Seconds | None:
        """Seconds of a cell; None where nothing is known that is like it."""
        return self.of_kind(kind_of(place))

    def of_kind(self, kind: Kind) -> Seconds | None:
        """Seconds of a cell of a kind."""
        if own := self.measured.get(kind):
            return Seconds(_middle(own), "measured")
        if (scaled := self._scaled(kind)) is not None:
            return Seconds(scaled, "scaled")
        if kind in self.declared:
            return Seconds(self.declared[kind], "declared")
        if kind in self.estimated:
            return Seconds(self.estimated[kind], "estimated")
        return None

    def _scaled(self, kind: Kind) -> float | None:
        """From the kind that is most alike: a training's time by tokens, both by parameters."""

        def distance(other: Kind) -> tuple[bool, bool, float]:
            apart = abs(math.log2(kind.max_tokens / other.max_tokens)) + abs(kind.log2_batch - other.log2_batch)
            return other.size != kind.size, other.arm != kind.arm, apart

        for other in sorted((one for one in self.measured if self.measured[one]), key=distance):
            ratio = self._size_ratio(kind.size, other.size)
            if ratio is not None:
                by_tokens = kind.max_tokens / other.max_tokens
                return median(ratio * (one.training * by_tokens + one.evaluation) for one in self.measured[other])
        return None

    def _size_ratio(self, size: str, other: str) -> float | None:
        if size == other:
            return 1.0
        wanted, there = self.num_parameters.get(size), self.num_parameters.get(other)
        return wanted / there if wanted and there else None

    def total(self, of: Iterable[Place]) -> tuple[float, int]:
        """Seconds that cells take in all, and the number of those of which nothing is known."""
        seconds, num_unknown = 0.0, 0
        for kind, number in Counter(map(kind_of, of)).items():
            if (one := self.of_kind(kind)) is None:
                num_unknown += number
            else:
                seconds += number * one.value / (self.num_workers if one.basis in ("measured", "scaled") else 1)
        return seconds, num_unknown

    # Of a run that goes on.

    def begin(self) -> None:
        """Cells begin now."""
        self._began, self._expected, self._num_ended = time.monotonic(), 0.0, 0

    def learn(self, store_root: Path, cell: CellRecord) -> None:
        """A cell has ended with scores."""
        before = self.of(cell.place)
        if (duration := duration_of(store_root, cell)) is None:
            return
        if before is None or before.basis not in ("measured", "scaled"):
            before = Seconds(sum(duration), "measured")
        self._expected += before.value / self.num_workers
        self._num_ended += 1
        self.measured[kind_of(cell.place)].append(duration)

    def time_left(self, left: Sequence[Place]) -> float | None:
        """Seconds until these cells have ended, as fast as this run was so far; None where that cannot be said."""
        seconds, num_unknown = self.total(left)
        if num_unknown or not seconds:
            return None
        if self._num_ended < 2 * self.num_workers or not self._expected:
            return seconds
        return seconds * (time.monotonic() - self._began) / self._expected


def _middle(durations: Sequence[Duration]) -> float:
    return median(sum(one) for one in durations)


def duration_of(store_root: Path, cell: CellRecord) -> Duration | None:
    """Seconds that a finished cell took; None where its manifests cannot be read."""
    found = []
    for stage, key in ((cell.stage, cell.training), (evaluation.name, cell.evaluation)):
        folder = layout.key_path(store_root, stage, key)
        try:
            pointer = layout.read_pointer(folder)
            found.append(read_manifest(folder / pointer.name).duration_seconds if pointer else None)
        except (OSError, ValueError):
            return None
    training, scoring = found
    return None if training is None or scoring is None else Duration(training, scoring)


def forecast_of(sweep: SweepSettings, store_root: Path, states: Iterable[CellState | None]) -> Forecast:
    """What finished cells and the sweep itself say."""
    forecast = Forecast(sweep.num_workers, {name: size.num_parameters for name, size in sweep.sizes.items()})
    for one in states:
        if one is None or one.state != "done":
            continue
        durations = forecast.measured[kind_of(one.cell.place)]
        if len(durations) < _MAX_SAMPLES and (duration := duration_of(store_root, one.cell)) is not None:
            durations.append(duration)
    own: dict[str, list[Place]] = defaultdict(list)
    for place, name in places(sweep).items():
        own[name].append(place)
    for block in sweep.blocks:
        if block.hours is not None:  # shared out by tokens and parameters
            work = {
                place: place.max_tokens * (sweep.sizes[place.size].num_parameters or 1) for place in own[block.name]
            }
            for place, share in work.items():
                forecast.declared.setdefault(kind_of(place), 3600 * block.hours * share / sum(work.values()))
    return forecast


@dataclass(frozen=True)
class Needs:
    """What a plan says of a cell of one kind; None: not known.

    device_bytes  that a training holds at least on its device: weights, gradients, Adam's moments
    disk_bytes    of its model
    shared        key -> (node, status), of what it has in common with others
    """

    device_bytes: int | None
    disk_bytes: int | None
    shared: dict[str, tuple[str, str]]


def estimate(forecast: Forecast, cells: Iterable[SweepCell], store: Store) -> dict[Kind, Needs]:
    """Plan one cell of every kind, note its seconds where the plan tells them, and return what else it needs."""
    needs: dict[Kind, Needs] = {}
    for cell in cells:
        kind = kind_of(cell.place)
        if kind in needs:
            continue
        rows = {row.node: row for row in plan(cell.graph.recipe, None, (), store, cell.graph).rows}
        training, scoring = rows[cell.training], rows[cell.evaluation]
        shared = {rows[node].key: (node, str(rows[node].status)) for node in cell.shared_nodes}
        needs[kind] = Needs(training.device_bytes, training.estimate.disk_bytes, shared)
        seconds = training.estimate.seconds
        if seconds is None:
            seconds = _by_operations(cell, training.device_bytes)
        if seconds is not None:
            forecast.estimated[kind] = seconds + (scoring.estimate.seconds or 0.0)
    return needs


def _by_operations(cell: SweepCell, device_bytes: int | None) -> float | None:
    """Seconds of a training whose budget is in tokens, by compute.device_tflops: its rows need not be there."""
    node = cell.graph.nodes[cell.training]
    settings, compute = node.config, cell.graph.compute_of(node)
    if compute.device_tflops is None or device_bytes is None or not isinstance(settings, SupervisedSettings):
        return None
    size = device_bytes / settings.bytes_per_parameter
    flops = node.stage.flops(settings) * size * cell.place.max_tokens
    return float(flops / (compute.device_tflops * 1e12 * compute.num_processes))


@dataclass(frozen=True)
class BlockForecast:
    """A block: its cells by state, what is missing in seconds, and where these are from."""

    name: str
    counts: dict[State, int]
    seconds: float
    num_unknown: int
    bases: tuple[Basis, ...]

    @property
    def num_cells(self) -> int:
        """Of the block that none before it has."""
        return sum(self.counts.values())

    @property
    def num_missing(self) -> int:
        """Cells that a run would make."""
        return self.num_cells - self.counts["done"] - self.counts["diverged"]


def by_block(sweep: SweepSettings, forecast: Forecast, states: Mapping[Place, CellState | None]) -> list[BlockForecast]:
    """Every block, in the order in which they run. `states`: None for a cell that no run has asked for."""
    of_block: dict[str, list[Place]] = defaultdict(list)
    for place, name in places(sweep).items():
        if place in states:
            of_block[name].append(place)
    made = []
    for block in sweep.blocks:
        here = of_block[block.name]
        missing = [place for place in here if (one := states[place]) is None or one.state not in ("done", "diverged")]
        seconds, num_unknown = forecast.total(missing)
        kinds = dict.fromkeys(map(kind_of, missing))
        bases = dict.fromkeys(known.basis for kind in kinds if (known := forecast.of_kind(kind)) is not None)
        counts = counts_of(states[place] for place in here)
        made.append(BlockForecast(block.name, counts, seconds, num_unknown, tuple(bases)))
    return made


def check_limit(sweep: SweepSettings, blocks: Sequence[BlockForecast]) -> str | None:
    """What to know where `max_hours` cannot be held against cells of which nothing is known.

    ValueError where the cells that are missing are forecast to take longer than `max_hours`.
    """
    if sweep.max_hours is None:
        return None
    seconds, num_unknown = sum(one.seconds for one in blocks), sum(one.num_unknown for one in blocks)
    num_missing = sum(one.num_missing for one in blocks)
    if seconds > 3600 * sweep.max_hours:
        raise ValueError(
            f"sweep {sweep.name}: its {num_missing:,} missing cells are forecast to take {readable.duration(seconds)}, "
            f"max_hours allows {sweep.max_hours:g} h; run a part (--block {blocks[0].name}), or raise max_hours"
        )
    if num_unknown:
        return (
            f"max_hours {sweep.max_hours:g} cannot be held against {num_unknown:,} cells: nothing like them was run "
            "here. Give their blocks hours, or compute.device_tflops, for a forecast before the first cell"
        )
    return None
