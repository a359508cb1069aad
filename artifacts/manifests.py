"""Fields of manifests, read as plain JSON: validating each would take most of the time of listing many."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from smoltulu.artifacts.files import read_plain
from smoltulu.schemas.artifact import KEY_PATTERN, STAGE_PATTERN

_MAX_FILE_BYTES = 1 << 63


class Ref(NamedTuple):
    """Name of an artifact."""

    stage: str
    key: str

    @classmethod
    def checked(cls, stage: object, key: object) -> Ref:
        """A name as some record gives it. ValueError where it is none: as a path it could lead anywhere."""
        if not (isinstance(stage, str) and re.fullmatch(STAGE_PATTERN, stage)):
            raise ValueError(f"{str(stage)[:80]!r} is no name of a stage")
        if not (isinstance(key, str) and re.fullmatch(KEY_PATTERN, key)):
            raise ValueError(f"{str(key)[:80]!r} is no key")
        return cls(stage, key)


class InputRef(NamedTuple):
    """An input as a manifest recorded it."""

    binding: str
    ref: Ref
    digest: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError says in a few words why there is none."""
    try:
        data = read_plain(path)
    except FileNotFoundError:
        raise ValueError("is gone") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return parse_json(data)


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object from its bytes. ValueError as `read_json`."""
    try:
        # Unlike json.loads this refuses what is nested too deeply for its readers, and text that cannot be printed.
        value = from_json(data, allow_inf_nan=False)
    except ValueError:
        raise ValueError("is no JSON") from None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return value


@contextlib.contextmanager
def picking() -> Iterator[None]:
    """ValueError where a manifest has another form than what is picked from it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"has unexpected content ({error!r})") from None


@picking()
def inputs_of(manifest: dict[str, Any]) -> tuple[InputRef, ...]:
    """Inputs of a manifest. ValueError where they have another form."""
    return tuple(
        InputRef(binding, Ref.checked(record["stage"], record["key"]), str(record["digest"]))
        for binding, record in manifest["inputs"].items()
    )


@picking()
def num_bytes_of(manifest: dict[str, Any]) -> int:
    """Bytes of an artifact's files as its manifest has them. ValueError where they have another form."""
    sizes = [record["size"] for record in manifest["files"].values()]
    if not all(isinstance(size, int) and 0 <= size < _MAX_FILE_BYTES for size in sizes):
        raise ValueError("has a file of no possible size")
    return sum(sizes)


def scores_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores in the manifest of an evaluation, each with the `kind` and `subject` of the evaluation; else none."""
    scores = dig(manifest, "outputs", "scores")
    kind, subject = dig(manifest, "spec", "config", "kind"), dig(manifest, "spec", "config", "subject")
    found = scores if isinstance(scores, list) else []
    return [
        {"kind": kind, "subject": subject, **score}
        for score in found
        if isinstance(score, dict) and isinstance(score.get("value"), (int, float)) and "task" in score
    ]


def sources_of(manifest: dict[str, Any]) -> list[str]:
    """What an artifact was made from outside the store: Hub repositories at a revision, digests of local content."""

    def repositories(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("repository"), str) and "revision" in value:
                parts = [str(value[name]) for name in ("subset", "split") if value.get(name)]
                yield f"{value['repository']} @ {value['revision']}" + (f" ({' '.join(parts)})" if parts else "")
            for item in value.values():
                yield from repositories(item)
        elif isinstance(value, list):
            for item in value:
                yield from repositories(item)

    externals = dig(manifest, "spec", "externals")
    local = externals.items() if isinstance(externals, dict) else ()
    found = [*repositories(dig(manifest, "spec", "config")), *(f"{name}: {digest}" for name, digest in local)]
    return list(dict.fromkeys(found))


def dig(value: Any, *names: str) -> Any:
    """A value deep in plain JSON; None where a step is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
