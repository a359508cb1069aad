"""The contamination check: which benchmarks, which rule, what happens to a hit."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import MAX_NAME, ArtifactPath, StrictModel, science
from smoltulu.schemas.data import DataSet, DatasetKind, DataSource

MatchMode = Literal["full", "ngram", "normalised"]
#: text: what is no turn, in the rows of an audit.
Role = Literal["system", "developer", "user", "assistant", "tool", "text"]
ShortItems = Literal["never", "alone", "always"]
Policy = Literal["report", "remove", "span", "fail"]


class Benchmark(StrictModel):
    """An evaluation set whose instances must not be in the training data."""

    name: str = science(max_length=MAX_NAME)
    source: DataSource = science(description="rows as they are; `format` is text")
    query_fields: tuple[str, ...] = science(min_length=1, description="columns that make an instance's query")
    strip_prefix: str = science("", description="prefix taken off the first query field, e.g. 'Question: '")


class ContaminationRules(StrictModel):
    """Rules of open-instruct decontamination/search.py (Tulu 3, arXiv 2411.15124 section 3.2)."""

    mode: MatchMode = science(
        "full",
        description="full: every field is a run of terms in one turn (the rule of SmolTulu's tables 1, 4, 13); "
        "ngram: more than `match_threshold` of an instance's tokens covered by one turn (Tulu 3); "
        "normalised: full without regard to markup, escapes, punctuation, accents and forms of letters",
    )
    ngram_size: int = science(8, ge=1, le=64)
    match_threshold: float = science(0.5, gt=0, lt=1)
    roles: tuple[Role, ...] = science(("user",), min_length=1, description="whose turns are searched; the paper: user")
    policy: Policy = science(
        "remove",
        description="what happens to training rows that hit; span: the matching passage is cut out of its turn, "
        "and the row goes where that leaves a turn empty; fail: stop above `fail_above`",
    )
    span_margin: int = science(
        0, ge=0, absent=0, description="policy span: characters cut on either side of a match too, up to whole words"
    )
    fail_above: float = science(
        0.02, ge=0, le=1, description="share of a benchmark found: above it a warning, under policy fail a stop"
    )
    min_terms: int = science(
        1,
        ge=1,
        description="hits on instances of fewer terms are reported, but neither remove rows nor fail: one-word "
        "instances ('water', 'inflation') hit by accident; 1 is the reference rule",
    )
    short_items: ShortItems = science(
        "never",
        absent="never",
        description="which hits count on instances of fewer terms than `min_terms`, in n-gram mode on those too short "
        "for any window. never: none; alone: those that make up most of the lines they stand on; always: all",
    )

    @model_validator(mode="after")
    def _distinct_roles(self) -> Self:
        if len(set(self.roles)) < len(self.roles):
            raise ValueError(f"roles: each may be named once; given {list(self.roles)}")
        return self

    @model_validator(mode="after")
    def _margin_of_a_span(self) -> Self:
        if self.span_margin and self.policy != "span":
            raise ValueError(
                f"span_margin {self.span_margin}: only policy span cuts anything; leave it out, or set policy: span"
            )
        return self


class BenchmarkIndexConfig(StrictModel):
    """Config of the `benchmark_index` stage: what the index depends on, and nothing else."""

    mode: MatchMode = science()
    ngram_size: int | None = science(description="n-gram mode only")
    benchmarks: tuple[Benchmark, ...] = science(min_length=1)
    short_items: bool = science(
        False, absent=False, description="n-gram mode: instances too short for a window are indexed by their whole text"
    )


class ContaminationStageConfig(StrictModel):
    """Config of one `contamination` run: the rules, and which kind of rows it reads."""

    kind: DatasetKind = science()
    settings: ContaminationRules = science()


class ContaminationSettings(ContaminationRules):
    """The contamination block of a recipe."""

    benchmarks: tuple[Benchmark, ...] = science(min_length=1)
    audit: DataSet | None = science(
        None, description="a further SFT-form set that is checked and reported, never trained on"
    )

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"benchmark names must differ; given twice: {doubled}")
        return self

    def index_config(self, benchmarks: tuple[Benchmark, ...] | None = None) -> BenchmarkIndexConfig:
        """What the index stage gets; `benchmarks` with their revisions resolved."""
        return BenchmarkIndexConfig(
            mode=self.mode,
            ngram_size=self.ngram_size if self.mode == "ngram" else None,
            benchmarks=self.benchmarks if benchmarks is None else benchmarks,
            short_items=self.mode == "ngram" and self.short_items != "never",
        )

    def stage_config(self, kind: DatasetKind, **changes: Any) -> ContaminationStageConfig:
        """What a contamination stage gets: the rules without the benchmarks, which are its input."""
        rules = {name: getattr(self, name) for name in ContaminationRules.model_fields}
        return ContaminationStageConfig(kind=kind, settings=ContaminationRules(**{**rules, **changes}))


class BenchmarkIndexInputs(StrictModel):
    """Resolved inputs: the world's folder, for generated benchmarks."""

    world: str | None = Field(None)


