"""Selection of training rows: who scores them, how many are kept, and whether they are cut or weighted.

docs/selection.md says what was claimed of each method, and what our controls showed.
"""

from __future__ import annotations

import math
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
#: Kind of the rows of each set.
SET_KINDS: dict[SelectedSet, DatasetKind] = {
    "sft": "sft",
    "preference": "preference",
    "dpo": "preference",
    "rlvr": "rlvr",
}
MaskKind = Literal["uniform", "zero_output", "reference_checkpoint"]


#: Ways to say how much is kept.
AMOUNTS = ("share", "token_share", "tokens", "threshold")


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
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            more = "; set the others to null" if given else ""
            raise ValueError(
                f"keep: give exactly one of {', '.join(AMOUNTS)}; given: {', '.join(given) or 'none'}{more}"
            )
        return self

    @property
    def amount(self) -> tuple[str, float]:
        """Name and value of what is given."""
        return next((name, value) for name in AMOUNTS if (value := getattr(self, name)) is not None)


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
    precision: Literal["float32", "bfloat16"] = science(
        "float32", description="of the selector model's weights; losses are float32 either way"
    )
    probes: ProbeSettings = science(ProbeSettings())
    heads: HeadSettings = science(HeadSettings())
    gate: Literal["stop", "warn"] = machinery("stop", description="what happens where a gate fails")
    targets: DataSet | None = science(None, description="method: rds_plus. Rows that the kept ones are to be like")

    @property
    def scorer(self) -> Scorer | None:
        """Who makes the scores; None: nothing is selected."""
        return SCORER.get(self.method)

    @property
    def asks_model(self) -> bool:
        """Whether a model reads the rows."""
        return self.scorer not in (None, "counts")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(set(self.sets)) < len(self.sets):
            problems.append(f"sets: {', '.join(self.sets)} names a set twice; name each once")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problems.append(
                f"min_tokens {self.min_tokens:,} is above max_tokens {self.max_tokens:,}: no row is between"
            )
        if self.min_tokens > self.max_length:
            problems.append(
                f"min_tokens {self.min_tokens:,} is above max_length {self.max_length:,}, and longer rows are not "
                "scored, so no row would be left; raise max_length"
            )
        if self.min_weight > self.max_weight:
            problems.append(
                f"min_weight {self.min_weight:g} is above max_weight {self.max_weight:g}: the row ranked first has "
                "max_weight; swap them, or set keep.order to lowest"
            )
        if self.method == "random" and self.keep.threshold is not None:
            problems.append("keep.threshold: method random scores nothing; give share, token_share or tokens")
        if self.keep.threshold is not None and self.use == "filter":
            problems += self._out_of_range(self.keep.threshold)
        if self.method == "rds_plus" and self.targets is None:
            problems.append("targets: method rds_plus ranks rows by how alike they are to a target set; add targets")
        others = [name for name in self.sets if name != "sft"]
        if self.use == "weight" and others:
            problems.append(
                f"use: weight weighs the loss of SFT rows alone, and sets has {', '.join(others)}; set use to filter, "
                "or sets to [sft]"
            )
        if self.method == "rds_plus" and len({SET_KINDS[name] for name in self.sets}) > 1:
            problems.append(
                f"sets: {', '.join(self.sets)} have rows of different kinds, and targets of rds_plus have one; select "
                "from one of them"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _out_of_range(self, threshold: float) -> list[str]:
        """Why a threshold keeps no row or every row, whatever the scores."""
        ranges: dict[Method, tuple[float, float]] = {
            "attention_influence": (-1, math.inf),  # the masked loss is 0
            "rds_plus": (-1, 1),
            "perplexity": (0, math.inf),
            "length": (self.min_tokens, min(self.max_length, self.max_tokens or self.max_length)),
        }
        low, high = ranges.get(self.method, (-math.inf, math.inf))
        if low <= threshold <= high:
            return []
        limits = f"from {low:,g} to {high:,g}" if high < math.inf else f"at least {low:g}"
        return [
            f"keep.threshold {threshold:g} would keep no row or every row: scores of method {self.method} are "
            f"{limits}; give one of these, or a share"
        ]

    def ignored(self) -> list[str]:
        """A sentence for every setting that differs from its default and does nothing."""
        fields = type(self).model_fields
        given = [name for name in fields if getattr(self, name) != fields[name].get_default()]
        if self.method == "none":
            # A shipped recipe may say who would score: only what asks for a selection is told that there is none.
            asked = [name for name in ("keep", "use", "min_tokens", "max_tokens") if name in given]
            return [f"selection: method is none, so {', '.join(asked)} does nothing"] if asked else []
        notes = []

        def note(names: tuple[str, ...], why: str) -> None:
            if idle := [name for name in names if name in given]:
                notes.append(f"selection: {', '.join(idle)} does nothing: {why}")

        if self.method != "attention_influence":
            note(("mask", "probes", "heads", "gate"), f"method {self.method} masks no heads")
        if self.scorer == "counts":
            note(("model", "over", "by", "precision"), f"method {self.method} asks no model")
        if self.method == "rds_plus":
            note(("by",), "RDS+ scores whole rows")
        else:
            note(("targets",), f"method {self.method} compares with no target set")
        if self.method != "random":
            note(("seed",), "it is for method random")
        if self.by != "row" and "rlvr" in self.sets:
            note(("by",), "prompts of data.rlvr have no trained turns")
        if self.use == "filter":
            note(("min_weight", "max_weight"), "they are for use: weight")
        elif self.keep.amount != fields["keep"].get_default().amount:
            notes.append(f"selection: keep.{self.keep.amount[0]} does nothing: use: weight keeps all rows with a score")
        if self.use == "filter" and self.keep.threshold is not None and self.keep.within == "all":
            notes.append("selection: keep.within changes no kept row: a threshold asks for no ranking")
        if self.use == "weight" and self.min_weight == self.max_weight:
            notes.append(f"selection: min_weight and max_weight are both {self.min_weight:g}: all rows weigh the same")
        if self.max_tokens is not None and self.max_tokens > self.max_length:
            notes.append(
                f"selection: max_tokens {self.max_tokens:,} is above max_length {self.max_length:,}, and longer rows "
                "are not scored: they are kept out"
            )
        return notes

    def heads_config(self) -> SelectionHeadsConfig:
        """What finds the heads that are masked."""
        return SelectionHeadsConfig(probes=self.probes, heads=self.heads, mask=self.mask, gate=self.gate)

    def scores_config(self, kind: DatasetKind, trained_turns: TrainedTurns = "last") -> SelectionScoresConfig:
        """What scores one source. Without what its scorer does not read: methods with one scorer share their scores.

        trained_turns  of the trainings on pairs
        """
        assert self.scorer is not None
        reads_losses = self.scorer in ("attention_influence", "perplexity")
        return SelectionScoresConfig(
            kind=kind,
            scorer=self.scorer,
            over="whole" if kind == "rlvr" else self.over if self.scorer != "counts" else "trained",
            by=self.by if reads_losses and kind != "rlvr" else "row",
            max_length=self.max_length,
            mask=self.mask if self.method == "attention_influence" else None,
            trained_turns=trained_turns if kind == "preference" else "last",
            precision=self.precision if self.scorer != "counts" else "float32",
        )

    def stage_config(self, kind: DatasetKind, labels: tuple[str, ...]) -> SelectionConfig:
        """What is kept of a set. Settings that do nothing stand at their defaults: they are in no key."""
        fields = type(self).model_fields
        weighs = self.use == "weight"
        keep = self.keep
        if weighs:
            keep = KeepSettings(share=1.0, order=keep.order, within=keep.within)
        return SelectionConfig(
            kind=kind,
            method=self.method,
            keep=keep,
            use=self.use,
            min_weight=self.min_weight if weighs else fields["min_weight"].default,
            max_weight=self.max_weight if weighs else fields["max_weight"].default,
            by=self.scores_config(kind).by if weighs else "row",
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            seed=self.seed if self.method == "random" else 0,
            labels=labels,
        )


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


class SourceSelection(StrictModel):
    """What became of the rows of one source."""

    label: str
    num_rows: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    num_kept: int = Field(ge=0)
    num_kept_tokens: int = Field(ge=0)
    dropped: dict[str, int] = Field({}, description="why a row was not kept -> number of rows")


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
    use: Literal["filter", "weight"]
    by_source: dict[str, SourceSelection] = Field(description="number of the source -> what became of its rows")
