"""How much of each source is in a set, and which of its rows are held out (docs/mixtures.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import ArtifactPath, StrictModel, machinery, science

#: Ways to say how much of a source is in a set: one of them, or none (all of its rows, once).
_AMOUNTS = ("repeats", "num_rows", "share", "weight")
#: Shares of a set add up to 1 but for rounding.
_TOLERANCE = 1e-6


class MixtureRule(StrictModel):
    """How much of one source is in the set. Rows are counted after all checks: malformed and removed ones are gone."""

    repeats: float | None = science(
        None, absent=None, gt=0, le=1000, description="times that each row is in the set; 0.5: half of the rows"
    )
    num_rows: int | None = science(None, absent=None, ge=1, description="rows of this source in the set")
    share: float | None = science(None, absent=None, gt=0, le=1, description="of the rows of the set")
    weight: float | None = science(
        None, absent=None, gt=0, le=1e9, description="rows of the sources are in these proportions; all have one"
    )
    max_repeats: float | None = science(
        None,
        absent=None,
        ge=1,
        le=1000,
        description="with num_rows, share or weight: times that a row may be in the set where there are too few; none: "
        "1. OLMo-core: max_repetition_ratio",
    )
    held_out: float | None = science(
        None, absent=None, gt=0, lt=1, description="share of the rows that is put aside for the held-out loss"
    )
    num_held_out: int | None = science(None, absent=None, ge=1, description="the same, as a number of rows")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        amounts = [name for name in _AMOUNTS if getattr(self, name) is not None]
        if len(amounts) > 1:
            said = " and ".join(f"{name} {getattr(self, name):g}" for name in amounts)
            raise ValueError(f"{said} are two answers to how much of the source is in the set; keep one of them")
        if self.max_repeats is not None and amounts in ([], ["repeats"]):
            raise ValueError(
                f"max_repeats {self.max_repeats:g} bounds num_rows, share or weight, and none of them is given; give "
                "one, or use repeats alone"
            )
        if self.held_out is not None and self.num_held_out is not None:
            raise ValueError(
                f"held_out {self.held_out:g} and num_held_out {self.num_held_out:,} are two answers; keep one of them"
            )
        return self

    @property
    def rule(self) -> MixtureRule:
        """These fields alone."""
        return MixtureRule(**{name: getattr(self, name) for name in MixtureRule.model_fields})

    @property
    def of_held_out(self) -> MixtureRule:
        """What decides about held-out rows, and nothing else."""
        return MixtureRule(held_out=self.held_out, num_held_out=self.num_held_out)

    @property
    def holds_out(self) -> bool:
        return self.held_out is not None or self.num_held_out is not None

    @property
    def is_mixed(self) -> bool:
        """Whether any of these fields is given."""
        return any(getattr(self, name) is not None for name in MixtureRule.model_fields)


#: What a source has that is read as it is.
AS_IT_IS: dict[str, None] = dict.fromkeys(MixtureRule.model_fields)


def check_rules(rules: Sequence[MixtureRule], seed: int) -> None:
    """ValueError where the rules of a set contradict each other."""
    with_weight = sum(rule.weight is not None for rule in rules)
    if 0 < with_weight < len(rules):
        raise ValueError(
            f"weight: {with_weight} of {len(rules)} sources have one; give each source a weight, or use share, which "
            "leaves the other sources as they are"
        )
    shares = [rule.share for rule in rules if rule.share is not None]
    total = sum(shares)
    if len(shares) == len(rules):
        if abs(total - 1) > _TOLERANCE:
            raise ValueError(
                f"share: every source has one, and they add up to {total:g}, not to 1; mend them, use weight, or leave "
                "one source without a share"
            )
    elif total > 1 - _TOLERANCE:
        raise ValueError(
            f"share: the shares add up to {total:g}, which leaves nothing to the sources without one; lower them"
        )
    if seed and not any(rule.is_mixed for rule in rules):
        raise ValueError(
            f"seed {seed} draws the rows of a mixture, and no source has a share, weight, number of rows or repeats; "
            "give one, or remove seed"
        )


class MixtureConfig(StrictModel):
    """Config of the stages `mixture` and `held_out_rows`: one rule for each source, in their order."""

    kind: Literal["sft", "preference", "rlvr"] = science()
    rules: tuple[MixtureRule, ...] = science(min_length=1)
    seed: int = science(0, ge=0)
    labels: tuple[str, ...] = machinery((), description="of the sources, for messages and the report")


class MixtureInputs(StrictModel):
    """Resolved inputs of both."""

    dataset: str = Field(description="rows file, all checks behind it")


class SourceShare(StrictModel):
    """What came of one source."""

    label: str
    num_given: int = Field(ge=0, description="rows after all checks")
    num_held_out: int = Field(0, ge=0)
    num_left_out: int = Field(0, ge=0, description="not trained on: they ask what is held out of another source")
    num_distinct: int = Field(ge=0, description="different rows in the set")
    num_rows: int = Field(ge=0, description="rows in the set, repeats counted")

    @property
    def num_repeated(self) -> int:
        """Rows in the set beyond the first of each."""
        return self.num_rows - self.num_distinct

    @property
    def num_unused(self) -> int:
        return self.num_given - self.num_held_out - self.num_left_out - self.num_distinct


class MixtureOutputs(StrictModel):
    """A rows file in the order of the draw, without the rows that are held out.

    An id is that of the row that was read; of its second time in the set with `#2` behind it, and so on.
    """

    file: ArtifactPath = Field("rows.parquet")
    kind: Literal["sft", "preference", "rlvr"]
    num_rows: int = Field(ge=0)
    num_held_out: int = Field(0, ge=0)
    shares: tuple[SourceShare, ...] = Field(description="of the sources, in their order")


class HeldOutRowsOutputs(StrictModel):
    """The rows that are held out, in the order of their sources."""

    file: ArtifactPath = Field("rows.parquet")
    kind: Literal["sft", "preference", "rlvr"]
    num_rows: int = Field(ge=1)
    num_by_source: dict[str, int] = Field(description="label -> rows")
