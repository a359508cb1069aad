"""Selection of training rows: who scores them, how many are kept, and whether they are cut or weighted.

docs/selection.md says what was claimed of each method, and what our controls showed.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import ArtifactPath, StrictModel, machinery, science
from smoltulu.schemas.data import DataSet, DatasetKind
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.training import TrainedTurns

#: Sets of `data` whose rows can be selected.
SelectedSet = Literal["sft", "preference", "dpo", "rlvr"]
Method = Literal["none", "attention_influence", "rds_plus", "length", "perplexity", "random"]
#: What a scores file is made by. `counts`: tokens alone, which is all that `length` and `random` need.
Scorer = Literal["attention_influence", "rds_plus", "perplexity", "counts"]
SCORER: dict[Method, Scorer] = {
    "attention_influence": "attention_influence",
    "rds_plus": "rds_plus",
    "perplexity": "perplexity",
    "length": "counts",
    "random": "counts",
}
MaskKind = Literal["uniform", "zero_output", "reference_checkpoint"]


class ProbeSettings(StrictModel):
    """Lookups that a selector model must do: JSON of pairs, shown answers, one question. Made from the seed alone."""

    seed: int = science(0, ge=0)
    num_probes: int = science(50, ge=8, le=10_000, description="the paper has 800 of 4,096 tokens (2505.07293, 2.2)")
    max_tokens: int = science(450, ge=32, description="of prompt and answer: as many pairs as fit")
    num_shown: int = science(3, ge=0, le=16, description="questions that are shown with their answers")
    key_length: int = science(32, ge=2, le=64, description="characters of a key")


class HeadSettings(StrictModel):
    """Which heads copy."""

    rule: Literal["threshold", "top_share", "union"] | None = science(
        None, description="none: threshold below 200 heads, union from there on"
    )
    threshold: float = science(0.1, gt=0, le=1, description="retrieval score (2404.15574)")
    top_share: float = science(0.05, gt=0, le=1, description="of all heads (2505.07293)")
    num_random_sets: int = science(5, ge=1, le=100, description="of equal size and layers: the causal control")


class KeepSettings(StrictModel):
    """How much is kept: exactly one of the amounts."""

    share: float | None = science(None, gt=0, le=1, description="of the rows")
    token_share: float | None = science(None, gt=0, le=1, description="of the tokens")
    tokens: int | None = science(None, ge=1, description="budget of tokens, as the rendered rows have them")
    threshold: float | None = science(None, description="rows that score at least so much")
    order: Literal["highest", "lowest"] = science("highest", description="which rows of the ranking are kept")
    within: Literal["domain", "all"] = science(
        "domain", description="rank each source by itself (2505.07293, 2.4), or all rows together"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        names = ("share", "token_share", "tokens", "threshold")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"keep: give exactly one of {', '.join(names)}; given: {', '.join(given) or 'none'}")
        return self


class SelectionSettings(StrictModel):
    """The selection block of a recipe."""

    method: Method = science("none")
    sets: tuple[SelectedSet, ...] = science(("sft",), min_length=1, description="sets of data that are selected from")
    model: ModelSource | None = science(None, description="who scores; none: the base model")
    keep: KeepSettings = science(KeepSettings(share=0.2))
    use: Literal["filter", "weight"] = science("filter", description="cut rows, or weigh the loss of all")
    min_weight: float = science(0.5, ge=0, le=100, description="use: weight. Of the row ranked last")
    max_weight: float = science(1.5, gt=0, le=100, description="use: weight. Of the row ranked first")
    over: Literal["trained", "whole"] = science(
        "trained", description="tokens whose loss is scored; prompts of rlvr have no trained ones: always whole"
    )
    by: Literal["row", "turn", "step"] = science(
        "row", description="also score each trained turn, or each step of its reasoning; weights are then by these"
    )
    max_length: int = science(
        2048, ge=8, description="tokens of the longest row that is scored; longer ones are kept out"
    )
    min_tokens: int = science(1, ge=1, description="rows with fewer tokens are kept out")
    max_tokens: int | None = science(None, ge=1, description="rows with more tokens are kept out")
    seed: int = science(0, ge=0, description="method: random")
    mask: MaskKind = science("uniform")
    probes: ProbeSettings = science(ProbeSettings())
    heads: HeadSettings = science(HeadSettings())
    gate: Literal["stop", "warn"] = machinery("stop", description="what happens where a gate fails")
    targets: DataSet | None = science(None, description="method: rds_plus. Rows that the kept ones are to be like")


class SelectionHeadsConfig(StrictModel):
    """Config of the stage `selection_heads`."""

    probes: ProbeSettings = science()
    heads: HeadSettings = science()
    mask: MaskKind = science()
    gate: Literal["stop", "warn"] = machinery("stop")


class SelectionHeadsInputs(StrictModel):
    """Resolved inputs of it."""

    model: str = Field(description="folder of the selector model")
    chat_template: str = Field("", description="text of the Jinja template")


class Head(StrictModel):
    """A query head, from 0."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)


