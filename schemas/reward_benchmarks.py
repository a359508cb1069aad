"""Which benchmarks a reward model is measured on, and where their pairs come from."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from smoltulu.schemas.common import MAX_NAME, StrictModel, science
from smoltulu.schemas.data import DataSource, RowFormat

RewardBenchmarkName = Literal["rewardbench", "rewardbench_2", "ultrafeedback", "pairs"]

#: Forms that rows of each benchmark may have (docs/reward-benchmarks.md).
BENCHMARK_FORMATS: dict[RewardBenchmarkName, tuple[RowFormat, ...]] = {
    "rewardbench": ("preference", "llmbar", "humanevalpack"),
    "rewardbench_2": ("best_of",),
    "ultrafeedback": ("preference",),
    "pairs": ("preference", "preference_by_label", "llmbar", "humanevalpack"),
}
#: Where the published benchmarks are. No source states a commit; a run resolves `main` and records the commit.
_HUB_SOURCES: dict[str, dict[str, str]] = {
    "rewardbench": {"repository": "allenai/reward-bench", "split": "filtered", "format": "preference"},
    "rewardbench_2": {"repository": "allenai/reward-bench-2", "split": "test", "format": "best_of"},
    "ultrafeedback": {
        "repository": "allenai/ultrafeedback_binarized_cleaned", "split": "test_prefs", "format": "preference",
    },
}  # fmt: skip


class RewardBenchmark(StrictModel):
    """One benchmark of pairs, or of several answers, for every reward model of the recipe."""

    name: RewardBenchmarkName = science(description="rewardbench, rewardbench_2, ultrafeedback, or pairs of your own")
    title: str | None = science(
        None,
        max_length=MAX_NAME,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="what its scores are called; pairs must have one, and a benchmark that is measured twice",
    )
    sources: tuple[DataSource, ...] = science(
        min_length=1, description="rows, concatenated; left out: the benchmark's own Hub dataset"
    )
    truncation: Literal["left", "none"] = science(
        "left",
        description="left: a text is cut to evaluation.max_length tokens at its beginning, as RewardBench's "
        "scripts/run_rm.py does; none: nothing is cut, as its command `rewardbench` does",
    )
    max_malformed_share: float = science(
        0.01, ge=0, le=1, description="share of rows without a comparison (left out, counted) before the stage fails"
    )

    @model_validator(mode="before")
    @classmethod
    def _own_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sources") is None and values.get("name") in _HUB_SOURCES:
            return {**values, "sources": [_HUB_SOURCES[values["name"]]]}
        return values

    @model_validator(mode="after")
    def _rows_of_this_benchmark(self) -> Self:
        if self.name == "pairs" and self.title is None:
            raise ValueError(
                "reward benchmark pairs: give a title, which its scores are called by, e.g. title: my_pairs"
            )
        if self.title in _RESERVED - {self.name}:
            raise ValueError(
                f"reward benchmark {self.name}: the title {self.title!r} is another's name; give it one of its own"
            )
        allowed = BENCHMARK_FORMATS[self.name]
        for source in self.sources:
            if source.format not in allowed:
                raise ValueError(
                    f"reward benchmark {self.label}, source {source.label!r}: format {source.format!r}; allowed are "
                    f"{', '.join(allowed)}"
                )
            if source.sampled is not None:
                raise ValueError(
                    f"reward benchmark {self.label}: rows that a model wrote ({source.sampled!r}) are no benchmark; "
                    "name a repository, a path or a generated file"
                )
        return self

    @property
    def label(self) -> str:
        """What its scores are called by: the title, or the benchmark's name."""
        return self.title or self.name


_RESERVED = {*BENCHMARK_FORMATS, "preference", "implicit_reward"}


def check_labels(benchmarks: tuple[RewardBenchmark, ...]) -> None:
    """ValueError where two benchmarks would have scores of the same name."""
    labels = [one.label for one in benchmarks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"evaluation.reward_benchmarks: {', '.join(twice)} is there twice; give each a title of its own"
        )
