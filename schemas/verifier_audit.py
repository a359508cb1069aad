"""The audit of the verifiers before RLVR, and the pass rates of the model that RLVR starts from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import MAX_NAME, ArtifactPath, StrictModel, machinery, science

#: Prompts by the share of samples that were right: none, some, all; ungraded where none could be graded.
Pool = Literal["never", "sometimes", "always", "ungraded"]
Finding = Literal[
    "gold_wrong",
    "could_not_grade",
    "shuffled_right",
    "shuffled_equal",
    "wrong_not_graded",
    "violation_right",
    "hack_right",
    "hack_allowed",
    "versions_differ",
]


class VerifierAuditSettings(StrictModel):
    """How much is tried, and what stops the run. Thresholds change no result: they are machinery. Values are ours."""

    num_shuffled: int = science(
        2000, ge=0, le=1_000_000, description="gold answers of other rows that are tried, per verifier and source"
    )
    num_hacked: int = science(
        200, ge=1, le=100_000, description="rows that every hack is tried on, per verifier and source"
    )
    seed: int = science(0, ge=0, description="of the rows that are drawn")
    min_gold_share: float = machinery(0.99, ge=0, le=1, description="share of gold answers that must score right")
    max_ungradable_share: float = machinery(0.01, ge=0, le=1, description="share of truths that cannot be graded")
    max_hack_share: float = machinery(
        0.0, ge=0, le=1, description="share of the rows on which a hack may score right without naming the gold answer"
    )
    chance_level: float = machinery(
        1e-6,
        ge=1e-12,
        lt=1,
        description="probability below which more shuffled gold answers are right than two gold answers coincide",
    )
    known_faults: tuple[str, ...] = machinery(
        (), description="verifiers whose faults are wanted, e.g. ifeval@paper: they are listed and stop nothing"
    )


class VerifierAuditConfig(StrictModel):
    """Config of the `verifier_audit` stage."""

    settings: VerifierAuditSettings = science(VerifierAuditSettings())
    source_labels: tuple[str, ...] = machinery((), description="names of the sources of the rows, in their order")


class VerifierAuditInputs(StrictModel):
    """Resolved inputs of the `verifier_audit` stage."""

    dataset: str = Field(description="rows file: the RLVR rows as they are trained on")


class Example(StrictModel):
    """One probe, for a reader: texts are cut."""

    finding: Finding
    probe: str = Field(max_length=MAX_NAME, description="what was tried, in words")
    row: str = Field(description="id of the row whose truth it was graded against")
    completion: str
    ground_truth: str
    outcome: str
    reason: str


class FunctionCoverage(StrictModel):
    """A kind of constraint: of how many of its rows a text that keeps it could be made, and one that breaks it."""

    num_rows: int = Field(ge=0)
    num_kept_made: int = Field(0, ge=0)
    num_broken_made: int = Field(0, ge=0)


class HackCount(StrictModel):
    """A hack on its rows. `num_allowed`: right because it names the gold answer, or because the rule asks no more."""

    num_rows: int = Field(0, ge=0)
    num_right: int = Field(0, ge=0)
    num_allowed: int = Field(0, ge=0)


class GroupAudit(StrictModel):
    """The rows of one source that have one verifier."""

    verifier: str
    source: str = Field(description="first part of the ids of its rows")
    label: str = Field("", description="name of that source")
    num_rows: int = Field(ge=0)
    num_ungradable: int = Field(0, ge=0, description="rows whose truth cannot be graded")
    num_without_gold: int = Field(0, ge=0, description="rows of which no right answer could be written")
    num_gold: int = Field(0, ge=0, description="gold answers that were graded")
    num_gold_right: int = Field(0, ge=0)
    num_shuffled: int = Field(0, ge=0)
    num_shuffled_right: int = Field(0, ge=0)
    num_shuffled_equal: int = Field(
        0, ge=0, description="of these, spelled differently from the truth, which is right for them too"
    )
    num_wrong: int = Field(0, ge=0, description="texts that must score wrong, for truths that can be graded")
    num_wrong_ungraded: int = Field(0, ge=0, description="of these, scored could_not_grade")
    chance_share: float | None = Field(
        None, description="share of pairs of rows whose gold answers coincide, counted by itself; none: not comparable"
    )
    best_constant: str = Field("", description="the most frequent gold answer")
    best_constant_share: float = 0.0
    num_violations: int = Field(0, ge=0, description="texts that break their constraint")
    num_violations_right: int = Field(0, ge=0)
    hacks: dict[str, HackCount] = {}
    functions: dict[str, FunctionCoverage] = {}
    other_version: str = Field("", description="version of the verifier that every probe was graded by as well")
    num_versions_differ: int = Field(0, ge=0)
    examples: tuple[Example, ...] = ()

    @property
    def title(self) -> str:
        """The verifier and its source, in words."""
        return f"verifier {self.verifier}, source {self.source}" + (f" ({self.label})" if self.label else "")


class VerifierAuditOutputs(StrictModel):
    """What the verifiers said of answers whose worth is known. `file` holds the same as JSON, for RLVR."""

    file: ArtifactPath = Field("audit.json")
    findings_file: ArtifactPath = Field("findings.jsonl", description="every probe that is worth a look, whole")
    report_file: ArtifactPath = Field("logs/report.html")
    rows_digest: str = Field(description="of the rows, whatever their order (tasks/data/rows.py)")
    verifiers_version: str
    num_rows: int = Field(ge=0)
    num_probes: int = Field(ge=0)
    groups: tuple[GroupAudit, ...]


class PassRatesSettings(StrictModel):
    """How often the model that RLVR starts from is right, prompt by prompt. All values are ours."""

    num_samples: int = science(8, ge=1, le=10_000, description="per prompt")
    num_prompts: int | None = science(None, ge=1, description="so many, drawn at random; none: all")
    seed: int = science(0, ge=0, description="of the prompts that are drawn, and of the samples")


class PassRatesConfig(StrictModel):
    """Config of the `pass_rates` stage: temperature and length are those of the run's rollouts."""

    settings: PassRatesSettings = science(PassRatesSettings())
    temperature: float = science(gt=0)
    max_completion_length: int = science(ge=1)
    must_stop: bool = science(description="whether an answer that does not end counts as wrong, as in the run")
    precision: Literal["float32", "bfloat16"] = science("bfloat16")
    source_labels: tuple[str, ...] = machinery((), description="names of the sources of the rows, in their order")


