"""A size ladder: from its file to its settings, and what it costs. What it says is in ladder_results.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from smoltulu.artifacts import readable
from smoltulu.artifacts.store import Log, Store
from smoltulu.flows.recipe import RecipeError, check_secrets, load_recipe
from smoltulu.flows.sweeping.forecast import BlockForecast, by_block, estimate, forecast_of
from smoltulu.flows.sweeping.grid import cells_of, ladder_names, values_of
from smoltulu.flows.sweeping.ladder_results import result_of
from smoltulu.flows.sweeping.states import CellState, records_of, states_of, sweep_folder
from smoltulu.schemas.common import problems_of
from smoltulu.schemas.ladder import LadderSettings
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.sweep import Place, SweepSettings, overrides_of, places
from smoltulu.tasks.engine.stores import open_store

#: What all sizes must have in common, besides the swept stage: else another optimum need not come from the size.
_COMMON = ("world", "data", "sampled", "contamination", "chat_template", "add_bos_token", "evaluation")


def load_ladder(name: str | dict[str, Any] | LadderSettings) -> LadderSettings:
    """A shipped ladder by its name, the path of a YAML file, or a ladder written out.

    Raises:
        RecipeError: every problem at once; what cannot be read, or holds a secret; sizes that are trained otherwise.
    """
    if isinstance(name, LadderSettings):
        return name
    values = name if isinstance(name, dict) else values_of(name, "ladder", ladder_names())
    if not isinstance(values, dict):
        raise RecipeError(f"a ladder is an object with name, proxies and target; got {type(values).__name__}")
    if "blocks" in values:
        raise RecipeError("this is a sweep, not a ladder; run it by `smoltulu sweep`, or put it under proxies")
    check_secrets(values, "ladder")
    try:
        ladder = LadderSettings.model_validate(values)
        ladder.whole()
    except ValidationError as error:
        raise RecipeError(
            f"ladder {values.get('name', 'without a name')!r}:\n" + "\n".join(problems_of(error))
        ) from None
    check_common(ladder)
    return ladder


def check_common(ladder: LadderSettings) -> None:
    """RecipeError where the target, or a proxy, is trained on other data or by other settings than the rest.

    So too where it is in another store, or is the model of another size.
    """
    whole = ladder.whole()
    recipe_of = {}
    for place in places(whole):
        if place.size not in recipe_of:
            try:
                recipe_of[place.size] = load_recipe(whole.recipe, overrides_of(whole, place))
            except ValueError as error:
                raise RecipeError(f"ladder {ladder.name}, size {place.size}: {error}") from None
    first = next(iter(recipe_of))
    size_of: dict[str, str] = {}
    for size, recipe in recipe_of.items():
        if (other := size_of.setdefault(recipe.base_model.model_dump_json(), size)) != size:
            raise RecipeError(
                f"ladder {ladder.name}: {other} and {size} are the same model; give each its own base_model "
                "in overrides"
            )
        for field in (*_COMMON, whole.stage):
            if _plain(recipe, field, whole) != _plain(recipe_of[first], field, whole):
                raise RecipeError(
                    f"ladder {ladder.name}: {field} of size {size} differs from that of {first}; the best rate could "
                    "differ for that alone. Set it in proxies.overrides, for all sizes alike"
                )


def _plain(recipe: Recipe, field: str, sweep: SweepSettings) -> Any:
    """A field of a recipe without what a cell's place sets."""
    value = getattr(recipe, field)
    values = value.model_dump() if hasattr(value, "model_dump") else value
    if field == sweep.stage:
        own = ("learning_rate", "effective_batch_size", "seed", "max_tokens", "num_episodes")
        values = {name: one for name, one in values.items() if name not in own}
    return values


@dataclass(frozen=True)
class LadderForecast:
    """What a ladder costs from here on. note: why less is known than could be; empty where nothing is missing."""

    blocks: tuple[BlockForecast, ...]
    num_tokens: int
    flops: float
    note: str = ""

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.blocks)

    @property
    def num_unknown(self) -> int:
        """Cells of whose duration nothing is known."""
        return sum(one.num_unknown for one in self.blocks)


