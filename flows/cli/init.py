"""`smoltulu init`: writes a recipe that extends a preset and lists every setting of it, commented out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from smoltulu.flows.recipe import RecipeError, load_recipe, preset_names
from smoltulu.schemas.recipe import Recipe

#: Most characters of a value. Longer ones, such as lists of benchmarks, are left to the preset.
_LONGEST_VALUE = 160

_HEAD = """\
# A recipe of your own: what is not said here is as in {preset}. The values below are those that hold without the line:
# take the first # off one and change it. `smoltulu plan FILE` says what a run would do.
# Relative paths start at the folder of this file; one that begins with a variable, as ${{DATA:-.}}/rows.jsonl, starts
# at the folder in which the command is called. `publish: null` leaves that stage out.
# extends: a preset ({presets}), or the path of a recipe file that itself extends none
extends: {preset}
"""


def commented_recipe(preset: str) -> str:
    """A recipe file that extends `preset`. Raises RecipeError where there is no such preset, or it extends another."""
    recipe = load_recipe({"extends": preset})
    if preset not in preset_names():
        raise RecipeError(f"{preset!r} is a file; give a preset: {', '.join(preset_names())}")
    return _HEAD.format(preset=preset, presets=", ".join(preset_names())) + "\n".join(_blocks(recipe)) + "\n"


def _blocks(recipe: Recipe) -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if name == "name":
            yield "# name: my-recipe # used in run names and reports; without it: the name of this file"
        elif not isinstance(value, BaseModel):
            if value is not None:
                yield f"# {name}: {_text(value)} # {_meaning(field)}".rstrip(" #")
        else:
            # Braces allow an empty block, and any line may come or go. `sft:` alone would mean null.
            said = field.description or (type(value).__doc__ or "").strip().partition("\n")[0]
            yield f"\n{name}: {{ # {said}"
            for inner, inner_field in type(value).model_fields.items():
                text = _text(getattr(value, inner))
                if len(text) <= _LONGEST_VALUE:
                    yield f"  # {inner}: {text}, # {_meaning(inner_field)}".rstrip(" #")
            yield "}"


def _meaning(field: FieldInfo) -> str:
    """Description of a field, after its choices if it is a choice of words."""
    words = [word for choice in (field.annotation, *get_args(field.annotation)) for word in get_args(choice)]
    choices = " | ".join(words) if words and all(isinstance(word, str) for word in words) else ""
    return "; ".join(filter(None, [choices, field.description]))


def _text(value: Any) -> str:
    """A value on one line of YAML. Of models that are too long, only the fields that differ from the defaults."""
    plain = _plain(value, whole=True)
    text = _flow(plain)
    return text if len(text) <= _LONGEST_VALUE // 2 else _flow(_plain(value, whole=False))


def _plain(value: Any, whole: bool) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=not whole, exclude_none=not whole)
    if isinstance(value, (list, tuple)):
        return [_plain(item, whole) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, whole) for name, item in value.items()}
    return value


def _flow(value: Any) -> str:
    # Dumped inside a list, so that YAML quotes characters that have a meaning in braces.
    return yaml.safe_dump([value], default_flow_style=True, width=10_000, sort_keys=False).strip()[1:-1]
