"""What a task definition of recipes/lm_eval/ is made of: its YAML, what that includes, and the Python that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from smoltulu.artifacts.keys import canonical_json, text_digest
from smoltulu.recipes import LM_EVAL_TASKS

_FUNCTION = re.compile(r"!function\s+([\w.]+)\.\w+")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads a definition without its functions."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def definition_digest(task: str, folder: Path = LM_EVAL_TASKS) -> str | None:
    """SHA-256 of the texts that define a shipped task or group; None for a task that does not ship here."""
    stamps = tuple((str(path), stat.st_mtime_ns, stat.st_size) for path in _files(folder) if (stat := path.stat()))
    return _digests(folder, stamps).get(task)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py"))


@lru_cache(maxsize=4)
def _digests(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
    """Name of each task and group -> its digest. `stamps`: when each file changed."""
    read = {Path(name): Path(name).read_text() for name, *_ in stamps if name.endswith(".yaml")}
    parsed = {path: yaml.load(text, _Loader) for path, text in read.items()}
    names = {str(name): path for path, one in parsed.items() if isinstance(one, dict) and (name := _name(one))}

    def needed(path: Path, seen: set[Path]) -> set[Path]:
        if path in seen or path not in read:
            return seen | ({path} if path.exists() else set())
        seen = {*seen, path}
        for module in _FUNCTION.findall(read[path]):
            seen.add(path.parent / f"{module.replace('.', '/')}.py")
        for text in _named(parsed[path]):
            seen |= needed(path.parent / text, seen) if (path.parent / text).suffix == ".yaml" else set()
            seen |= needed(names[text], seen) if text in names else set()
        return seen

    def digest(path: Path) -> str:
        files = {file.relative_to(folder).as_posix(): file.read_text() for file in needed(path, set()) if file.exists()}
        return text_digest(canonical_json(files))

    return {name: digest(path) for name, path in names.items()}


def _name(definition: dict[str, Any]) -> str | None:
    task = definition.get("task")
    return definition.get("group") or (task if isinstance(task, str) else None)


def _named(value: Any) -> Iterator[str]:
    """Files that a definition includes, and members of a group."""
    if isinstance(value, dict):
        include, task = value.get("include"), value.get("task")
        if isinstance(include, str):
            yield include
        for one in task if isinstance(task, list) else []:
            if isinstance(one, str):
                yield one
            else:
                yield from _named(one)
                if isinstance(one, dict) and isinstance(one.get("task"), str):
                    yield one["task"]