class PassRatesInputs(StrictModel):
    """Resolved inputs of the `pass_rates` stage."""

    model: str = Field(description="folder of the model that RLVR starts from")
    dataset: str = Field(description="rows file: the RLVR rows as they are trained on")
    chat_template: str = Field(description="text of the Jinja template")


class PoolCounts(StrictModel):
    """The measured prompts of one source that have one verifier."""

    verifier: str
    source: str
    label: str = ""
    num_prompts: int = Field(ge=0)
    pools: dict[Pool, int]
    mean_pass_rate: float | None = Field(None, description="mean over prompts that could be graded")

    @model_validator(mode="after")
    def _all_prompts_have_a_pool(self) -> Self:
        if sum(self.pools.values()) != self.num_prompts:
            raise ValueError(f"pools {self.pools} do not add up to num_prompts {self.num_prompts}")
        return self


class PassRatesOutputs(StrictModel):
    """One line a measured prompt, in the order of the rows."""

    file: ArtifactPath = Field(
        "pass_rates.parquet", description="id, num_samples, num_right, num_could_not_grade, num_stopped, pool"
    )
    pass_rates_of: str = Field(description="digest of the rows, whatever their order (tasks/data/rows.py)")
    num_measured: int = Field(ge=0)
    num_samples: int = Field(ge=1, description="per prompt")
    counts: tuple[PoolCounts, ...]