class SelectionHeadsOutputs(StrictModel):
    """The heads artifact."""

    heads_file: ArtifactPath = Field("heads.json", description="every head's score, what is chosen, control and gates")
    probes_file: ArtifactPath = Field("probes.jsonl")
    chosen: tuple[Head, ...]
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1, description="query heads of a layer")
    probe_accuracy: float = Field(ge=0, le=1)
    max_score: float = Field(ge=0, le=1)
    failed_gates: tuple[str, ...] = Field((), description="a sentence each")


class SelectionScoresConfig(StrictModel):
    """Config of the stage `selection_scores`: one source of one set."""

    kind: DatasetKind = science()
    scorer: Scorer = science()
    over: Literal["trained", "whole"] = science()
    by: Literal["row", "turn", "step"] = science()
    max_length: int = science()
    mask: MaskKind | None = science(description="attention_influence alone")
    trained_turns: TrainedTurns = science("last", absent="last", description="kind preference: as the pairs train")
    precision: Literal["float32", "bfloat16"] = science(
        "float32", absent="float32", description="of the weights; losses are float32 either way"
    )


class SelectionScoresInputs(StrictModel):
    """Resolved inputs of it."""

    model: str | None = Field(None, description="folder of the selector model; none for counts")
    tokenizer: str = Field(description="folder of the base model: its tokens are counted")
    dataset: str = Field(description="rows file")
    heads: str | None = Field(None, description="heads.json")
    targets: str | None = Field(None, description="rows file of the targets of RDS+")
    targets_hits: str | None = Field(None, description="folder of the contamination artifact of the targets")
    chat_template: str = Field(description="text of the Jinja template")


class SelectionScoresOutputs(StrictModel):
    """The scores of the rows of one source: see tasks/selection/scores_file.py."""

    scores_file: ArtifactPath = Field("scores.parquet")
    scorer: Scorer
    num_scored_rows: int = Field(ge=0)
    num_unscored_rows: int = Field(ge=0, description="too long, without a trained token, or a loss that is no number")
    num_tokens: int = Field(ge=0)


class SelectionConfig(StrictModel):
    """Config of the stage `selection`: what is kept of a set."""

    kind: DatasetKind = science()
    method: Method = science()
    keep: KeepSettings = science()
    use: Literal["filter", "weight"] = science()
    min_weight: float = science()
    max_weight: float = science()
    by: Literal["row", "turn", "step"] = science()
    min_tokens: int = science()
    max_tokens: int | None = science()
    seed: int = science()
    labels: tuple[str, ...] = machinery((), description="of the sources, for messages and the report")


class SelectionInputs(StrictModel):
    """Resolved inputs of it."""

    dataset: str = Field(description="rows file, all checks behind it")
    scores: dict[str, str] = Field(description="number of the source -> scores file")
    heads: str | None = Field(None, description="heads.json, for the report")


class SelectionOutputs(StrictModel):
    """Kept rows in their order, what became of each row, and a page."""

    file: ArtifactPath = Field("rows.parquet")
    fates_file: ArtifactPath = Field("fates.parquet", description="every row: domain, score, tokens, kept or why not")
    page_file: ArtifactPath = Field("selection.html")
    weights_file: ArtifactPath | None = Field(None, description="use: weight. One line a row of `file`")
    kind: DatasetKind
    method: Method
    num_rows_read: int = Field(ge=0)
    num_rows: int = Field(ge=1)
    num_kept_tokens: int = Field(ge=0)
