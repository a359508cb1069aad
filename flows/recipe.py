"""Reads a recipe from a preset name, a YAML path or an inline object. One error lists every problem."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from smoltulu.recipes import PRESETS
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.recipe import ExtendingRecipe, Recipe
from smoltulu.tasks.stages import STAGES

#: The loader of libyaml is ten times as fast. PyYAML has it if it was built with libyaml.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecipeError(ValueError):
    """Every problem of a recipe, one per line, with its path, the given value, and the allowed values."""


def preset_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_recipe(
    recipe: str | dict[str, Any] | Recipe | ExtendingRecipe, overrides: dict[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe. Raises RecipeError with every problem at once."""
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json")
    elif isinstance(recipe, str):
        values = _read(recipe)
    else:
        given = recipe.model_dump() if isinstance(recipe, ExtendingRecipe) else recipe
        values = _extend(given, "the inline recipe", Path.cwd())
    for dotted, value in (overrides or {}).items():
        values = _override(values, dotted, value)
    try:
        checked = Recipe.model_validate(values)
    except ValidationError as error:
        unknown = _unknown_stages(values.get("compute"))
        raise RecipeError(_explain(error, values.get("name") or str(recipe), unknown)) from None
    check_compute(checked.compute)
    return checked


def parse_overrides(texts: Iterable[str]) -> dict[str, object]:
    """Parse `field=value` texts. The value is JSON, else YAML. Raises ValueError if there is no `=`."""
    values: dict[str, object] = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals or not field.strip():
            raise ValueError(f"--override {text!r}: give a dotted field and a value, e.g. dpo.learning_rate=5e-7")
        try:
            # JSON first: YAML reads 5e-7, which has no dot, as a string.
            values[field.strip()] = json.loads(value)
        except ValueError:
            try:
                values[field.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"--override {text!r}: the value is neither JSON nor YAML: {error}") from None
    return values


def check_compute(compute: ComputeSettings) -> None:
    """Refuse `compute.stages` of stages that do not exist."""
    if unknown := _unknown_stages({"stages": compute.stages}):
        raise RecipeError("\n".join(unknown))


def _unknown_stages(compute: Any) -> list[str]:
    """A line for every name in `compute.stages` that is no stage."""
    stages = compute.get("stages") if isinstance(compute, dict) else None
    return [_unknown_stage("compute.stages", str(name)) for name in stages or () if name not in STAGES]


def _unknown_stage(where: str, name: str) -> str:
    return f"{where}: no stage is called {name!r}{did_you_mean(name, STAGES)}; stages: {', '.join(STAGES)}"


def check_stage_names(recipe: Recipe, until: str | None, refresh: list[str]) -> None:
    """Refuse stages in `until` and `refresh` that do not exist or that the recipe lacks."""
    present = recipe_stages(recipe)
    for parameter, names in (("until", [until] if until else []), ("refresh", refresh)):
        for name in names:
            if name not in STAGES:
                raise RecipeError(_unknown_stage(parameter, name))
            if name not in present:
                raise RecipeError(
                    f"{parameter}: recipe {recipe.name} has no stage {name!r}; it has: {', '.join(present)}"
                )


def recipe_stages(recipe: Recipe) -> list[str]:
    """The stages that a recipe runs, in order."""
    return [name for name in stage_order(recipe) if getattr(recipe, STAGES[name].block or name, None)]


def stage_order(recipe: Recipe) -> tuple[str, ...]:
    """All stages in the order in which this recipe runs them. A stage comes after the stage that it starts from."""
    order = list(STAGES)
    for block, settings in recipe.trainings.items():
        start = settings.starts_from
        if start is not None and order.index(start) > order.index(block):
            order.remove(block)
            order.insert(order.index(start) + 1, block)
    return tuple(order)


def whole_path(recipe: str) -> str:
    """A recipe's name, or its absolute path, which is valid in every working folder."""
    return str(Path(recipe).expanduser().absolute()) if _is_path(recipe) else recipe


def _is_path(name_or_path: str) -> bool:
    if name_or_path.startswith(("{", '"')):  # JSON, as Prefect's -p takes it
        return False
    is_file = name_or_path not in preset_names() and Path(name_or_path).is_file()
    return is_file or name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path


