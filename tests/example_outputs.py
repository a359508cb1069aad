"""Outputs of a stage for artifacts that tests make by hand: what a test does not say gets the plainest valid value."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from smoltulu.schemas.common import artifact_paths
from smoltulu.tasks.stage import Stage


def example_outputs(stage: Stage, known: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Whole outputs with the values of `known`; the files and folders that they name are made in `folder`."""
    outputs = stage.outputs.model_validate(_example(stage.outputs) | known)
    for _, path in artifact_paths(outputs):
        file = folder / path if "." in Path(path).name else folder / path / "file"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
    return outputs.model_dump(mode="json")


def _example(model: type[BaseModel]) -> dict[str, Any]:
    return {name: _value(field.annotation) for name, field in model.model_fields.items() if field.is_required()}


def _value(kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        return get_args(kind)[0]
    if origin in (Union, types.UnionType):
        return None if type(None) in get_args(kind) else _value(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _example(kind)
    plain = origin or kind
    return {"str": "x", "int": 1, "float": 0.0, "bool": False}.get(plain.__name__, () if plain is tuple else {})
