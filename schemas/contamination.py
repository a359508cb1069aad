"""The contamination check: which benchmarks, which rule, what happens to a hit."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.common import StrictModel, science
from schemas.data import DataSet, DatasetKind, DataSource


class Benchmark(StrictModel):
    """An evaluation set whose instances must not be in the training data."""

    name: str = science()
    source: DataSource = science(description="rows as they are; `format` is text")
    query_fields: tuple[str, ...] = science(min_length=1, description="columns that make an instance's query")
    strip_prefix: str = science("", description="prefix taken off the first query field, e.g. 'Question: '")


class ContaminationSettings(StrictModel):
    """Rules of open-instruct decontamination/search.py (Tulu 3, arXiv 2411.15124 section 3.2)."""

    mode: Literal["full", "ngram"] = science(
        "full",
        description="full: every field is a run of terms in one turn (the rule of SmolTulu's tables 1, 4, 13); "
        "ngram: more than `match_threshold` of an instance's tokens covered by one turn (Tulu 3)",
    )
    ngram_size: int = science(8, ge=1, le=64)
    match_threshold: float = science(0.5, gt=0, lt=1)
    policy: Literal["report", "remove", "fail"] = science(
        "remove", description="what happens to training rows that hit; fail: stop above `fail_above`"
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


class ContaminationStageConfig(StrictModel):
    """Config of one `contamination` run: the rules, and which kind of rows it reads."""

    kind: DatasetKind = science()
    settings: ContaminationSettings = science()


class ContaminationInputs(StrictModel):
    """Resolved inputs: the rows file of a dataset artifact, and the world's folder for generated benchmarks."""

    dataset: str
    world: str | None = Field(None)


class BenchmarkReport(StrictModel):
    """Share of a benchmark's instances found in the training rows."""

    name: str
    num_instances: int = Field(ge=0, description="instances checked: those with a None field are skipped")
    num_skipped: int = Field(ge=0)
    num_contaminated: int = Field(ge=0)
    num_unmatchable: int = Field(0, ge=0, description="instances that this rule can never match (no terms, too short)")
    num_short_hits: int = Field(0, ge=0, description="contaminated instances of under 8 terms, often by accident")
    not_checked: str | None = Field(
        None, description="why the benchmark could not be loaded; its share is then unknown"
    )

    @property
    def share(self) -> float | None:
        """Contaminated share, None where not checked or empty."""
        return None if self.not_checked or not self.num_instances else self.num_contaminated / self.num_instances


class ContaminationOutputs(StrictModel):
    """A rows file without the rows that hit, the hits, and the removed ids with reasons."""

    file: str = Field("rows.jsonl")
    hits_file: str = Field("hits.jsonl")
    removed_file: str = Field("removed.jsonl")
    kind: DatasetKind
    num_rows_read: int = Field(ge=0)
    num_rows: int = Field(ge=0)
    num_removed: int = Field(ge=0)
    num_rows_contaminated: int = Field(ge=0)
    benchmarks: tuple[BenchmarkReport, ...]