def forecast_ladder(ladder: LadderSettings, store: Store) -> LadderForecast:
    """Cells, tokens, FLOPs and hours of proxies and confirmation, as far as they are missing. Works without network."""
    log2_lr = None
    with contextlib.suppress(ValueError):  # where nothing has run
        log2_lr = result_of(ladder, store.root).log2_lr
    whole, note = ladder.whole(log2_lr), ""
    states: dict[Place, CellState | None] = dict.fromkeys(places(whole))
    try:
        cells = list(cells_of(whole, unresolved="keep"))
        found = states_of(store.root, sweep_folder(store.root, ladder.proxies.name), records_of(cells))
        states |= {one.cell.place: one for one in found}
        forecast = forecast_of(whole, store.root, states.values())
        estimate(forecast, cells, store)
    except ValueError as error:  # a model or data set that is not here: what the file itself says is still told
        note = f"the store was not looked at: {error}"
        forecast = forecast_of(whole, store.root, ())
    left = [place for place, one in states.items() if one is None or one.state not in ("done", "diverged")]
    flops = sum(6.0 * (whole.sizes[place.size].num_parameters or 0) * place.max_tokens for place in left)
    blocks = tuple(by_block(whole, forecast, states))
    return LadderForecast(blocks, sum(place.max_tokens for place in left), flops, note)


def check_hours(ladder: LadderSettings, forecast: LadderForecast) -> str | None:
    """What to know where the limit cannot be held against all cells.

    ValueError where proxies and confirmation are forecast to take longer than `max_hours`.
    """
    if ladder.max_hours is None:
        return None
    if forecast.seconds > 3600 * ladder.max_hours:
        raise ValueError(
            f"ladder {ladder.name}: what is missing of proxies and confirmation is forecast to take "
            f"{readable.duration(forecast.seconds)}, max_hours allows {ladder.max_hours:g} h; take fewer rates, seeds "
            "or tokens, or raise max_hours"
        )
    if forecast.num_unknown:
        return (
            f"max_hours {ladder.max_hours:g} cannot be held against {forecast.num_unknown:,} cells: nothing like them "
            "was run here. Give blocks and target their hours, or compute.device_tflops, for a forecast at once"
        )
    return None


def open_store_of(ladder: LadderSettings, checked: bool = True) -> Store:
    """The store that the cells of a ladder are in."""
    whole = ladder.whole()
    recipe = load_recipe(whole.recipe, overrides_of(whole, next(iter(places(whole)))))
    return open_store(recipe.compute, checked=checked)


def begin_ladder(ladder: LadderSettings, log: Log) -> None:
    """Say what a ladder costs, before anything of it runs. ValueError: it is forecast to take too long."""
    forecast = forecast_ladder(ladder, open_store_of(ladder))
    num_missing = sum(one.num_missing for one in forecast.blocks)
    seconds = f", about {readable.duration(forecast.seconds)}" if forecast.seconds else ""
    unknown = f" and {forecast.num_unknown:,} of unknown time" if forecast.num_unknown else ""
    log.info(
        "ladder %s: %d cells are missing, %s tokens, %.2g FLOPs%s%s",
        ladder.name, num_missing, readable.count(forecast.num_tokens), forecast.flops, seconds, unknown,
    )  # fmt: skip
    if (note := check_hours(ladder, forecast)) is not None:
        log.warning("%s", note)


def planned_values(forecast: LadderForecast) -> dict[str, Any]:
    """A forecast as JSON."""
    return {
        "blocks": [
            {
                "name": one.name,
                "num_cells": one.num_cells,
                "num_missing": one.num_missing,
                "seconds": one.seconds or None,
                "num_unknown": one.num_unknown,
                "bases": list(one.bases),
            }
            for one in forecast.blocks
        ],
        "num_tokens": forecast.num_tokens,
        "flops": forecast.flops,
        "note": forecast.note,
    }
