"""From the file of a sweep to its cells: the graph of each, and the keys of its training and its evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from smoltulu.artifacts.keys import folder_digest
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.reading import Unreadable, read_file
from smoltulu.flows.recipe import RecipeError, check_evaluation, check_secrets, load_recipe, whole_paths
from smoltulu.recipes import SWEEPS
from smoltulu.schemas.common import problems_of
from smoltulu.schemas.sweep import Place, SweepSettings, overrides_of, places
from smoltulu.tasks.data.hub import Reference, resolve_commit
from smoltulu.tasks.data.sources import expand_path

#: Beginning of the name of a file that holds a ladder (ladder.py).
LADDER = "ladder-"
#: For an answer of the Hub; a plan waits less.
_TIMEOUT_SECONDS, _PLAN_TIMEOUT_SECONDS = 30.0, 3.0


@dataclass(frozen=True)
class SweepCell:
    """One place of the grid, as a recipe with a few fields set.

    graph       of the recipe, up to the swept stage
    training    node of the swept stage; evaluation: of its model
    """

    place: Place
    block: str
    graph: Graph
    training: str
    evaluation: str

    @property
    def keys(self) -> tuple[str, str]:
        """Of the training and of the evaluation."""
        return self.graph.key(self.training), self.graph.key(self.evaluation)

    @property
    def to_send(self) -> SweepCell:
        """With the nodes that it is made from alone: for a task, which may run on another machine."""
        return replace(self, graph=self.graph.part(self.graph.ancestors(self.evaluation)))  # type: ignore[arg-type]

    @property
    def own_nodes(self) -> tuple[str, ...]:
        """What only this cell is made from, in graph order: its training, and what comes after it."""
        nodes = self.graph.ancestors(self.evaluation)
        return tuple(nodes[nodes.index(self.training) :])

    @property
    def shared_nodes(self) -> tuple[str, ...]:
        """What cells have in common: base, rows, tokens, reference log-probabilities."""
        own = self.own_nodes
        return tuple(name for name in self.graph.ancestors(self.evaluation) if name not in own)


def sweep_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml") if not path.stem.startswith(LADDER))


def ladder_names() -> list[str]:
    """Names of the shipped ladders."""
    return sorted(path.stem for path in SWEEPS.glob(f"{LADDER}*.yaml"))


def is_ladder(name: str) -> bool:
    """Whether a name, or the path of a YAML file, is that of a ladder: it has proxies. What cannot be read is none."""
    return name in ladder_names() or file_has(name, "proxies")


def is_sweep(name: str) -> bool:
    """Whether a name, or the path of a YAML file, is that of a sweep: it has blocks. What cannot be read is none."""
    return name in sweep_names() or file_has(name, "blocks")


def file_has(name: str, field: str) -> bool:
    """Whether a name is the path of a YAML file with this field at its top."""
    path = Path(name).expanduser()
    try:
        values = read_file(path) if path.suffix in (".yaml", ".yml") and path.is_file() else None
    except (ValueError, OSError):
        return False
    return isinstance(values, dict) and field in values


def load_sweep(name: str | dict[str, Any] | SweepSettings) -> SweepSettings:
    """A shipped sweep by its name, the path of a YAML file, or a sweep written out.

    Raises:
        RecipeError: every problem at once; what cannot be read, or holds a secret.
    """
    if isinstance(name, SweepSettings):
        return name
    values = name if isinstance(name, dict) else values_of(name, "sweep", sweep_names())
    if isinstance(values, dict) and "proxies" in values:
        raise RecipeError(
            "this is a ladder, not a sweep; run it by `smoltulu ladder`, or by the deployment smoltulu-sweep/ladder"
        )
    if not isinstance(values, dict):
        raise RecipeError(
            f"a sweep is an object with name, recipe, stage, blocks and tasks; got {type(values).__name__}"
        )
    check_secrets(values, "sweep")
    try:
        return SweepSettings.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            f"sweep {values.get('name', 'without a name')!r}:\n" + "\n".join(problems_of(error))
        ) from None


def values_of(name: str, what: str, shipped: list[str]) -> Any:
    """What the YAML file of a sweep or a ladder holds; relative paths in it start at the file's folder, as in recipes.

    RecipeError: no such file, or one that cannot be read.
    """
    path, is_there = Path(), False
    if isinstance(name, str):
        path = SWEEPS / f"{name}.yaml" if name in shipped else Path(name).expanduser()
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            is_there = path.suffix in (".yaml", ".yml") and path.is_file()
    if not is_there:
        raise RecipeError(
            f"no {what} {name!r:.200}; shipped are {', '.join(shipped) or 'none'}; or give the path of a YAML file"
        )
    try:
        values = read_file(path)
    except Unreadable as error:
        raise RecipeError(f"{what} {path.name}: {error}") from None
    inner = values.get("proxies", values) if isinstance(values, dict) else None
    recipe = inner.get("recipe") if isinstance(inner, dict) else None
    if isinstance(inner, dict) and isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):  # as in recipes
        inner["recipe"] = str(path.absolute().parent / Path(recipe).expanduser())
    return _whole_overrides(values, path.absolute().parent)


def _whole_overrides(value: Any, folder: Path) -> Any:
    """Make relative paths absolute in everything that is called `overrides`: dotted fields of a recipe."""
    if not isinstance(value, dict):
        return value
    return {
        name: {field: whole_paths(item, str(field), folder) for field, item in inner.items()}
        if name == "overrides" and isinstance(inner, dict)
        else _whole_overrides(inner, folder)
        for name, inner in value.items()
    }


def store_of(sweep: SweepSettings) -> Path:
    """Root of the store that the cells of a sweep are in. RecipeError: as `load_recipe`."""
    recipe = load_recipe(sweep.recipe, overrides_of(sweep, next(iter(places(sweep)))))
    return expand_path(recipe.compute.store).absolute()


def cells_of(sweep: SweepSettings, unresolved: Literal["refuse", "keep"] = "refuse") -> Iterator[SweepCell]:
    """Every cell, in the order in which they run. A Hub revision is the same commit in all of them.

    unresolved  keep, for a plan: a revision that cannot be resolved stays as written

    Raises:
        RecipeError: a place that the recipe does not allow; the first one says which.
    """
    is_checked = False
    digest_of = cache(folder_digest)  # half a second for a model of 135 M
    resolve = _same_commits(_PLAN_TIMEOUT_SECONDS if unresolved == "keep" else _TIMEOUT_SECONDS)
    for place, block in places(sweep).items():
        try:
            recipe = load_recipe(sweep.recipe, {"compute.launcher": "warm"} | overrides_of(sweep, place))
            if not is_checked:
                check_evaluation(recipe)
                is_checked = True
            graph = Graph(recipe, sweep.stage, unresolved=unresolved, resolve=resolve, digest_of=digest_of)
        except ValueError as error:
            raise RecipeError(f"sweep {sweep.name}, cell {place.name}: {error}") from None
        training = sweep.stage.replace("_", "-")
        evaluation = f"evaluation-{training}"
        for node in (training, evaluation):
            if node not in graph.nodes:
                raise RecipeError(
                    f"sweep {sweep.name}: recipe {sweep.recipe} has no {node}; give it a block "
                    f"{sweep.stage if node == training else 'evaluation'}"
                )
        yield SweepCell(place, block, graph, training, evaluation)


def _same_commits(timeout_seconds: float) -> Callable[[Reference], str]:
    """Resolves each revision once, also where that fails: else a silent Hub would be asked for every cell."""
    known: dict[Reference, str | ValueError] = {}

    def resolve(reference: Reference) -> str:
        if reference not in known:
            try:
                known[reference] = resolve_commit(*reference, timeout_seconds=timeout_seconds)
            except ValueError as error:
                known[reference] = error
        found = known[reference]
        if isinstance(found, ValueError):
            raise found
        return found

    return resolve
