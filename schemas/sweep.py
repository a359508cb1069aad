"""A sweep: one recipe, one training stage, and a grid of learning rates, batches, budgets, seeds, sizes and arms.

Every cell is an ordinary run of the recipe with a few fields set. What it is follows from its place alone: a grid can
be extended at any time, and only what is missing runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import MAX_NAME, MAX_PATH, StrictModel, machinery, science
from smoltulu.schemas.evaluation import LOWER_IS_BETTER

#: Learning rates and batch sizes that a surface needs at least; a scan needs none, and gets no verdict.
MIN_RATES, MIN_BATCHES = 5, 3
#: Seeds of an arm that trains on chosen rows, and of one that draws them.
MIN_SELECTION_SEEDS, MIN_RANDOM_SEEDS = 3, 5
MAX_CELLS = 20_000
_MAX_VALUES = 200
MAX_EXPONENT = 40
#: Octaves from one value to the next.
MAX_STEP = 8

_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=40)]
SweptStage = Literal["sft", "dpo", "reward_model", "rlvr"]


class LogRange(StrictModel):
    """Powers of two: 2^low, 2^(low + step), ..., 2^high."""

    low: float = science(ge=-MAX_EXPONENT, le=MAX_EXPONENT, description="log2 of the smallest value")
    high: float = science(ge=-MAX_EXPONENT, le=MAX_EXPONENT, description="log2 of the largest value")
    step: float = science(1.0, gt=0, le=MAX_STEP, description="octaves from one to the next; 0.5 is a factor of 1.41")

    @model_validator(mode="before")
    @classmethod
    def _are_exponents(cls, values: Any) -> Any:
        if not isinstance(values, (dict, LogRange)):
            raise ValueError(
                f"{str(values)[:80]} is no range; grids are spaced by powers of 2: give {{low: -16, high: -8}} for "
                "2^-16, 2^-15, ..., 2^-8, with a step for others"
            )
        for name in ("low", "high"):
            value = values.get(name) if isinstance(values, dict) else None
            if isinstance(value, (int, float)) and abs(value) > MAX_EXPONENT:
                meant = f"; for {value:g} itself write {math.log2(value):.4g}" if value > 0 else ""
                raise ValueError(f"{name} {value:g} is an exponent of 2, from -{MAX_EXPONENT} to {MAX_EXPONENT}{meant}")
        return values

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; exchange them")
        steps = (self.high - self.low) / self.step
        if abs(steps - round(steps)) > 1e-9:
            raise ValueError(
                f"from {self.low:g} to {self.high:g} there are {steps:g} steps of {self.step:g}; "
                f"the last value would be missed: end at {self.low + math.floor(steps) * self.step:g}"
            )
        if steps >= _MAX_VALUES:
            raise ValueError(f"{steps + 1:,.0f} values; {_MAX_VALUES} are allowed at most")
        return self

    @property
    def exponents(self) -> tuple[float, ...]:
        """log2 of the values."""
        num_steps = round((self.high - self.low) / self.step)
        # Rounded: two ranges that name the same value by other steps name the same cell.
        return tuple(round(self.low + number * self.step, 12) for number in range(num_steps + 1))


class SweepBlock(StrictModel):
    """A grid: every combination of its values is a cell. Blocks may overlap: a cell is run once."""

    name: _Name = machinery()
    log2_learning_rate: LogRange = science()
    log2_batch: LogRange = science(description="of effective_batch_size; whole exponents, or values that are whole")
    seeds: tuple[int, ...] = science((0, 1, 2), min_length=1)
    max_tokens: tuple[int, ...] = science(min_length=1, description="tokens of a cell; rlvr: episodes")
    sizes: tuple[_Name, ...] = science(("base",), min_length=1)
    arms: tuple[_Name, ...] = science(("main",), min_length=1)
    hours: float | None = machinery(
        None,
        gt=0,
        description="of the whole block, a cell at a time, as its author expects; what was measured counts more",
    )

    @model_validator(mode="after")
    def _values_are_places(self) -> Self:
        for name in ("seeds", "max_tokens", "sizes", "arms"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} {list(values)} has a value twice; give each once")
        if min(self.seeds) < 0 or min(self.max_tokens) < 1:
            raise ValueError(f"seeds {list(self.seeds)} and max_tokens {list(self.max_tokens)}: from 0, and from 1 on")
        if odd := [2**x for x in self.log2_batch.exponents if abs(2**x - round(2**x)) > 1e-9 or x < 0]:
            raise ValueError(f"a batch of {odd[0]:.3g} rows: batches are whole rows; give whole exponents from 0 on")
        if (high := self.log2_learning_rate.high) >= 0:
            raise ValueError(
                f"a learning rate of 2^{high:g}: rates are below 1, so their exponents below 0; for 1e-5 write -16.6"
            )
        fewest, rows = min(self.max_tokens), round(2**self.log2_batch.high)
        if fewest < rows:
            raise ValueError(
                f"max_tokens {fewest:,} is less than one step with a batch of {rows:,} rows; give more tokens (rlvr: "
                "episodes) or smaller batches"
            )
        return self


class Size(StrictModel):
    """A model of another size, trained at the same places."""

    num_parameters: int | None = science(None, ge=1, description="needed where a sweep has several sizes")
    overrides: dict[str, Any] = science({}, description="dotted recipe fields, e.g. {base_model.path: ./360m}")


class Arm(StrictModel):
    """Another way to train, at the same places."""

    overrides: dict[str, Any] = science({}, description="dotted recipe fields, e.g. {sft.lora: {r: 16}}")
    follows_seed: tuple[str, ...] = science(
        (), description="dotted recipe fields that are the cell's seed, e.g. [selection.seed]: rows drawn anew a seed"
    )
    beta2_half_life_batch: int | None = science(
        None,
        ge=1,
        description="B0: Adam forgets by tokens, beta2 = 0.999^(B / B0) (arXiv 2507.07101); none: 0.999",
    )


class SelectionRoles(StrictModel):
    """Which arm of a sweep of kind `selection` is what (docs/selection-experiment.md)."""

    selectors: tuple[_Name, ...] = science(min_length=1, description="arms that are judged, the main one first")
    random: _Name = science("random", description="control: rows drawn anew with every seed")
    longest: _Name = science("longest", description="control: the longest rows")
    lowest: _Name | None = science(None, description="rows that the first selector ranks last; shown, not judged")
    full: _Name | None = science(None, description="all rows, at the same tokens and, where given, at the same epochs")

    @property
    def arms(self) -> tuple[str, ...]:
        """All of them, in the order of tables."""
        others = (self.random, self.longest, self.lowest, self.full)
        return (*self.selectors, *(name for name in others if name is not None))


class SweptTask(StrictModel):
    """A score of every cell."""

    task: str = science(max_length=MAX_NAME, description="as the recipe's evaluation calls it")
    metric: str = science(max_length=MAX_NAME, description="e.g. bits_per_byte,none; of every item")
    task_class: _Name = science(description="e.g. reasoning, pattern: chosen before the sweep runs")
    chance: float | None = science(None, description="score of a guess: a surface at its floor says nothing")
    lower_is_better: bool = science(False)

    @model_validator(mode="before")
    @classmethod
    def _has_a_class(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("task_class"):
            raise ValueError(
                f"task {str(values.get('task'))[:80]!r} has no task_class; name one, e.g. reasoning or pattern, before "
                "the sweep runs: classes are what is compared"
            )
        return values

    @model_validator(mode="after")
    def _has_its_direction(self) -> Self:
        if (name := self.metric.partition(",")[0]) in LOWER_IS_BETTER and not self.lower_is_better:
            raise ValueError(f"task {self.task!r}: {name} is better when it is lower; add lower_is_better: true")
        return self


class SweepSettings(StrictModel):
    """One YAML file is one sweep."""

    name: str = machinery(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)
    description: str = machinery("")
    recipe: str = machinery(max_length=MAX_PATH, description="preset or path of a YAML file; cells set its fields")
    stage: SweptStage = science()
    kind: Literal["surface", "scan", "selection"] = science(
        "surface",
        description="a scan may be of any shape and has no verdict; selection compares arms that train on chosen rows",
    )
    selection: SelectionRoles | None = science(None, description="kind: selection. What its arms are")
    overrides: dict[str, Any] = science({}, description="dotted recipe fields, the same for all cells")
    blocks: tuple[SweepBlock, ...] = science(min_length=1, description="in the order in which they run")
    sizes: dict[_Name, Size] = science({"base": Size()})
    arms: dict[_Name, Arm] = science({"main": Arm()})
    tasks: tuple[SweptTask, ...] = science(min_length=1)
    max_hours: float | None = machinery(None, gt=0, description="refuse to start a sweep that is forecast to take more")
    max_edge_cells: int = machinery(
        0,
        ge=0,
        le=1000,
        description="cells that a run may add where a best learning rate is the grid's lowest or highest",
    )
    num_workers: int = machinery(2, ge=1, description="cells at a time, each in a process that stays")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        problems = []
        if (names := [block.name for block in self.blocks]) != list(dict.fromkeys(names)):
            problems.append(f"blocks {names} share a name; call each by its own")
        scores = [(one.task, one.metric) for one in self.tasks]
        if len(set(scores)) != len(scores):
            problems.append(f"a score stands twice in tasks: {scores}; give each once")
        if len(self.sizes) > 1 and (unknown := [name for name, one in self.sizes.items() if not one.num_parameters]):
            problems.append(f"sizes.{unknown[0]}: give its num_parameters, as there are several sizes")
        if len(self.sizes) > 1 and len({one.num_parameters for one in self.sizes.values()}) < len(self.sizes):
            problems.append("two sizes have the same num_parameters; what else differs is an arm")
        for what, named in (("sizes", self.sizes), ("arms", self.arms)):
            problems += [
                f"{what}.{name} sets compute.store; a sweep has one store: set it in the sweep's overrides"
                for name, one in named.items()
                if "compute.store" in one.overrides
                or (isinstance(compute := one.overrides.get("compute"), dict) and "store" in compute)
            ]
        for block in self.blocks:
            for what, known in (("sizes", self.sizes), ("arms", self.arms)):
                problems += [
                    f"block {block.name}: {what} has no {name!r}; known: {sorted(known)}"
                    for name in getattr(block, what)
                    if name not in known
                ]
        if self.kind == "surface" and not problems:
            main = max(self.blocks, key=lambda one: len(one.log2_batch.exponents))
            num_rates, num_batches = len(main.log2_learning_rate.exponents), len(main.log2_batch.exponents)
            if num_rates < MIN_RATES or num_batches < MIN_BATCHES:
                problems.append(
                    f"a surface needs {MIN_RATES} learning rates and {MIN_BATCHES} batch sizes in its largest block, "
                    f"{main.name} has {num_rates} and {num_batches}; add some, or set kind: scan (no verdict)"
                )
        num_cells = sum(_size(block) for block in self.blocks)
        if num_cells > MAX_CELLS:
            problems.append(f"{num_cells:,} cells; {MAX_CELLS:,} are allowed at most")
        if (self.kind == "selection") != (self.selection is not None):
            problems.append("kind: selection and a block `selection` that names its arms belong together; give both")
        elif self.selection is not None and self.max_edge_cells:
            problems.append(
                "an experiment with selection has no best rate that could lie at an edge; leave out max_edge_cells"
            )
        elif self.selection is not None and not problems:
            problems += _selection_problems(self, self.selection)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def with_blocks(self, blocks: Sequence[SweepBlock]) -> SweepSettings:
        """With these blocks behind its own. ValidationError where they are no blocks of this sweep."""
        return SweepSettings.model_validate({**dict(self), "blocks": (*self.blocks, *blocks)})


def _selection_problems(sweep: SweepSettings, roles: SelectionRoles) -> list[str]:
    """What an experiment with selection lacks for a verdict."""
    if len(set(roles.arms)) < len(roles.arms):
        return [f"selection: an arm has two roles in {list(roles.arms)}; give each its own"]
    if unknown := [name for name in roles.arms if name not in sweep.arms]:
        return [f"selection: there is no arm {unknown[0]!r}; known: {sorted(sweep.arms)}"]
    if "selection.seed" not in sweep.arms[roles.random].follows_seed:
        return [
            f"arms.{roles.random}: rows that are drawn once say nothing of other draws; add "
            "follows_seed: [selection.seed]"
        ]
    seeds: dict[tuple[Any, ...], dict[str, set[int]]] = {}
    for place in places(sweep):
        seeds.setdefault(place.setting, {}).setdefault(place.arm, set()).add(place.seed)
    judged = [arms for arms in seeds.values() if {roles.random, roles.longest, *roles.selectors} <= arms.keys()]
    if not judged:
        return [
            "selection: no rate, batch and budget is in the blocks of all selectors, of "
            f"{roles.random} and of {roles.longest}; put these arms into one block"
        ]
    problems = []
    for name in roles.arms:
        wanted = MIN_RANDOM_SEEDS if name == roles.random else MIN_SELECTION_SEEDS
        fewest = min((len(arms[name]) for arms in judged if name in arms), default=None)
        if fewest is None:
            problems.append(f"selection: arm {name} is never beside the others; put it into a block of theirs")
        elif fewest < wanted:
            problems.append(f"arm {name} has {fewest} seeds; give it {wanted} at least, or set kind: scan (no verdict)")
    return problems


def _size(block: SweepBlock) -> int:
    axes = (block.seeds, block.max_tokens, block.sizes, block.arms)
    grid = len(block.log2_learning_rate.exponents) * len(block.log2_batch.exponents)
    return grid * math.prod(len(axis) for axis in axes)


class Place(StrictModel):
    """Where a cell is. Two blocks that name the same place name the same cell."""

    log2_learning_rate: float
    log2_batch: float
    seed: int
    max_tokens: int
    size: str = "base"
    arm: str = "main"

    @property
    def learning_rate(self) -> float:
        """2^log2_learning_rate."""
        return float(2.0**self.log2_learning_rate)

    @property
    def effective_batch_size(self) -> int:
        """2^log2_batch rows."""
        return round(2.0**self.log2_batch)

    @property
    def setting(self) -> tuple[float, float, int, str]:
        """Rate, batch, budget and size: what arms and seeds share."""
        return self.log2_learning_rate, self.log2_batch, self.max_tokens, self.size

    @property
    def name(self) -> str:
        """Of the cell, for people and files."""
        arm = "" if self.arm == "main" else f"-{self.arm}"
        size = "" if self.size == "base" else f".{self.size}"  # no name has a dot: no two places have one name
        return f"lr{self.log2_learning_rate:+.12g}-b{self.log2_batch:.12g}-t{self.max_tokens}-s{self.seed}{arm}{size}"


def places(sweep: SweepSettings) -> dict[Place, str]:
    """Every place once, with the first block that has it, in the order in which they run."""
    found: dict[Place, str] = {}
    for block in sweep.blocks:
        for tokens, size, arm, batch, rate, seed in product(
            block.max_tokens,
            block.sizes,
            block.arms,
            block.log2_batch.exponents,
            block.log2_learning_rate.exponents,
            block.seeds,
        ):
            place = Place(log2_learning_rate=rate, log2_batch=batch, seed=seed, max_tokens=tokens, size=size, arm=arm)
            found.setdefault(place, block.name)
    return found


#: Field of a stage's block that a budget sets.
_BUDGET_FIELD = {"sft": "max_tokens", "dpo": "max_tokens", "reward_model": "max_tokens", "rlvr": "num_episodes"}
_BETA2 = 0.999


def overrides_of(sweep: SweepSettings, place: Place) -> dict[str, Any]:
    """Dotted recipe fields of a cell: common ones, its size, its arm, and its place.

    ValueError where two of them set the same field.
    """
    arm, stage = sweep.arms[place.arm], sweep.stage
    at_place: dict[str, Any] = {
        f"{stage}.learning_rate": place.learning_rate,
        f"{stage}.effective_batch_size": place.effective_batch_size,
        f"{stage}.seed": place.seed,
        f"{stage}.{_BUDGET_FIELD[stage]}": place.max_tokens,
    }
    if arm.beta2_half_life_batch is not None:
        at_place[f"{stage}.adam_beta2"] = _BETA2 ** (place.effective_batch_size / arm.beta2_half_life_batch)
    merged: dict[str, Any] = {}
    for what, fields in (
        ("overrides", sweep.overrides),
        (f"sizes.{place.size}", sweep.sizes[place.size].overrides),
        (f"arms.{place.arm}", arm.overrides),
        (f"arms.{place.arm}.follows_seed", dict.fromkeys(arm.follows_seed, place.seed)),
        ("the cell's place", at_place),
    ):
        if twice := sorted(merged.keys() & fields.keys()):
            raise ValueError(f"{what} sets {twice[0]!r}, which is set already; keep one of them")
        merged |= fields
    return merged
