"""What is wrong with a recipe, in words: every problem, where it stands, and what is allowed there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from smoltulu.flows.reading import shortened
from smoltulu.schemas.common import MAX_NAME
from smoltulu.schemas.recipe import Recipe

#: Problems that are listed, and characters of each.
_NUM_PROBLEMS_SHOWN = 20
_MAX_PROBLEM = 1000


def explain(error: ValidationError, name: object, more: list[str]) -> str:
    """Every problem on a line of its own, as many and as much of each as people read."""
    lines = [_problem(problem) for problem in error.errors(include_url=False)[:_NUM_PROBLEMS_SHOWN]]
    lines = [line if len(line) <= _MAX_PROBLEM else line[:_MAX_PROBLEM] + "..." for line in (*lines, *more)]
    num_problems = error.error_count() + len(more)
    del lines[_NUM_PROBLEMS_SHOWN:]
    if num_problems > len(lines):
        lines.append(f"and {num_problems - len(lines):,} more")
    count = f"{num_problems:,} problem{'s' if num_problems > 1 else ''}"
    return f"recipe {str(name)[:MAX_NAME]} has {count}:\n" + "\n".join(f"  {line}" for line in lines)


def _problem(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        allowed = list(_fields_at(Recipe, problem["loc"][:-1]))
        text = f"no such field{did_you_mean(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    elif problem["type"] == "missing":
        text = "is missing; add it"
    else:
        given = "" if isinstance(problem["input"], (dict, BaseModel)) else f"; given: {shortened(problem['input'])}"
        text = problem["msg"].removeprefix("Value error, ") + given
    return f"{location}: {text}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    """Field names of the model at a location."""
    found: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        # In a union, the location names the value of the field that discriminates.
        of_kind = [one for one in found if part in _discriminators(one)]
        fields = [one.model_fields[part] for one in found if part in one.model_fields]
        inside = [inner for field in fields for inner in _models_in(field.annotation)]
        found = of_kind or (inside if fields else found)  # else: a key of a mapping
    yield from (found[0].model_fields if found else ())


def _discriminators(model: type[BaseModel]) -> list[Any]:
    return [model.model_fields[name].default for name in ("kind", "algorithm") if name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'sft'?)` for a name that is not allowed; empty if no allowed name is similar."""
    close = difflib.get_close_matches(name, list(allowed), n=1) if len(name) <= MAX_NAME else []
    return f" (did you mean {close[0]!r}?)" if close else ""
