"""Chooses benchmarks from the registry, by name or group, from the Hub or from local files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from smoltulu.recipes import BENCHMARK_REGISTRY
from smoltulu.schemas.benchmarks import BenchmarkRegistry, RegisteredBenchmark
from smoltulu.schemas.contamination import Benchmark
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.files import SUFFIXES
from smoltulu.tasks.data.sources import expand_path

GROUPS = ("all", "paper", "evaluated")

#: Folders that are searched for files of benchmarks where none is given; the second as in recipe `real-small`.
FOLDER_VARIABLE = "SMOLTULU_BENCHMARKS"
_DEFAULT_FOLDER = "${SMOLTULU_REAL_DATA:-../shared/data}/eval"


@cache
def load_registry() -> BenchmarkRegistry:
    """The shipped registry."""
    return BenchmarkRegistry.model_validate(yaml.safe_load(BENCHMARK_REGISTRY.read_text(encoding="utf-8")))


def benchmarks_folder(given: str | None = None) -> Path | None:
    """The folder with files of benchmarks: the given one, $SMOLTULU_BENCHMARKS, or the default where it exists.

    Raises:
        ValueError: a folder that was named does not exist.
    """
    named = given or os.environ.get(FOLDER_VARIABLE)
    folder = expand_path(named or _DEFAULT_FOLDER)
    if folder.is_dir():
        return folder
    if named:
        raise ValueError(f"folder of benchmark files {str(folder.absolute())!r} does not exist")
    return None


def choose_benchmarks(wanted: Sequence[str], folder: Path | None = None) -> tuple[Benchmark, ...]:
    """The wanted benchmarks, each once: those of the registry in its order, then the others.

    wanted   a name of the registry, a group (all, paper, evaluated), `NAME=FILE` or `NAME=FILE:FIELD,FIELD`
    folder   files whose names fit the registry's patterns are taken in place of the Hub's data

    Raises:
        ValueError: an unknown name, a missing file, or no fields for a benchmark that the registry does not know.
    """
    registry = load_registry()
    chosen: dict[str, Benchmark] = {}
    own: dict[str, Benchmark] = {}
    for text in wanted:
        name, equals, file = text.partition("=")
        if equals:
            own[name] = _from_argument(name, file, registry.find(name))
            continue
        known = _of_group(text, registry)
        if not known:
            raise ValueError(_unknown(text, registry))
        for benchmark in known:
            path = local_file(benchmark, folder)
            chosen[benchmark.name] = benchmark.on_hub() if path is None else benchmark.from_file(str(path))
    chosen.update(own)
    order = dict.fromkeys([*(benchmark.name for benchmark in registry.benchmarks), *own])
    return tuple(chosen[name] for name in order if name in chosen)


def local_file(benchmark: RegisteredBenchmark, folder: Path | None) -> Path | None:
    """The file of a benchmark in a folder, None where there is none. Raises ValueError where several fit."""
    if folder is None:
        return None
    for pattern in benchmark.local.files:
        fitting = sorted(
            path for path in folder.iterdir() if fnmatch(path.name.lower(), pattern) and path.name.endswith(SUFFIXES)
        )
        if len(fitting) > 1:
            names = ", ".join(path.name for path in fitting)
            raise ValueError(
                f"benchmark {benchmark.name}: {len(fitting)} files in {folder} fit {pattern!r}: {names}; name one with "
                f"{benchmark.name}=FILE"
            )
        if fitting:
            return fitting[0].absolute()
    return None


def _of_group(text: str, registry: BenchmarkRegistry) -> list[RegisteredBenchmark]:
    if text == "all":
        return list(registry.benchmarks)
    if text in ("paper", "evaluated"):
        return [benchmark for benchmark in registry.benchmarks if getattr(benchmark, text)]
    found = registry.find(text)
    return [found] if found else []


def _from_argument(name: str, file: str, known: RegisteredBenchmark | None) -> Benchmark:
    path, _, fields = file.rpartition(":") if ":" in file and not Path(file).exists() else (file, "", "")
    if not Path(path).exists():
        raise ValueError(f"benchmark {name}: file {str(Path(path).absolute())!r} does not exist")
    absolute = str(Path(path).absolute())
    if fields:
        query_fields = tuple(field.strip() for field in fields.split(",") if field.strip())
        return Benchmark(name=name, source=DataSource(path=absolute, format="text"), query_fields=query_fields)
    if known is None:
        raise ValueError(
            f"benchmark {name}: the registry does not know it, so say which columns are looked for: "
            f"{name}={path}:FIELD,FIELD"
        )
    return known.from_file(absolute)


def _unknown(name: str, registry: BenchmarkRegistry) -> str:
    names = [*GROUPS, *(benchmark.name for benchmark in registry.benchmarks)]
    near = difflib.get_close_matches(name, names, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"no benchmark is called {name!r}{hint}; allowed are {', '.join(names)}, or NAME=FILE:FIELD,FIELD for one of "
        "your own"
    )
