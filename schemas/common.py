"""What every contract shares: how a field is marked, what a strict model is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo


class StrictModel(BaseModel):
    """A frozen model that refuses unknown fields: every contract of the project derives from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """Where a record first departs from its contract, and how, in one short line."""
    return problems_of(error)[0]


def problems_of(error: ValidationError) -> list[str]:
    """Every place where a record departs from its contract, and how, each in one short line."""
    found = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        where = ".".join(str(part)[:80] for part in problem["loc"][:8])
        found.append(printable((f"{where}: " if where else "") + problem["msg"][:200]))
    return found


def printable(text: str) -> str:
    """A name that anyone may have given, for a message: line ends and control characters are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


#: Most characters of what becomes the name of a file or part of an address, and of a path.
MAX_NAME, MAX_PATH = 200, 4096
#: The values that `science(absent=...)` takes, the empty tuple among them: compared by type and value, written in a
#: schema as they are.
Scalar = bool | int | float | str | tuple[()] | None
_ALWAYS_IN_KEY: Any = object()


def science(
    default: Any = ..., *, absent: Scalar = _ALWAYS_IN_KEY, none_in_key: str | None = None, **kwargs: Any
) -> Any:
    """Field that changes a result: it is part of the artifact key (design, section 3).

    absent  for a field that is added when artifacts exist already: the value that means what the code did before there
            was such a field. At this value the field is left out of the key, so every older key stays as it is. It is
            frozen for ever, also where the default changes later; another value enters the key as any other field.
    none_in_key  what None is in the key: for a field whose default was this value before "not given" had a meaning.
    """
    extra: dict[str, Any] = {"role": "science"}
    if absent is not _ALWAYS_IN_KEY:
        assert absent is None or absent == () or isinstance(absent, (bool, int, float, str)), absent
        extra["absent"] = absent
    if none_in_key is not None:
        extra["none_in_key"] = none_in_key
    return Field(default, json_schema_extra=extra, **kwargs)


def machinery(default: Any = ..., **kwargs: Any) -> Any:
    """Field that only changes how a stage is run: it never enters an artifact key."""
    return Field(default, json_schema_extra={"role": "machinery"}, **kwargs)


def role_of(field: FieldInfo) -> str:
    """`science` or `machinery`; an unmarked field is our own bug, found by a test."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict) and extra.get("role") in ("science", "machinery"), field
    return str(extra["role"])


def _is_left_out(field: FieldInfo, value: Any) -> bool:
    """Whether a science field stands at its frozen `absent` value; False is not 0 there, as in the key."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return "absent" in extra and type(value) is type(extra["absent"]) and value == extra["absent"]


def scientific(model: BaseModel) -> dict[str, Any]:
    """The science fields of `model`, recursively, as plain JSON values (what the artifact key is made of)."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return scientific(value)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return value  # `canonical_json` refuses what has no canonical form

    def in_key(field: FieldInfo, value: Any) -> Any:
        extra = field.json_schema_extra
        return plain(extra.get("none_in_key") if value is None and isinstance(extra, dict) else value)

    return {
        name: in_key(field, getattr(model, name))
        for name, field in type(model).model_fields.items()
        if role_of(field) == "science" and not _is_left_out(field, getattr(model, name))
    }


def plain_path(name: str) -> str:
    """A path that stays inside of the folder that it is relative to. ValueError for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name != path.as_posix() or name in ("", ".") or "\0" in name:
        raise ValueError(f"file name {name[:200]!r} is no plain relative path")
    return name


@dataclass(frozen=True)
class _InArtifact:
    """Marks a field of a stage's outputs that names a file or folder of the artifact."""


#: A file or folder of the artifact, relative to it: a field of a stage's outputs.
ArtifactPath = Annotated[str, AfterValidator(plain_path), _InArtifact()]


def artifact_paths(outputs: BaseModel) -> Iterator[tuple[str, str]]:
    """Field and value of all that an outputs model names in the artifact."""
    for name, field in type(outputs).model_fields.items():
        marks = [*field.metadata, *(mark for part in get_args(field.annotation) for mark in get_args(part))]
        if _InArtifact() in marks and (value := getattr(outputs, name)) is not None:
            several = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else [value]
            )
            yield from ((name, one) for one in several)
