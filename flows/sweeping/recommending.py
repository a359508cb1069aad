"""The answer of a sweep as values and as patches of its recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smoltulu.artifacts.readable import clean
from smoltulu.flows.recipe import stated, whole_path
from smoltulu.schemas.recommendation import Recommendation, RecommendedPlace, TaskRegret
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.sweep import SweepSettings
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.surface.analysis import Analysis
from smoltulu.tasks.surface.choice import Chosen, choose, share_out

_MAX_EXPONENT = 1000.0
_MAX_NAME = 100  # of a recipe


def recommended(
    sweep: SweepSettings, analyses: Sequence[Analysis], weights: Mapping[str, float] | None
) -> Recommendation:
    """Choices for `weights`, for each class, and for all classes alike, of the first arm.

    ValueError: weights that are none of this sweep's; nothing to choose from for what was asked.
    """
    analysis = analyses[0]
    classes = list(dict.fromkeys(one.task.task_class for one in analysis.units))
    asked: list[tuple[str, Mapping[str, float]]] = [("your weights", weights)] if weights is not None else []
    asked += [(f"class {name}", {name: 1.0}) for name in classes]
    if len(classes) > 1:
        asked.append(("all classes", dict.fromkeys(classes, 1.0)))
    choices, notes, why = [], [], ""
    for number, (name, shares) in enumerate(asked):
        try:
            chosen = choose(share_out(analysis.tasks, analysis.units, _unmistaken(analysis, shares, name)))
        except ValueError as error:
            if weights is not None and number == 0:
                raise
            why = str(error)
            notes.append(f"{name}: {error}")
            continue
        choices.append(placed(sweep, analysis, name, chosen))
    if not choices:
        raise ValueError(f"sweep {sweep.name}: {why}")
    if len(analyses) > 1:
        notes.append(f"of arm {analysis.arm}; the page has the others")
    patches = tuple(patch_of(sweep, one) for one in choices)
    return Recommendation(
        sweep=sweep.name,
        recipe=sweep.recipe,
        stage=sweep.stage,
        choices=tuple(choices),
        patches=patches,
        recipes=tuple(yaml_of(one, patch, unit_of(sweep), notes) for one, patch in zip(choices, patches, strict=True)),
        notes=tuple(notes),
    )


def _unmistaken(analysis: Analysis, shares: Mapping[str, float], name: str) -> Mapping[str, float]:
    """Our own weights of classes as weights of their tasks: a class may be called as a task is."""
    if name == "your weights":
        return shares
    made: dict[str, float] = {}
    for task_class, weight in shares.items():
        of_class = [one for one in analysis.units if one.task.task_class == task_class]
        made |= {f"{one.task.task}:{one.task.metric}": weight / len(of_class) for one in of_class}
    return made


def placed(sweep: SweepSettings, analysis: Analysis, name: str, chosen: Chosen) -> RecommendedPlace:
    """A choice as values: learning rates for their logarithms, scores as their metric is spelt."""
    sizes = {math.log2(one.num_parameters or 1): size for size, one in sweep.sizes.items()}

    def rate(log2: float) -> float | None:
        # An interval of a nearly flat parabola may be wider than floats go.
        return float(2.0 ** min(max(log2, -_MAX_EXPONENT), _MAX_EXPONENT)) if math.isfinite(log2) else None

    tasks = []
    for one in chosen.tasks:
        sign = -1.0 if one.task.task.lower_is_better else 1.0
        tasks.append(
            TaskRegret(
                task=one.task.task.task,
                metric=one.task.task.metric,
                weight=one.weight,
                score=sign * one.score,
                regret=one.regret,
                regret_stderr=one.regret_stderr if math.isfinite(one.regret_stderr) else None,
            )
        )
    return RecommendedPlace(
        of=name,
        learning_rate=float(2.0**chosen.log2_lr),
        effective_batch_size=round(2.0**chosen.log2_batch),
        max_tokens=round(2.0**chosen.log2_tokens),
        size=sizes[chosen.log2_size],
        arm=analysis.arm,
        optimum=rate(chosen.optimum),
        low=rate(chosen.low),
        high=rate(chosen.high),
        regret=chosen.regret,
        regret_stderr=chosen.regret_stderr if math.isfinite(chosen.regret_stderr) else None,
        tasks=tuple(tasks),
        flags=chosen.flags,
    )


def patch_of(sweep: SweepSettings, place: RecommendedPlace) -> dict[str, Any]:
    """A recipe that extends the sweep's: its overrides, those of size and arm, then learning rate and batch.

    Budget and seed stay the recipe's own: a cell's are those of a trial. `extends` takes one level only, so of a recipe
    that extends another itself, what it adds is written out.

    RecipeError (a ValueError): the sweep's recipe cannot be read any more.
    """
    arm = sweep.arms[place.arm]
    fields: dict[str, Any] = {**sweep.overrides, **sweep.sizes[place.size].overrides, **arm.overrides}
    fields |= {
        f"{sweep.stage}.learning_rate": place.learning_rate,
        f"{sweep.stage}.effective_batch_size": place.effective_batch_size,
    }
    if arm.beta2_half_life_batch is not None:
        fields[f"{sweep.stage}.adam_beta2"] = 0.999 ** (place.effective_batch_size / arm.beta2_half_life_batch)
    own = stated(sweep.recipe)
    patch: dict[str, Any] = own if "extends" in own else {"extends": whole_path(sweep.recipe)}
    patch = patch | {"name": f"{sweep.name[: _MAX_NAME - 5]}-best"}
    for dotted, value in fields.items():
        at = patch
        *outer, last = dotted.split(".")
        for name in outer:
            inner = at.get(name)
            at[name] = dict(inner) if isinstance(inner, dict) else {}
            at = at[name]
        at[last] = value
    return patch


def unit_of(sweep: SweepSettings) -> str:
    """What a budget counts."""
    return "episodes" if issubclass(STAGES[sweep.stage].config, RLVRSettings) else "tokens"


def yaml_of(place: RecommendedPlace, patch: Mapping[str, Any], unit: str, notes: Sequence[str] = ()) -> str:
    """A recipe file; what is known of the place stands in comments above it. `unit`: of its budget."""
    import yaml

    lines = [
        f"{place.of}: learning rate {place.learning_rate:.4g}, effective batch {place.effective_batch_size} rows",
        f"chosen among places that were run for {place.max_tokens:,} {unit} ({place.size}, arm {place.arm}); the best "
        "rate of another budget may be another",
    ]
    if place.optimum is not None:
        interval = "no interval: single seeds"
        if place.low is not None and place.high is not None:
            interval = f"95 % interval {place.low:.3g} to {place.high:.3g}"
        lines.append(f"best rate at this batch by the parabola: {place.optimum:.3g}, {interval}")
    lines.append(f"expected regret of the whole: {_with_error(place.regret, place.regret_stderr)} standard deviations")
    lines += [
        f"- {one.task}, {one.metric} (weight {one.weight:.2g}): {one.score:.4g}, regret "
        f"{_with_error(one.regret, one.regret_stderr)}"
        for one in place.tasks
    ]
    lines += [f"flag: {flag}" for flag in place.flags]
    lines += [f"note: {note}" for note in notes]
    # A line break in a name would end its comment.
    comments = "".join(f"# {clean(' '.join(line.split()))}\n" for line in lines)
    return comments + yaml.safe_dump(dict(patch), sort_keys=False, allow_unicode=True)


def _with_error(value: float, stderr: float | None) -> str:
    if value == 0:  # no place is better, so there is no difference to have an error
        return "0"
    return f"{value:.3g}" + (f" ± {stderr:.2g}" if stderr is not None else "")
