"""The registry of benchmarks: what an audit can check by name, and what was published about it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.contamination import Benchmark
from smoltulu.schemas.data import DataSource

#: The three tables of the paper: 1, 4 and 13.
PaperTable = Literal["sft", "dpo", "rlvr"]


class LocalBenchmark(StrictModel):
    """The form in which a benchmark's file lies at hand."""

    files: tuple[str, ...] = Field(min_length=1, description="patterns of file names, e.g. gsm8k_test.*")
    query_fields: tuple[str, ...] = Field((), description="its columns, where they differ from the Hub's")
    strip_prefix: str = Field("")


class RegisteredBenchmark(StrictModel):
    """One benchmark: where it is, which of its columns are looked for, what was published."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    title: str
    paper: bool = Field(False, description="one of the 17 rows of the paper's tables")
    evaluated: bool = Field(False, description="the models are evaluated on it")
    source: DataSource
    query_fields: tuple[str, ...] = Field(min_length=1)
    num_instances: int | None = Field(None, ge=1)
    published: dict[PaperTable, float] = Field({}, description="percent of instances found")
    local: LocalBenchmark
    hit_note: str = Field("", description="what a reader of its hits in full match must know")
    clean_note: str = Field("", description="what a reader of their absence in full match must know")

    def on_hub(self) -> Benchmark:
        """As it is on the Hub."""
        return Benchmark(name=self.name, source=self.source, query_fields=self.query_fields)

    def from_file(self, path: str) -> Benchmark:
        """As it lies in a local file."""
        return Benchmark(
            name=self.name,
            source=DataSource(path=path, format="text"),
            query_fields=self.local.query_fields or self.query_fields,
            strip_prefix=self.local.strip_prefix,
        )


class BenchmarkRegistry(StrictModel):
    """All of them, and the data sets that the published tables measured."""

    paper_sets: dict[PaperTable, str]
    benchmarks: tuple[RegisteredBenchmark, ...]

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        assert len(set(names)) == len(names), names
        return self

    def find(self, name: str) -> RegisteredBenchmark | None:
        """The benchmark of that name."""
        return next((benchmark for benchmark in self.benchmarks if benchmark.name == name), None)

    def published_share(self, benchmark: str, repository: str | None) -> float | None:
        """Share (0 to 1) that the paper prints for this benchmark and Hub data set; None where it prints none."""
        table = next((table for table, name in self.paper_sets.items() if name == repository), None)
        found = self.find(benchmark)
        if table is None or found is None or table not in found.published:
            return None
        return found.published[table] / 100
