"""Near-duplicates: which text of a row is compared, how alike is too alike, and what happens to such rows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import ArtifactPath, StrictModel, science
from smoltulu.schemas.data import DatasetKind

#: Sets that a set can be compared with. Of the trained ones only those that come before it, in this order.
OtherSet = Literal["preference_eval", "verified_eval", "benchmarks", "sft", "preference", "dpo", "rlvr"]

#: A pair that is exactly as alike as `threshold` becomes a candidate with at least this probability.
_FOUND = 0.99


def candidate_probability(jaccard: float, num_bands: int, rows_per_band: int) -> float:
    """Probability that two sets of this similarity agree in all rows of at least one band: 1 - (1 - j^r)^b.

    Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    return 1 - (1 - jaccard**rows_per_band) ** num_bands


class NearDuplicateRules(StrictModel):
    """How rows are compared."""

    policy: Literal["report", "remove"] = science("report", description="what happens to a near-duplicate")
    text: Literal["user", "all"] = science(
        "user", description="what is compared of a row: its user turns, or all its text (of a pair: both answers too)"
    )
    threshold: float = science(
        0.8, ge=0.3, le=1, description="Jaccard similarity of the two sets of shingles, from which on it is one"
    )
    shingle: Literal["words", "characters"] = science("words", description="what a shingle is made of")
    shingle_size: int = science(3, ge=1, le=64, description="words or characters of a shingle")
    paraphrases: float | None = science(
        None,
        absent=None,
        ge=0.5,
        le=1,
        description="cosine of word vectors from which a row is told to mean the same as one of another set or of a "
        "benchmark; needs smoltulu[paraphrases]; removes nothing",
    )
    same_numbers: bool = science(
        False, description="a pair whose numbers differ is no near-duplicate: with other numbers a task is another one"
    )
    num_perm: int = science(128, ge=16, le=1024, description="hash functions of a MinHash signature")

    def bands(self) -> tuple[int, int]:
        """(number of bands, rows per band): the most selective that still finds 99 % of pairs at the threshold."""
        for rows in range(self.num_perm, 0, -1):
            if candidate_probability(self.threshold, self.num_perm // rows, rows) >= _FOUND:
                return self.num_perm // rows, rows
        raise AssertionError(self)  # the least threshold and num_perm that are allowed are enough: 1 - 0.7^16 > 0.99


class NearDuplicateSettings(NearDuplicateRules):
    """The near_duplicates block of a recipe."""

    against: tuple[OtherSet, ...] = science(
        ("preference_eval", "verified_eval", "benchmarks"),
        description="sets of the recipe that the rows are compared with, besides themselves; benchmarks: those of the "
        "block contamination",
    )

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"against: each may be named once; given {list(self.against)}")
        if self.text == "all" and "benchmarks" in self.against:
            raise ValueError(
                "text: all compares whole rows, and a benchmark has questions only, so none would be found; give "
                "text: user, or against without benchmarks"
            )
        return self

    def stage_config(self, kind: DatasetKind) -> NearDuplicateStageConfig:
        """What a stage gets: the rules. The sets are its inputs."""
        rules = {name: getattr(self, name) for name in NearDuplicateRules.model_fields}
        return NearDuplicateStageConfig(kind=kind, settings=NearDuplicateRules(**rules))


class NearDuplicateStageConfig(StrictModel):
    """Config of one `near_duplicates` run.

    within   compare the rows with each other, not only with the other sets
    """

    kind: DatasetKind = science()
    within: bool = science(True)
    settings: NearDuplicateRules = science()


class NearDuplicateInputs(StrictModel):
    """Resolved inputs: rows files of the set and of those it is compared with, and a benchmark index's folder."""

    dataset: str
    others: dict[str, str] = Field({}, description="name of the set -> its rows file")
    index: str | None = Field(None)


class DuplicateCount(StrictModel):
    """Rows of one source that are near-duplicates of something in one set."""

    source: str = Field(description="number of the source in the set")
    other_set: str = Field(description="`itself`, a set of the recipe, or `benchmark NAME`")
    other_source: str = Field(description="number of the source in the other set; of a benchmark: empty")
    num_rows: int = Field(ge=1)
    num_exact: int = Field(ge=0, description="of these, rows with the very same words")
    num_others: int = Field(ge=1, description="different rows of the other set that they are alike to")


class NearDuplicateOutputs(StrictModel):
    """A rows file without the removed rows, the pairs, the clusters and the page."""

    file: ArtifactPath = Field("rows.parquet")
    pairs_file: ArtifactPath = Field(
        "pairs.parquet", description="row, row_id, other_set, other_row, other_id, jaccard, exact, removed"
    )
    clusters_file: ArtifactPath = Field("clusters.parquet", description="kept row, its set, and all rows alike to it")
    page_file: ArtifactPath = Field("near_duplicates.html")
    paraphrases_file: ArtifactPath | None = Field(
        None, description="row, row_id, other_set, other_row, other_id, cosine, same_numbers: the likest of a row"
    )
    num_paraphrases: int | None = Field(None, description="rows; those that are near-duplicates are not counted again")
    num_paraphrases_same_numbers: int | None = Field(None, description="of these, with the same numbers in both texts")
    kind: DatasetKind
    policy: Literal["report", "remove"]
    minhash: str = Field(description="library and version of the signatures")
    num_rows_read: int = Field(ge=0)
    num_rows: int = Field(ge=0, description="rows of `file`")
    num_removed: int = Field(ge=0)
    num_near_duplicates: int = Field(ge=0, description="rows that are alike to another set, or to a kept row before")
    num_clusters: int = Field(ge=0)
    num_without_text: int = Field(0, ge=0, description="rows without a word: compared with nothing")
    num_unfinished: int = Field(
        0, ge=0, description="rows with more candidates than are compared: they may have more near-duplicates"
    )
    counts: tuple[DuplicateCount, ...] = Field(())
