"""What is wrong with the cells of a sweep that no field of them shows: asked before anything is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from smoltulu.flows.sweeping.grid import SweepCell
from smoltulu.flows.sweeping.states import CellRecord
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.budget import steps_for_tokens
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.schedules import Budgets
from smoltulu.schemas.selection import SelectionSettings
from smoltulu.schemas.sweep import Place, SweepSettings
from smoltulu.schemas.training import SupervisedSettings, TrainingSettings

#: More tokens than asked for, as a share: above it a sweep says so, as a budget is what a surface compares.
_ROUNDED_UP = 0.1
#: Fields of schedules that are in optimizer steps, and what to give instead.
IN_STEPS = {"warmup_steps": "warmup_ratio", "decay_steps": "decay_ratio", "half_life_steps": "another decay_shape"}


def check_fractions(sweep: SweepSettings, cells: Sequence[SweepCell]) -> None:
    """ValueError where a schedule is given in steps: cells of other batches or budgets would have another schedule."""
    if len({(cell.place.log2_batch, cell.place.max_tokens) for cell in cells}) < 2:
        return
    for cell in cells:
        schedule = _settings(cell).schedule
        if isinstance(schedule, Budgets):
            raise ValueError(
                f"sweep {sweep.name}: {sweep.stage}.schedule has budgets {list(schedule.budgets)} in steps, and its "
                "cells have other numbers of steps; take a schedule whose parts are shares of the run (linear, cosine, "
                "constant, wsd with decay_ratio)"
            )
        for field, instead in IN_STEPS.items():
            if value := getattr(schedule, field, None):
                raise ValueError(
                    f"sweep {sweep.name}: {sweep.stage}.schedule has {field} {value:g}, which is another share of the "
                    f"run at every batch and budget; give {instead} instead"
                )


def check_apart(sweep: SweepSettings, records: Iterable[CellRecord]) -> None:
    """ValueError where two arms, or two sizes, are the same trainings at every place that both have."""
    trainings: dict[tuple[str, str], dict[Place, str]] = defaultdict(dict)
    for record in records:
        place = record.place
        bare = place.model_copy(update={"size": "", "arm": ""})
        trainings[place.size, place.arm][bare] = record.training
    for one, other in combinations(trainings, 2):
        if any(sweep.arms[arm].beta2_half_life_batch for _, arm in (one, other)):
            continue  # at one batch it is the fixed beta2
        common = trainings[one].keys() & trainings[other].keys()
        if common and all(trainings[one][place] == trainings[other][place] for place in common):
            raise ValueError(
                f"sweep {sweep.name}: size {other[0]}, arm {other[1]} has duplicates of the cells of size {one[0]}, "
                f"arm {one[1]} at all {len(common):,} places; give it overrides of its own, or remove it"
            )


def check_selection(sweep: SweepSettings, cells: Iterable[SweepCell]) -> None:
    """ValueError where arms of an experiment with selection are not what their roles say, or not at equal tokens."""
    roles = sweep.selection
    if roles is None:
        return
    keeps: dict[str, tuple[str, float]] = {}
    of_sizes = {(cell.place.size, cell.place.arm): cell for cell in cells}
    of_arms = {arm: cell for (_, arm), cell in of_sizes.items()}
    for size, arm in of_sizes:
        if arm != roles.lowest or (size, roles.selectors[0]) not in of_sizes:
            continue
        first, last = (of_sizes[size, name].graph.recipe.selector for name in (roles.selectors[0], arm))
        if first is not None and (last is None or last != _other_end(first, last.seed)):  # seeds may follow the cell
            raise ValueError(
                f"sweep {sweep.name}: arm {roles.lowest} is to have the rows that arm {roles.selectors[0]} ranks last; "
                f"give it the same block `selection`, with keep.order {_other_end(first, 0).keep.order}"
            )
    for arm, cell in of_arms.items():
        selector, rows = cell.graph.recipe.selector, cell.graph.recipe.rows_of(sweep.stage)
        if arm not in roles.arms or (selector is None and arm == roles.full):
            continue
        wanted = {roles.random: "random", roles.longest: "length"}.get(arm, "" if selector is None else selector.method)
        if arm == roles.full:
            wanted = "none"
        method = "none" if selector is None else selector.method
        if method != wanted or (arm == roles.longest and selector is not None and selector.keep.order != "highest"):
            order = f", keep.order {selector.keep.order}" if selector is not None else ""
            raise ValueError(
                f"sweep {sweep.name}: arm {arm} has selection.method {method}{order}; its role needs "
                f"{wanted or 'a method that scores rows'}{', keep.order highest' if arm == roles.longest else ''}"
            )
        assert selector is not None
        if rows not in selector.sets:
            raise ValueError(
                f"sweep {sweep.name}: arm {arm} selects from {', '.join(selector.sets)}, but {sweep.stage} is trained "
                f"on data.{rows}; set selection.sets to [{rows}]"
            )
        if selector.use == "filter":  # weights keep every row
            keeps[arm] = selector.keep.amount
    if len(set(keeps.values())) > 1 or any(name not in ("tokens", "token_share") for name, _ in keeps.values()):
        told = ", ".join(f"{arm}: {name} {value:g}" for arm, (name, value) in keeps.items())
        raise ValueError(
            f"sweep {sweep.name}: its arms are not at equal tokens ({told}); give all of them the same "
            "selection.keep.tokens or selection.keep.token_share"
        )


def _other_end(selector: SelectionSettings, seed: int) -> SelectionSettings:
    order = "lowest" if selector.keep.order == "highest" else "highest"
    return selector.model_copy(update={"seed": seed, "keep": selector.keep.model_copy(update={"order": order})})


def check_steps(sweep: SweepSettings, cells: Iterable[SweepCell], shared: Mapping[str, ArtifactReference]) -> list[str]:
    """What to know of the number of steps of the cells, now that their rows are counted.

    ValueError where a budget has fewer tokens than one step.

    shared  by key; cells whose rows are not there are left out
    """
    told, most, worst = [], 0, (0.0, "")
    save_steps = None
    for cell in cells:
        node, settings = cell.graph.nodes[cell.training], _settings(cell)
        if not isinstance(settings, SupervisedSettings):
            continue
        rows = shared.get(cell.graph.key(node.bindings()["dataset"].node))
        counts = {name: (rows.outputs if rows else {}).get(name) for name in ("num_rows", "num_tokens")}
        num_rows, num_tokens = counts["num_rows"], counts["num_tokens"]
        if not isinstance(num_rows, int) or not isinstance(num_tokens, int) or not num_rows or not num_tokens:
            continue
        batch, budget = settings.effective_batch_size, cell.place.max_tokens
        per_step = batch * num_tokens / num_rows
        if budget < per_step:
            raise ValueError(
                f"sweep {sweep.name}, cell {cell.place.name}: max_tokens {budget:,} is less than one step, which has "
                f"{per_step:,.0f} tokens ({batch} rows of {num_tokens / num_rows:,.0f}); give at least that many, or "
                f"batches of at most {int(budget * num_rows / num_tokens):,} rows"
            )
        num_steps = steps_for_tokens(budget, num_rows, num_tokens, batch)
        most = max(most, num_steps)
        worst = max(worst, (num_steps * per_step / budget - 1, f"{cell.place.name} ({num_steps} steps)"))
        save_steps = _asked_save_steps(cell)
    if worst[0] > _ROUNDED_UP:
        told.append(
            f"budgets are rounded up to whole steps: cell {worst[1]} has {worst[0]:.0%} more tokens than its "
            "max_tokens; larger budgets or smaller batches come closer"
        )
    if save_steps is not None and 0 < most < save_steps:
        told.append(
            f"compute.save_steps {save_steps} is never reached: the longest cell has {most:,} steps. One that is "
            "killed begins again; lower it to keep checkpoints, or leave it out"
        )
    return told


def _settings(cell: SweepCell) -> TrainingSettings:
    config = cell.graph.nodes[cell.training].config
    assert isinstance(config, TrainingSettings)
    return config


def _asked_save_steps(cell: SweepCell) -> int | None:
    """What the recipe says of checkpoints; None where it leaves that to the default."""
    compute, stage = cell.graph.compute, cell.graph.nodes[cell.training].stage.name
    save_steps = compute.of(stage).save_steps
    return None if save_steps == ComputeSettings().save_steps else save_steps
