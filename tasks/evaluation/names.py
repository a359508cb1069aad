"""Which evaluation tasks and metrics there are, known before anything runs: a wrong name would be found after days.

lm-eval's index of fourteen thousand tasks takes 5 to 15 s to build. It is built once per version of lm-eval, in its own
process, and kept in the user's cache folder. Recipes that name shipped definitions only do not need it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from smoltulu.artifacts.files import write_atomically
from smoltulu.recipes import LM_EVAL_TASKS
from smoltulu.schemas.evaluation import EvaluationTask


class Known(NamedTuple):
    """What a definition says of a task.

    metrics           as lm-eval spells them (`acc,none`); None where only a run can say
    without_examples  defined with num_fewshot 0: a recipe may not ask for more
    """

    metrics: list[str] | None
    without_examples: bool = False


_BUILD_SECONDS = 300
#: lm-eval's metrics of a task that names none.
_DEFAULT_METRICS = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}


class _Loader(yaml.SafeLoader):
    """Reads a definition without its functions."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}")


def check_names(tasks: tuple[EvaluationTask, ...]) -> None:
    """Refuse tasks and metrics that do not exist. One ValueError names all, each with the nearest names.

    Without lm-eval, only what ships here is known, and nothing else is refused.
    """
    known, own = shipped(), local_only()
    if any(task.name not in known for task in tasks):
        stock = _stock()
        if stock is None:
            tasks = tuple(task for task in tasks if task.name in known)
        else:
            known = {**stock, **known}
    problems = [problem for task in tasks for problem in (*_problems(task, known), *file_problems(task, own))]
    if problems:
        raise ValueError("\n".join(problems))


def _problems(task: EvaluationTask, known: Mapping[str, Known]) -> Iterator[str]:
    if task.name not in known:
        yield unknown_task(task.name, known)
        return
    metrics, without_examples = known[task.name]
    of_filter = task.metric.removeprefix("bits_per_byte,")  # we add it to every task that has a right answer
    if metrics is not None and task.metric not in metrics and of_filter not in {one.split(",")[1] for one in metrics}:
        hint = _nearest(task.metric, metrics)
        reports = f"it reports: {', '.join(metrics)}" + (f"; {hint}" if hint else "")
        yield f"evaluation task {task.name!r} has no metric {task.metric!r}; {reports}"
    if without_examples and task.num_fewshot:
        yield (
            f"evaluation task {task.name!r} is defined without examples (num_fewshot 0); "
            f"remove num_fewshot: {task.num_fewshot}"
        )


def unknown_task(name: str, known: Iterable[str], harness: str = "lm-eval") -> str:
    """What is said of a task that is not among those that are `known`."""
    hint = _nearest(name, known) or "`lm-eval ls tasks` lists them all"
    return f"evaluation task {name!r} is neither in recipes/lm_eval/ nor in {harness}; {hint}"


def file_problems(task: EvaluationTask, own: Container[str]) -> Iterator[str]:
    """What is wrong with the files of a task. `own`: names of the definitions that read local files only."""
    if task.name in own and not task.files:
        yield f"evaluation task {task.name!r} reads local files: give evaluation.tasks[...].files"
    for split, source in task.files.items():
        if source.repository is not None:
            yield (
                f"evaluation task {task.name!r}, split {split!r}: files are local (path) or generated; "
                f"got the repository {source.repository!r}. Leave files out to use the task's own Hub dataset"
            )


def hub_subset(definition: Path) -> str | None:
    """The part of its Hub dataset that a definition reads (`dataset_name`); None where it names none."""
    if not definition.is_file():
        return None
    name = yaml.load(definition.read_text(), _Loader).get("dataset_name")
    return None if name is None else str(name)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def shipped() -> dict[str, Known]:
    """The definitions in recipes/lm_eval."""
    return {_name(definition): _known_whole(definition) for definition in _definitions()}


def local_only() -> set[str]:
    """Names of the shipped definitions that read local files and know no dataset of the Hub."""
    return {_name(one) for one in _definitions() if "repository" not in (one.get("dataset_kwargs") or {})}


@cache
def _definitions() -> tuple[dict[str, Any], ...]:
    return tuple(yaml.load(path.read_text(), _Loader) for path in sorted(LM_EVAL_TASKS.glob("*.yaml")))


def _name(definition: Mapping[str, Any]) -> str:
    return str(definition["group"] if "group" in definition else definition["task"])


def _known_whole(definition: Mapping[str, Any]) -> Known:
    """Of a shipped definition, whose list of metrics is whole; of a group, those that it aggregates."""
    if "group" in definition:
        filters = [{"name": name} for one in definition["aggregate_metric_list"] for name in [one["filter_list"]]]
        definition = {**definition, "metric_list": definition["aggregate_metric_list"], "filter_list": filters[:1]}
    return _known({**definition, "process_results": None})


def _known(definition: Mapping[str, Any]) -> Known:
    return Known(metrics_of(definition), definition.get("num_fewshot") == 0)


def metrics_of(definition: Mapping[str, Any]) -> list[str] | None:
    """The metrics that a task reports, from its definition; None where functions of its own may report others."""
    if definition.get("process_results") or definition.get("class"):
        return None
    listed = definition.get("metric_list")
    if listed is None:
        names = _DEFAULT_METRICS.get(str(definition.get("output_type")))
    else:
        given = [one.get("metric") if isinstance(one, Mapping) else None for one in listed]
        # A function is spelled with its path or tag.
        names = tuple(str(name) for name in given) if all(str(name).isidentifier() for name in given) else None
    if names is None or "None" in names:
        return None
    filters = [str(one.get("name")) for one in definition.get("filter_list") or [{"name": "none"}]]
    return [f"{name},{used}" for name in names for used in filters]


def _stock() -> dict[str, Known] | None:
    """lm-eval's own tasks; None where it is not installed, or its index cannot be built."""
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoltulu"
    file = cache / f"lm-eval-{version}-tasks.json"
    with contextlib.suppress(OSError, ValueError):
        return _read(file.read_text())
    command = [sys.executable, "-P", "-m", "smoltulu.tasks.evaluation.names"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=True)
        built = _read(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(built))
    return built


def _read(text: str) -> dict[str, Known]:
    """Names as `_build` gives them, the last line of a text. ValueError where it is none."""
    try:
        known = {name: Known(*values) for name, values in json.loads(text.splitlines()[-1]).items()}
    except (IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no index of tasks: {error}") from None
    if not all(isinstance(one.metrics, list | None) for one in known.values()):
        raise ValueError("no index of tasks")
    return known


def _build() -> dict[str, Known]:
    """Read lm-eval's definitions. Imports lm-eval, not torch."""
    import lm_eval.tasks
    from lm_eval.tasks._index import Kind, TaskIndex

    index = TaskIndex.build([Path(lm_eval.tasks.__file__).parent])
    return {name: _known(entry.cfg or {}) if entry.kind is Kind.TASK else Known(None) for name, entry in index.items()}


if __name__ == "__main__":
    print(json.dumps(_build()))
