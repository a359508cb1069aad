"""The tiny world's contract: how much of what is generated, how hard it is, and which files come out."""

from __future__ import annotations

from pydantic import Field

from smoltulu.schemas.common import ArtifactPath, StrictModel, science


class MixedSettings(StrictModel):
    """A file of conversations a skill, of which a part is useless (tasks/world/mixed.py), and rows for RDS+."""

    num_rows: int = science(400, ge=2, le=100_000, description="conversations of each skill, useless ones included")
    useless_share: float = science(
        0.5, ge=0, le=0.9, description="share of the rows that are copies of others with answers to other questions"
    )
    max_turns: int = science(3, ge=1, le=8, description="a row has 1 to so many questions: rows differ in length")
    num_targets: int = science(8, ge=1, le=1000, description="useful rows of each skill in targets.jsonl")


class SkillSettings(StrictModel):
    """Eight skills with short answers (tasks/world/skills.py), beside what the world has without them."""

    num_sft: int = science(16_000, ge=1, description="conversations of skills.jsonl, all skills alike")
    num_eval: int = science(100, ge=1, le=150, description="held-out questions of each skill")
    pretrain_share: float = science(0.8, gt=0, le=1, description="share of the plain texts that are about skills")
    mixed: MixedSettings | None = science(None, absent=None)


class WorldConfig(StrictModel):
    """A synthetic world without downloads. Everything in it follows from these fields; there is no other input."""

    seed: int = science(0, ge=0, description="the same seed gives the same bytes on every machine")

    num_pretrain: int = science(6_000, ge=1, description="plain texts for the base model")
    num_sft: int = science(20_000, ge=1, description="conversations, planted leaks included")
    num_preference: int = science(4_000, ge=1, description="chosen/rejected pairs, planted leaks included")
    num_rlvr: int = science(6_000, ge=1, description="prompts with a verifiable answer, planted leaks included")

    num_eval_arithmetic: int = science(500, ge=1, description="held-out word problems (question and worked answer)")
    num_eval_instructions: int = science(200, ge=1, description="held-out instructions with a checkable constraint")
    num_eval_verified: int = science(1_000, ge=1, description="held-out prompts of the same mix as RLVR's")
    num_preference_eval: int = science(600, ge=1, description="held-out chosen/rejected pairs")

    max_number: int = science(
        20, ge=12, le=999, description="largest number that is added or subtracted: larger ones are harder"
    )
    arithmetic_share: float = science(
        0.75, gt=0.0, lt=1.0, description="share of word problems; the rest are instructions with a constraint"
    )
    terse_share: float = science(
        0.3,
        ge=0.0,
        lt=1.0,
        description="share of word problems answered without the working, as in data of mixed quality: "
        "such answers are right but hard to learn, and RLVR has to find out that working pays",
    )

    planted_sft: int = science(40, ge=0, description="held-out questions copied into SFT user turns")
    planted_preference: int = science(20, ge=0, description="held-out questions copied into preference prompts")
    planted_rlvr: int = science(20, ge=0, description="held-out questions copied into RLVR prompts")

    skills: SkillSettings | None = science(None, absent=None)


class WorldOutputs(StrictModel):
    """What `generate_world` wrote: file names relative to its folder, and the number of rows of each."""

    pretrain: ArtifactPath = Field("pretrain.jsonl", description="rows {text}")
    sft: ArtifactPath = Field("sft.jsonl", description="rows {messages}")
    preference: ArtifactPath = Field("preference.jsonl", description="rows {prompt, chosen, rejected}")
    rlvr: ArtifactPath = Field("rlvr.jsonl", description="rows {messages, verifier, ground_truth}")
    eval_arithmetic: ArtifactPath = Field("eval_arithmetic.jsonl", description="rows {question, answer}")
    eval_instructions: ArtifactPath = Field(
        "eval_instructions.jsonl", description="rows {prompt, verifier, ground_truth}"
    )
    eval_verified: ArtifactPath = Field("eval_verified.jsonl", description="rows as rlvr")
    preference_eval: ArtifactPath = Field("preference_eval.jsonl", description="rows as preference")
    planted_leaks: ArtifactPath = Field(
        "planted_leaks.json", description="the truth about leaks, for tests and benchmarks only"
    )
    skills: ArtifactPath | None = Field(None, description="rows {messages}; with `skills`")
    eval_skills: ArtifactPath | None = Field(None, description="rows {subset, prompt, answer}; with `skills`")
    mixed: dict[str, ArtifactPath] = Field({}, description="skill -> rows {messages}; with `skills.mixed`")
    targets: ArtifactPath | None = Field(None, description="rows {messages}; with `skills.mixed`")
    useless_rows: ArtifactPath | None = Field(
        None, description="skill -> numbers of its useless rows: the truth, for tests and benchmarks only"
    )
    num_rows: dict[str, int] = Field(description="rows per jsonl file, by field name")
    num_planted: dict[str, int] = Field(description="planted leaks per training set")
