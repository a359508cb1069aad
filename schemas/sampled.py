"""Rows that a model writes itself: best-of-n as SFT rows, best against worst as preference pairs.

Three stages for each entry of the recipe's block `sampled`, cached apart: samples (dear), their scores, the rows that
are chosen by them (cheap).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import MAX_NAME, MAX_PATH, ArtifactPath, StrictModel, machinery, science
from smoltulu.schemas.models import ModelSource

#: Models of a recipe that write, by their blocks, in the order of a run.
Writer = Literal["base_model", "sft", "dpo", "rlvr"]
Ties = Literal["draw", "reward_model"]
Score = Literal["verifier", "reward_model"]
Make = Literal["best", "pairs"]
Outcome = Literal["right", "wrong", "could_not_grade"]
#: What became of a prompt. Only of `used` ones there is a row.
Fate = Literal["used", "nothing_to_choose", "nothing_to_reject", "too_close", "ungraded"]


class SelectionRules(StrictModel):
    """Which of the samples of a prompt become a row. Nothing is sampled or scored again where these change.

    All values are ours.
    """

    score: Score = science(description="what is better: right by its verifier, or a higher score of the reward model")
    make: Make = science(description="best: SFT rows; pairs: best against worst, preference rows")
    ties: Ties = science(
        "draw",
        description="verifier only: which of several right (or wrong) answers; reward_model: its best (or worst)",
    )
    reject_unended: bool = science(
        True, description="pairs: whether an answer without an end may be the rejected one; chosen is none of them"
    )
    min_margin: float = science(
        0.0, ge=0, description="pairs by the reward model: least difference of the scores of chosen and rejected"
    )
    seed: int = science(0, ge=0, description="of the prompts and samples, and of what is drawn among equals")
    max_length_ratio: float = machinery(
        1.25,
        gt=1,
        description="mean length of chosen over rejected answers, or the other way round, from which a warning says "
        "that length is learned",
    )

    @property
    def reads_rewards(self) -> bool:
        """Whether the reward model's scores are needed."""
        return "reward_model" in (self.score, self.ties)

    @model_validator(mode="after")
    def _options_have_a_meaning(self) -> Self:
        if self.score == "reward_model" and self.ties != "draw":
            raise ValueError(
                "ties reward_model is for score verifier: by the reward model there are hardly any ties; leave it out"
            )
        if self.min_margin and (self.score, self.make) != ("reward_model", "pairs"):
            raise ValueError(
                f"min_margin {self.min_margin:g} is a difference of the reward model's scores in a pair, and has no "
                f"meaning for score {self.score} and make {self.make}; leave it out"
            )
        if self.make == "best" and not self.reject_unended:
            raise ValueError("reject_unended is about pairs, and make is best, which rejects nothing; leave it out")
        return self


