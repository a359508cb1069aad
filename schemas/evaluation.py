"""What is measured, and what a score says about itself."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.common import MAX_NAME, ArtifactPath, StrictModel, machinery, science
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.reward_benchmarks import RewardBenchmark, check_labels
from smoltulu.schemas.suites import Suite, expand

#: Metrics of lm-eval that are better when they are lower, where a score does not say it of itself.
LOWER_IS_BETTER = ("bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity")
ScoreKind = Literal["language_model", "reward_model", "implicit_reward"]


class EvaluationTask(StrictModel):
    """One lm-eval task: a stock name, or a definition shipped in recipes/lm_eval/."""

    name: str = science(max_length=MAX_NAME)
    metric: str = science(
        max_length=MAX_NAME, description="headline metric as lm-eval spells it, e.g. exact_match,strict-match"
    )
    num_fewshot: int | None = science(None, ge=0, description="None: as the task says")
    limit: int | None = science(None, ge=1, description="first documents only; the score is then not comparable")
    files: dict[str, DataSource] = science(
        {}, description="split -> local or generated file that replaces the task's Hub dataset"
    )


class SampledAccuracy(StrictModel):
    """Share of sampled completions that their verifier accepts, on held-out rlvr rows (`data.verified_eval`)."""

    num_prompts: int = science(1000, ge=1)
    num_samples_per_prompt: int = science(4, ge=1)
    temperature: float = science(1.0, gt=0)
    max_new_tokens: int = science(ge=1)
    seed: int = science(0, ge=0)


class EvaluationSettings(StrictModel):
    """Run for base, SFT, DPO and RLVR models; pair accuracy for the reward model and DPO's implicit reward."""

    tasks: tuple[EvaluationTask, ...] = science(
        (), description="lm-eval tasks for every language model; {suite: paper} stands for a list of them"
    )
    sampled: SampledAccuracy | None = science(None)
    reward_benchmarks: tuple[RewardBenchmark, ...] | None = science(
        None, absent=None, description="benchmarks for the reward model, beside data.preference_eval"
    )
    max_length: int = science(2048, ge=16, description="tokens, prompt and answer")
    apply_chat_template: bool = science(True)
    precision: Literal["float32", "bfloat16"] = science("bfloat16")
    seed: int = science(1234, ge=0)

    @field_validator("tasks", mode="before", json_schema_input_type=tuple[EvaluationTask | Suite, ...])
    @classmethod
    def _suites(cls, entries: Any) -> Any:
        return expand(entries)

    @model_validator(mode="after")
    def _benchmarks_of_different_names(self) -> Self:
        check_labels(self.reward_benchmarks or ())
        return self


class EvaluationStageConfig(StrictModel):
    """Config of one evaluation: the settings that apply to this kind of subject."""

    subject: str = science(description="stage whose model is measured")
    kind: ScoreKind = science()
    settings: EvaluationSettings = science()


class EvaluationCellConfig(StrictModel):
    """One measurement of one model, by what decides its result. Of `task`, `sampled` and `benchmark` one is given.

    None of them: the pairs of `data.preference_eval`.
    """

    kind: ScoreKind = science()
    task: EvaluationTask | None = science(None, absent=None)
    sampled: SampledAccuracy | None = science(None, absent=None)
    benchmark: RewardBenchmark | None = science(None, absent=None)
    max_length: int = science()
    apply_chat_template: bool | None = science(None, absent=None, description="of a task")
    seed: int | None = science(None, absent=None, description="of a task")
    backend: Literal["transformers"] = science("transformers")
    dtype: Literal["float32", "bfloat16"] = science(description="of the weights as they are measured")
    harness: str = science(description="lm-eval with its version, or version of our own measurement")
    precision: Literal["float32", "bfloat16"] = machinery("float32", description="as the recipe has it")

    @property
    def name(self) -> str:
        """What it measures, in a word."""
        if self.task is not None:
            return self.task.name
        if self.sampled is not None:
            return "verified_sampled"
        if self.benchmark is not None:
            return self.benchmark.label
        return "preference" if self.kind == "reward_model" else self.kind


class EvaluationInputs(StrictModel):
    """Resolved inputs of an evaluation."""

    model: str
    reference_model: str | None = Field(None, description="implicit_reward: the model DPO started from")
    preference_eval: str | None = Field(None)
    verified_eval: str | None = Field(None)
    world: str | None = Field(None)
    chat_template: str
    cells: dict[str, str] | None = Field(None, description="name -> folder of a finished cell, in their order")


class Measurement(StrictModel):
    """One number with its source (design, section 8.5)."""

    task: str
    metric: str
    value: float
    stderr: float | None = Field(None)
    num_samples: int = Field(ge=1)
    num_fewshot: int | None = Field(None)
    harness: str = Field(description="package and version")
    task_version: str
    template_digest: str
    limited: bool = Field(False, description="measured on a part of the task")


class Score(Measurement):
    """A score as its evaluation keeps it."""

    details: dict[str, Any] = Field({})


class EvaluationCellOutputs(StrictModel):
    """Scores of one measurement, the samples behind them, and lm-eval's own results."""

    scores: tuple[Score, ...]
    samples_file: ArtifactPath
    results_file: ArtifactPath


class EvaluationOutputs(StrictModel):
    """Scores, and the samples behind them (tasks/evaluation/samples.py)."""

    subject: str
    scores: tuple[Score, ...]
    samples_file: ArtifactPath | None = Field(None)
    results_file: ArtifactPath | None = Field(None)