class IndexedBenchmark(StrictModel):
    """A benchmark in an index."""

    name: str
    num_instances: int = Field(ge=0, description="without those skipped")
    num_skipped: int = Field(ge=0, description="instances with a None field: the rule leaves them out")
    not_checked: str | None = Field(None, description="why it could not be loaded; nothing is known of it then")


class BenchmarkIndexOutputs(StrictModel):
    """An index folder (the artifact itself): index.json, queries.parquet and arrays."""

    mode: MatchMode
    ngram_size: int | None = Field(description="n-gram mode only")
    num_instances: int = Field(ge=0)
    num_phrases: int = Field(ge=0, description="distinct fields (full, normalised) or distinct windows (n-gram)")
    benchmarks: tuple[IndexedBenchmark, ...]
    short_items: bool = Field(False, description="n-gram mode: instances too short for a window are found as a whole")


class ContaminationInputs(StrictModel):
    """Resolved inputs: the rows file of a dataset artifact, and the folder of a benchmark index."""

    dataset: str
    index: str


class Shard(StrictModel):
    """A part of a data set that is scanned at one go."""

    path: str
    number: int = Field(ge=0)
    num_shards: int = Field(ge=1)
    start: int = Field(ge=0, description="first row group")
    end: int = Field(ge=0, description="one behind the last")


class ShardResult(StrictModel):
    """What a scan of a shard left in `folder`: result.json, hits.parquet, best.npz."""

    folder: str
    number: int = Field(ge=0)
    num_shards: int = Field(ge=1)
    num_rows: int = Field(ge=0)
    num_turns: int = Field(ge=0, description="turns searched")
    num_bytes: int = Field(ge=0, description="their UTF-8 bytes")
    num_hits: int = Field(ge=0, description="pairs of a row and an instance")
    num_oversized_terms: int = Field(0, ge=0, description="turns with a term above 32,766 bytes")


class BenchmarkReport(StrictModel):
    """Share of a benchmark's instances found in the training rows."""

    name: str
    num_instances: int = Field(ge=0, description="instances checked: those with a None field are skipped")
    num_skipped: int = Field(ge=0)
    num_contaminated: int = Field(ge=0)
    num_unmatchable: int = Field(0, ge=0, description="instances that this rule can never match (no terms, too short)")
    num_short_hits: int = Field(0, ge=0, description="contaminated instances of under 8 terms, often by accident")
    mean_score: float | None = Field(None, description="n-gram mode: mean over the instances of their best score")
    not_checked: str | None = Field(
        None, description="why the benchmark could not be loaded; its share is then unknown"
    )

    @property
    def share(self) -> float | None:
        """Contaminated share, None where not checked or empty."""
        return None if self.not_checked or not self.num_instances else self.num_contaminated / self.num_instances


class ContaminationOutputs(StrictModel):
    """A rows file without the rows (or passages) that hit, the hits, and the removed ids with reasons."""

    file: ArtifactPath = Field("rows.parquet")
    hits_file: ArtifactPath = Field("hits.parquet")
    removed_file: ArtifactPath = Field("removed.jsonl")
    kind: DatasetKind
    mode: MatchMode = Field("full")
    roles: tuple[Role, ...] = Field(("user",))
    num_rows_read: int = Field(ge=0)
    num_rows: int = Field(ge=0)
    num_removed: int = Field(ge=0)
    num_cut: int = Field(0, ge=0, description="policy span: rows kept without the passages that hit")
    num_rows_contaminated: int = Field(ge=0)
    num_hits: int = Field(0, ge=0, description="pairs of a row and an instance")
    num_turns: int = Field(0, ge=0, description="turns searched")
    num_bytes: int = Field(0, ge=0, description="their UTF-8 bytes")
    num_oversized_terms: int = Field(
        0, ge=0, description="turns with a term above 32,766 bytes: searched all the same, where the reference crashes"
    )
    benchmarks: tuple[BenchmarkReport, ...]