class SampledSettings(SelectionRules):
    """Samples of one model, and the rows that are made of them. A data source names them: `{sampled: NAME}`."""

    model: Writer | None = science(None, description="the model of this recipe that writes; or give a checkpoint")
    checkpoint: ModelSource | None = science(
        None, description="a model from outside, as base_model: repository and revision, or path"
    )
    chat_template: str | None = science(
        None,
        max_length=MAX_PATH,
        description="of a checkpoint that was trained with another one, named as the recipe's is; none: the recipe's",
    )
    prompts: Literal["sft", "preference", "rlvr"] = science(
        description="rows of which data set, without those that the contamination check removed"
    )
    num_prompts: int | None = science(None, ge=1, description="so many, drawn at random; none: all")
    num_samples: int = science(8, ge=1, le=10_000, description="per prompt")
    temperature: float = science(1.0, ge=0, le=10, description="0: greedy")
    top_p: float = science(1.0, gt=0, le=1, description="nucleus (arXiv 1904.09751): the likeliest tokens of this mass")
    max_new_tokens: int = science(512, ge=1, description="tokens of an answer; one that has not ended then is unended")
    max_prompt_length: int | None = science(
        None, ge=1, description="tokens; longer prompts are left out. none: what the model has room for"
    )
    precision: Literal["float32", "bfloat16"] = science("bfloat16", description="of the model, and of the reward model")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.checkpoint is None):
            given = "both" if self.model else "neither"
            raise ValueError(f"exactly one of model and checkpoint says what writes; got {given}")
        if self.checkpoint is not None and self.checkpoint.scratch is not None:
            raise ValueError("checkpoint: is a model that is there already; give repository or path, not scratch")
        if self.checkpoint is None and self.chat_template is not None:
            raise ValueError(
                f"chat_template {self.chat_template!r} is for a checkpoint; the recipe's models are trained with the "
                "recipe's own, and are asked with it"
            )
        return self

    @model_validator(mode="after")
    def _samples_can_differ(self) -> Self:
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature 0 is greedy, so all {self.num_samples} samples of a prompt would be the same; set "
                "num_samples to 1, or a temperature above 0"
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(f"top_p {self.top_p:g} has no meaning at temperature 0, which is greedy; leave it out")
        if self.make == "pairs" and self.num_samples < 2:
            raise ValueError(
                f"make pairs compares samples of a prompt, and num_samples is {self.num_samples}; set 2 or more (8 is "
                "usual), or make best"
            )
        return self

    @model_validator(mode="after")
    def _verifiers_have_truths(self) -> Self:
        if self.score == "verifier" and self.prompts != "rlvr":
            raise ValueError(
                f"score verifier needs prompts with verifiers and truths, and rows of data.{self.prompts} have none; "
                "set prompts to rlvr, or score to reward_model"
            )
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Blocks of the models of the recipe that it needs."""
        return (*([self.model] if self.model else ["base_model"]), *(["reward_model"] if self.reads_rewards else []))

    @property
    def rules(self) -> SelectionRules:
        """Those of the selection alone."""
        return SelectionRules(**{name: getattr(self, name) for name in SelectionRules.model_fields})


class SamplesConfig(StrictModel):
    """Config of the `samples` stage."""

    writer: str = machinery("", max_length=MAX_NAME, description="what the model is called in reports")
    num_prompts: int | None = science(None, ge=1)
    num_samples: int = science(ge=1)
    temperature: float = science(ge=0)
    top_p: float = science(gt=0, le=1)
    max_new_tokens: int = science(ge=1)
    max_prompt_length: int | None = science(None, ge=1)
    seed: int = science(ge=0)
    precision: Literal["float32", "bfloat16"] = science()


class SamplesInputs(StrictModel):
    """Resolved inputs of the `samples` stage."""

    model: str = Field(description="folder of the model that writes")
    dataset: str = Field(description="rows file: its prompts are asked")
    chat_template: str = Field(description="text of the Jinja template")


class SamplesOutputs(StrictModel):
    """One line a prompt, in the order of the rows, with all its samples."""

    file: ArtifactPath = Field("samples.parquet", description="id, prompt, verifier, ground_truth, samples")
    writer: str = Field(description="what the model is called")
    num_asked: int = Field(ge=0, description="prompts that were answered")
    num_samples: int = Field(ge=1, description="of each")
    num_repeated: int = Field(0, ge=0, description="rows left out: the prompt is that of a row before")
    num_too_long: int = Field(
        0, ge=0, description="prompts left out: no room for an answer, or beyond max_prompt_length"
    )
    num_not_rendered: int = Field(0, ge=0, description="prompts left out: the template refuses them")
    num_ended: int = Field(ge=0, description="samples that the model ended by itself")
    num_written_tokens: int = Field(ge=0)


class SampleScoresConfig(StrictModel):
    """Config of the `sample_scores` stage."""

    verifier: bool = science(description="whether the verifiers of the prompts grade")
    reward_precision: Literal["float32", "bfloat16"] | None = science(
        None, description="of the reward model; none: it does not score"
    )


class SampleScoresInputs(StrictModel):
    """Resolved inputs of the `sample_scores` stage."""

    samples: str = Field(description="file of the samples")
    reward_model: str | None = Field(None, description="folder of the reward model, where it scores")
    chat_template: str = Field("", description="text of the Jinja template, where the reward model scores")


class SampleScoresOutputs(StrictModel):
    """One line a prompt, in the order of the samples: of every sample its outcome, reason and reward."""

    file: ArtifactPath = Field("scores.parquet", description="id, outcomes, reasons, rewards")
    num_scored: int = Field(ge=0, description="samples")
    outcomes: dict[Outcome, int] = Field({}, description="verdicts of the verifiers")
    num_without_reward: int = Field(0, ge=0, description="samples too long for the reward model")


class SampledRowsConfig(StrictModel):
    """Config of the `sampled_rows` stage."""

    rules: SelectionRules = science()
    writer: str = machinery("", max_length=MAX_NAME, description="what the model is called in reports")


class SampledRowsInputs(StrictModel):
    """Resolved inputs of the `sampled_rows` stage."""

    samples: str = Field(description="file of the samples")
    scores: str = Field(description="file of their scores")


class AnswerLengths(StrictModel):
    """Mean lengths of answers in tokens, their end included; none where there are no such answers."""

    all_samples: float | None = None
    chosen: float | None = None
    rejected: float | None = None
    chosen_longer_share: float | None = Field(None, description="pairs whose chosen answer is the longer one")


class ScoreBar(StrictModel):
    """A bar of the histogram: how many prompts, or of how many samples, chosen and rejected answers."""

    label: str
    count: int = Field(ge=0)
    num_chosen: int = Field(0, ge=0)
    num_rejected: int = Field(0, ge=0)


class SampledExample(StrictModel):
    """A row that was made, for a reader: texts are cut. A score is the outcome, or the reward as text."""

    id: str
    prompt: str
    chosen: str
    chosen_score: str
    rejected: str = ""
    rejected_score: str = ""


class SampledRowsOutputs(StrictModel):
    """Rows as a data source takes them, and from which samples they are."""

    file: ArtifactPath = Field(
        "rows.parquet", description="sft or preference rows; id: prompt/sample or prompt/sample-sample"
    )
    lineage_file: ArtifactPath = Field(
        "lineage.parquet", description="one line a row: prompt, samples, outcomes, rewards, tokens"
    )
    writer: str
    make: Make
    score: Score
    num_rows: int = Field(ge=0)
    fates: dict[Fate, int] = Field(description="what became of the prompts")
    num_repeated_samples: int = Field(0, ge=0, description="samples that say what another one of their prompt says")
    lengths: AnswerLengths
    histogram: tuple[ScoreBar, ...]
    examples: tuple[SampledExample, ...] = ()
    warnings: tuple[str, ...] = ()
