"""Where rows come from, what form they have, and what a malformed row costs."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.common import MAX_NAME, MAX_PATH, ArtifactPath, StrictModel, machinery, science
from smoltulu.schemas.mixture import AS_IT_IS, MixtureRule, check_rules

RowFormat = Literal[
    "messages",
    "prompt_completion",
    "instruction",
    "question_answer",
    "function_calls",
    "transcript",
    "preference",
    "preference_by_label",
    "preference_by_strength",
    "preference_by_score",
    "kto",
    "rlvr",
    "text",
    "all_text",
    "best_of",
    "llmbar",
    "humanevalpack",
]
#: texts: rows of an audit, whatever their form.
DatasetKind = Literal["sft", "preference", "rlvr", "texts"]
#: What becomes of pairs that a data set has for a reason of its own: left out and counted, or a fault.
Unwanted = Literal["drop", "malformed"]

#: Names that other tools and data sets have for a form -> what a source says here.
_OTHER_NAMES = {
    "sharegpt": "format: messages, fields: {messages: conversations}",
    "chatml": "format: messages",
    "openai": "format: messages",
    "conversations": "format: messages, fields: {messages: conversations}",
    "alpaca": "format: instruction",
    "dolly": "format: instruction, fields: {input: context, output: response}",
    "xlam": "format: function_calls",
    "openorca": "format: question_answer, fields: {answer: response}",
    "math": "format: question_answer, fields: {question: problem, answer: solution}",
    "orca_dpo": "format: preference, fields: {prompt: question}",
    "dpo": "format: preference",
    "hh_rlhf": "format: preference",
    "ultrafeedback": "format: preference, or preference_by_score for the raw rows with `completions`",
    "helpsteer": "format: preference_by_strength",
    "helpsteer2": "format: preference_by_strength",
}


def name_of_ours(value: Any) -> Any:
    """ValueError for a form that others call so, with what it is called here."""
    known = _OTHER_NAMES.get(str(value).lower().replace("-", "_"))
    if known is not None:
        raise ValueError(f"{value!r} is not what the form is called here; write {known}")
    return value


class DataSource(MixtureRule):
    """One table of rows: a Hub dataset at a revision, a local file or folder, a file of the `world` stage, or samples.

    Exactly one of `repository`, `path`, `generated` and `sampled` is given.
    """

    repository: str | None = science(
        None, max_length=MAX_NAME, description="Hub dataset, e.g. allenai/tulu-3-sft-mixture"
    )
    revision: str = science(
        "main", max_length=MAX_NAME, description="Hub revision; a branch or tag is resolved to its commit before keying"
    )
    subset: str | None = science(
        None,
        max_length=MAX_NAME,
        description="configuration of a Hub dataset, or of a folder whose card has some, e.g. `main` of openai/gsm8k; "
        "`*`: all of them, `limit` rows of each on the Hub",
    )
    split: str | None = science(
        None,
        none_in_key="train",
        max_length=MAX_NAME,
        description="split of a Hub dataset (none: train) or of a path; part of one as `datasets` writes it: "
        "train[:1000], train+test; a folder with files of several splits needs it",
    )
    path: str | None = machinery(
        None,
        max_length=MAX_PATH,
        description="local .jsonl, .ndjson, .json, .csv or .tsv (.gz, .zst, .xz, .bz2 allowed), .parquet, .arrow, or a "
        "folder of them, also one that save_to_disk wrote; keyed by content digest; "
        "${VARIABLE} and ${VARIABLE:-default} are expanded; relative to the recipe file's folder, and to the working "
        "folder where it begins with a variable or there is no file",
    )
    generated: str | None = science(None, max_length=MAX_NAME, description="file of the `world` stage, e.g. sft.jsonl")
    sampled: str | None = science(
        None,
        absent=None,
        max_length=MAX_NAME,
        description="rows that a model wrote: an entry of the recipe's block `sampled`; its format need not be given",
    )
    format: RowFormat = science(
        description="how a row is read, see docs/data.md; all_text: audits only; the last three: reward benchmarks only"
    )
    fields: dict[str, str] = science({}, description="our field name -> column name, where they differ")
    verifier: str | None = science(
        None, description="rlvr only: verifier for every row, where rows name none, e.g. gsm8k or math@paper"
    )
    verifiers: dict[str, str] | None = science(
        None,
        absent=None,
        description="rlvr only: name in the rows -> the verifier that grades them, where another one than that of the "
        "same name is meant, e.g. {gsm8k: gsm8k_strict, ifeval: ifeval@paper}; case does not count",
    )
    limit: int | None = science(None, ge=1, description="first rows only")
    on_bad_line: Literal["stop", "count"] = science(
        "stop",
        absent="stop",
        description="a line that cannot be read (torn, NUL bytes, not UTF-8): stop, or a malformed row",
    )
    columns: tuple[str, ...] | None = science(
        None, absent=None, min_length=1, description="format all_text only: columns whose texts are read; none: all"
    )
    ignore: tuple[str, ...] = science(
        (),
        absent=(),
        description="columns, and keys of turns, that are left out although they change what a row means, e.g. "
        "[images, weight]; the report counts the rows that had one",
    )
    ties: Unwanted | None = science(
        None,
        absent=None,
        description="preference only: pairs with the same answers, the same scores, or a judgement of tie; none: "
        "the same scores are counted and kept, the others are malformed",
    )
    empty_answers: Unwanted | None = science(
        None, absent=None, description="preference only: pairs with a null or empty answer; none: malformed"
    )
    rejected_above_chosen: Literal["keep", "drop", "malformed"] = science(
        "keep", absent="keep", description="preference only: pairs whose scores say the opposite; always counted"
    )
    min_margin: float | None = science(
        None,
        absent=None,
        ge=0,
        description="preference only: pairs whose scores (or strength) are less apart are dropped; rows without scores "
        "are malformed then",
    )

    @field_validator("format", mode="before")
    @classmethod
    def _name_of_ours(cls, value: Any) -> Any:
        return name_of_ours(value)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = ("repository", "path", "generated", "sampled")
        given = [name for name in origins if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a data source has exactly one of {', '.join(origins)}; got {given or 'none'}")
        return self

    @property
    def label(self) -> str:
        """Short name for reports: repository, file name, generated file, or entry of `sampled`."""
        return self.repository or self.generated or self.sampled or str(self.path).rstrip("/").rsplit("/", 1)[-1]


class DataSet(StrictModel):
    """A training or evaluation set: sources in order, concatenated."""

    sources: tuple[DataSource, ...] = science(min_length=1)
    max_malformed_share: float = science(
        0.01, ge=0, le=1, description="share of rows that may be malformed (they are dropped) before the stage fails"
    )
    seed: int = science(0, absent=0, ge=0, description="of a mixture: draws its rows, and their order")
    expected_rows: int | None = machinery(
        None, ge=1, description="for `plan`, until they are read: steps, FLOPs and time"
    )

    @model_validator(mode="after")
    def _one_mixture(self) -> Self:
        check_rules(self.sources, self.seed)
        return self

    @property
    def is_mixed(self) -> bool:
        """Whether it is more or less than its sources, one after the other."""
        return any(source.is_mixed for source in self.sources)

    @property
    def unmixed(self) -> DataSet:
        """Its sources as they are: what is read and checked, whatever the mixture."""
        sources = tuple(source.model_copy(update=AS_IT_IS) for source in self.sources)
        return self.model_copy(update={"sources": sources, "seed": 0})


#: Sets of `data` that rows which a model wrote may be part of, and the form that those have there.
SAMPLED_FORMATS: dict[str, RowFormat] = {"sft": "messages", "preference": "preference", "dpo": "preference"}


class DataSettings(StrictModel):
    """The data of a recipe. A set that is called as a training is for that training alone."""

    sft: DataSet | None = science(None)
    preference: DataSet | None = science(None, description="pairs for the reward model and DPO")
    dpo: DataSet | None = science(
        None, description="pairs for DPO alone, e.g. those that the reward model ranked; none: those of preference"
    )
    rlvr: DataSet | None = science(None, description="prompts with verifiable answers")
    preference_eval: DataSet | None = science(None, description="held-out pairs for pair accuracy")
    verified_eval: DataSet | None = science(None, description="held-out rlvr rows for sampled accuracy")

    @model_validator(mode="before")
    @classmethod
    def _sampled_rows_have_one_form(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _with_format(data, SAMPLED_FORMATS.get(name)) for name, data in values.items()}


def _with_format(data: Any, form: RowFormat | None) -> Any:
    """A set as a recipe has it, with the form of its sampled sources, where none is given."""
    sources = data.get("sources") if isinstance(data, dict) else None
    if form is None or not isinstance(sources, (list, tuple)):
        return data
    filled = [{"format": form} | one if isinstance(one, dict) and one.get("sampled") else one for one in sources]
    return {**data, "sources": filled}


class DatasetStageConfig(StrictModel):
    """Config of the `dataset` stage: one set, read, adapted and checked."""

    kind: DatasetKind = science()
    data: DataSet = science()


class SourceReport(StrictModel):
    """What reading one source gave. A row is normalised, malformed, dropped, or merged with another one."""

    label: str
    num_rows: int = Field(ge=0)
    num_malformed: int = Field(ge=0)
    reasons: dict[str, int] = Field(description="reason -> number of rows")
    examples: tuple[str, ...] = Field(description="first malformed rows: position, reason and the row, shortened")
    dropped: dict[str, int] = Field({}, description="reason -> number of rows without a fault that are left out")
    num_merged: int = Field(0, ge=0, description="rows that became a part of another one: the second of a KTO pair")
    noticed: dict[str, int] = Field({}, description="what is odd about rows that were kept -> number of rows")
    unread: dict[str, int] = Field(
        {}, description="column, or key of a turn, that no field reads -> number of normalised rows that have it"
    )
    texts: dict[str, int] = Field({}, description="format all_text only: column -> number of its texts that were read")
    ignored: dict[str, int] = Field({}, description="entry of `ignore` -> number of rows that have it")

    @property
    def num_dropped(self) -> int:
        """Rows without a fault that are left out, because a setting says so or their partner is missing."""
        return sum(self.dropped.values())


class DatasetOutputs(StrictModel):
    """Normalised rows of one kind as Parquet (tasks/data/rows.py).

    sft: {"id", "messages"} · preference: {"id", "prompt", "chosen", "rejected"}, each a list of messages ·
    rlvr: {"id", "prompt": messages, "verifier", "ground_truth"} · texts: {"id", "messages", "origins"}.
    """

    file: ArtifactPath = Field("rows.parquet")
    kind: DatasetKind
    num_rows: int = Field(ge=0)
    sources: tuple[SourceReport, ...] = Field(())


class DatasetInputs(StrictModel):
    """Folders resolved for the `dataset` stage."""

    world: str | None = Field(None, description="folder of the world artifact, for generated sources")
    sampled: dict[str, str] = Field({}, description="entry of the recipe's block `sampled` -> its rows file")