def _read(name_or_path: str) -> dict[str, Any]:
    if not _is_path(name_or_path):
        return _extend(_preset(name_or_path, "no recipe is called"), name_or_path, PRESETS)
    path = Path(name_or_path).expanduser()
    values = _load(path)
    if "extends" in values and "name" not in values:
        values["name"] = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")
    return _extend(values, str(path), path.parent)


def _preset(name: str, problem: str) -> dict[str, Any]:
    """A shipped recipe. RecipeError, which begins with `problem`, where there is none of that name."""
    if name not in preset_names():
        raise RecipeError(
            f"{problem} {name!r}{did_you_mean(name, preset_names())}; "
            f"presets: {', '.join(preset_names())}; or give the path of a YAML file"
        )
    return _load(PRESETS / f"{name}.yaml")


def _load(path: Path) -> dict[str, Any]:
    """Values of a recipe file, with absolute paths. RecipeError if it cannot be read."""
    if not path.is_file():
        raise RecipeError(f"recipe file {path} does not exist (looked in {Path.cwd()})")
    try:
        values = yaml.load(path.read_text(), _YAML)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of names to values")
    return {name: _whole_paths(value, name, path.absolute().parent) for name, value in values.items()}


def _whole_paths(value: Any, field: str, folder: Path) -> Any:
    """Make relative paths below a dotted field of a recipe file absolute: they start at the file's folder.

    A path that begins with a variable stays as it is: the caller sets the variable, relative to the working folder.
    """
    if isinstance(value, dict):
        return {name: _whole_paths(item, f"{field}.{name}", folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole_paths(item, field, folder) for item in value]
    if not isinstance(value, str) or value.startswith(("/", "~", "${")):
        return value
    is_path = field in ("compute.store", "compute.remote") or (field.endswith(".path") and ".fields." not in field)
    is_template = field == "chat_template" and (value.endswith(".jinja") or "/" in value)
    return str(folder / value) if is_template or (is_path and "://" not in value) else value


def _extend(values: dict[str, Any], origin: str, folder: Path) -> dict[str, Any]:
    """Merge a recipe into the preset or file that it extends.

    Only one level: the diff of two recipe files is their whole difference.

    folder  start of a relative path in `extends`
    """
    values = dict(values)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if isinstance(parent, str) and _is_path(parent):
        base = _load(folder / Path(parent).expanduser())
    else:
        base = _preset(str(parent), f"{origin}: extends")
    if "extends" in base:
        raise RecipeError(
            f"{origin}: extends {parent}, which itself extends {base['extends']}; extend that one instead"
        )
    return _merge(base, values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _override(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Set one dotted field; numbers index lists. A path through a plain value is an error."""
    head, _, rest = dotted.partition(".")
    if isinstance(values, list):
        if not head.isdigit() or int(head) >= len(values):
            raise RecipeError(f"overrides: {dotted!r} does not point into a list of {len(values)} items")
        copy = list(values)
        copy[int(head)] = _override(copy[int(head)], rest, value) if rest else value
        return copy
    if not isinstance(values, dict):
        raise RecipeError(f"overrides: {dotted!r} goes through a value that has no fields")
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    return {**values, head: _override({} if inner is None else inner, rest, value)}


def _explain(error: ValidationError, name: str, more: list[str]) -> str:
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            allowed = list(_fields_at(Recipe, problem["loc"][:-1]))
            text = f"no such field{did_you_mean(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
        elif problem["type"] == "missing":
            text = "is missing; add it"
        else:
            given = "" if isinstance(problem["input"], (dict, BaseModel)) else f"; given: {problem['input']!r}"
            text = problem["msg"].removeprefix("Value error, ") + given
        lines.append(f"  {location}: {text}")
    lines += [f"  {line}" for line in more]
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return f"recipe {name} has {count}:\n" + "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    """Field names of the model at a location."""
    found: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        # In a union that `kind` discriminates, the location names the kind.
        of_kind = [one for one in found if "kind" in one.model_fields and one.model_fields["kind"].default == part]
        fields = [one.model_fields[part] for one in found if part in one.model_fields]
        found = of_kind or [inner for field in fields for inner in _models_in(field.annotation)]
    yield from (found[0].model_fields if found else ())


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'sft'?)` for a name that is not allowed; empty if no allowed name is similar."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
