"""A size ladder, or wind tunnel: sweeps of small models that predict the best learning rate of one that is too large.

The proxies are an ordinary sweep over several sizes. Its optima are followed to the target, and a few trainings of the
target around the predicted rate say what the prediction cost.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from smoltulu.schemas.common import MAX_NAME, StrictModel, machinery, science
from smoltulu.schemas.sweep import LogRange, Size, SweepBlock, SweepSettings

#: Name of the target among the sizes of the sweep that confirms, and of its block.
TARGET, CONFIRMATION = "target", "confirmation"
#: The predicted rate is rounded to this part of an octave: an optimum that moves by less finds its confirmation again.
STEPS_PER_OCTAVE = 8
_MIN_SIZES = 2
#: Of parameters and of tokens.
MAX_COUNT = 10**15


class LadderTarget(StrictModel):
    """The model that the prediction is for, and how it is to be trained."""

    num_parameters: int = science(ge=1, le=MAX_COUNT, description="counted as those of the proxies")
    overrides: dict[str, Any] = science({}, description="dotted recipe fields, e.g. {base_model.path: ./1.7b}")
    log2_batch: float = science(ge=0, le=40, description="of effective_batch_size")
    max_tokens: int = science(ge=1, le=MAX_COUNT, description="of the confirmation; rlvr: episodes")
    seeds: tuple[int, ...] = science((0,), min_length=1)
    octaves: LogRange = science(
        LogRange(low=-1, high=1),
        description="rates of the confirmation, from the predicted one (0) on",
    )
    hours: float | None = machinery(None, gt=0, description="of the confirmation, as its author expects")

    @model_validator(mode="after")
    def _has_the_prediction(self) -> Self:
        if 0.0 not in self.octaves.exponents:
            raise ValueError(
                f"octaves from {self.octaves.low:g} to {self.octaves.high:g} in steps of {self.octaves.step:g} leave "
                "out 0, the predicted rate itself; give e.g. {low: -1, high: 1}"
            )
        return self


class LadderSettings(StrictModel):
    """One YAML file is one ladder."""

    name: str = machinery(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=80)
    description: str = machinery("")
    proxies: SweepSettings = science(description="a sweep over two sizes at least")
    target: LadderTarget = science()
    task: str | None = science(
        None,
        max_length=MAX_NAME,
        description="whose prediction is tested; none: the first of proxies.tasks",
    )
    overlays: tuple[Literal["step-law"], ...] = machinery((), description="laws of others, drawn beside ours")
    max_hours: float | None = machinery(
        None, gt=0, description="refuse to start where proxies and confirmation are forecast to take more"
    )

    @model_validator(mode="after")
    def _leads_up(self) -> Self:
        proxies, target, problems = self.proxies, self.target, []
        sizes = {name: size.num_parameters for name, size in self.proxy_sizes.items()}
        if len(sizes) < _MIN_SIZES:
            problems.append(
                f"proxies run {len(sizes)} size ({', '.join(sorted(sizes))}); a ladder needs {_MIN_SIZES}, better 3: "
                "give proxies.sizes more, and name them in a block"
            )
        largest = max((number or 0 for number in sizes.values()), default=0)
        if target.num_parameters <= largest:
            problems.append(
                f"target has {target.num_parameters:,} parameters, the largest proxy {largest:,}; a ladder leads to a "
                "larger model: sweep this one itself, or give smaller proxies"
            )
        if list(proxies.arms) != ["main"]:
            problems.append(f"proxies have arms {sorted(proxies.arms)}; a ladder follows one: keep main")
        if TARGET in proxies.sizes:
            problems.append(f"a proxy is called {TARGET}; call it otherwise")
        if (most := max(x for block in proxies.blocks for x in block.max_tokens)) > MAX_COUNT:
            problems.append(f"proxies have a budget of {most:.3g} tokens; {MAX_COUNT:.0e} are allowed at most")
        tasks = [one.task for one in proxies.tasks]
        if self.task is not None and self.task not in tasks:
            problems.append(f"task {self.task!r} is none of proxies.tasks; name one of {', '.join(tasks)}")
        if proxies.name == self.confirmation_name:
            problems.append(f"proxies are called {proxies.name}, as the confirmation is; call them otherwise")
        for what, values, wanted in (
            ("batch", {2**x for block in proxies.blocks for x in block.log2_batch.exponents}, 2**target.log2_batch),
            ("budget", {float(x) for block in proxies.blocks for x in block.max_tokens}, float(target.max_tokens)),
        ):
            if len(values) == 1 and wanted not in values:
                problems.append(
                    f"target has a {what} of {wanted:,.0f} and all proxies have {values.pop():,.0f}: nothing would "
                    f"tell what a change of {what} does; give the proxies a second {what}, or the target theirs"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def proxy_sizes(self) -> dict[str, Size]:
        """Those that a block runs."""
        used = {name for block in self.proxies.blocks for name in block.sizes}
        return {name: size for name, size in self.proxies.sizes.items() if name in used}

    @property
    def confirmation_name(self) -> str:
        """Of the sweep that tests the prediction."""
        return f"{self.name}-{CONFIRMATION}"

    @property
    def decisive(self) -> int:
        """Position in proxies.tasks of the score whose prediction is tested."""
        return next(n for n, one in enumerate(self.proxies.tasks) if self.task in (None, one.task))

    def confirmation(self, log2_learning_rate: float) -> SweepSettings:
        """The sweep that tests a predicted rate: ordinary cells of the target, apart from the proxies.

        ValueError where the rates around it are none that a training takes.
        """
        target, center = self.target, round(log2_learning_rate * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE
        low, high = center + target.octaves.low, center + target.octaves.high
        block = SweepBlock(
            name=CONFIRMATION,
            log2_learning_rate=LogRange(low=low, high=high, step=target.octaves.step),
            log2_batch=LogRange(low=target.log2_batch, high=target.log2_batch),
            seeds=target.seeds,
            max_tokens=(target.max_tokens,),
            sizes=(TARGET,),
            hours=target.hours,
        )
        changes = {
            "name": self.confirmation_name,
            "kind": "scan",
            "sizes": {TARGET: Size(num_parameters=target.num_parameters, overrides=target.overrides)},
            "blocks": (block,),
            "max_edge_cells": 0,
            "max_hours": None,
        }
        return SweepSettings.model_validate(dict(self.proxies) | changes)

    def whole(self, log2_learning_rate: float | None = None) -> SweepSettings:
        """Proxies and confirmation as one sweep, for a forecast; without a prediction the target's rates are any."""
        if log2_learning_rate is None:
            rates = self.proxies.blocks[0].log2_learning_rate.exponents
            log2_learning_rate = rates[len(rates) // 2] - max(self.target.octaves.high, 0)
        last = self.confirmation(log2_learning_rate)
        changes = {
            "name": self.name,
            "sizes": self.proxy_sizes | last.sizes,
            "blocks": (*self.proxies.blocks, *last.blocks),
            "max_hours": self.max_hours,
        }
        return SweepSettings.model_validate(dict(self.proxies) | changes)
