"""Preflight: rows tokenised once, checked before any training, and what was found."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from smoltulu.schemas.common import ArtifactPath, StrictModel, machinery
from smoltulu.schemas.compute import TokensPerDevice
from smoltulu.schemas.training import RowRules


class PreflightSettings(StrictModel):
    """What a set of rows must show before a training begins. Thresholds change no row: they are machinery."""

    max_overlong_share: float = machinery(
        0.1, ge=0, le=1, description="rows longer than max_length, whether they are cut or dropped; ours"
    )
    max_unstable_share: float = machinery(
        0.01, ge=0, le=1, description="rows whose prompt is tokenised otherwise in training than in generation; ours"
    )
    max_faulty_share: float = machinery(
        0.01,
        ge=0,
        le=1,
        description="rows of any one fault: not rendered by the template, nothing to train on, no eos at the end, "
        "chosen and rejected the same; ours",
    )
    dry_run: bool = machinery(True, description="train one step on the longest rows, for its memory and its time")


class PreflightConfig(RowRules):
    """Config of the `preflight` stage. Settings of a training that change no row are machinery: a sweep shares it."""

    subject: str = machinery("", description="training stage that the rows are for; none: no dry run, no planned steps")
    training_settings: dict[str, Any] = machinery({}, description="those of `subject`, all of them")
    settings: PreflightSettings = machinery(PreflightSettings())


class PreflightInputs(StrictModel):
    """Resolved inputs of the `preflight` stage."""

    model: str = Field(description="folder of the base model: its tokenizer, and its size for the dry run")
    dataset: str = Field(description="rows file")
    chat_template: str = Field(description="text of the Jinja template")


class LengthReport(StrictModel):
    """Lengths in tokens, before anything is cut or dropped."""

    mean: float
    percentiles: dict[str, int] = Field(description="5, 25, 50, 75, 90, 95, 99, 100 -> tokens")
    bin_width: int = Field(1, ge=1, description="tokens")
    histogram: tuple[int, ...] = Field(
        (), description="rows of 0 to bin_width - 1 tokens, of bin_width to 2 bin_width - 1 …"
    )


class TokenizerFacts(StrictModel):
    """What of the tokenizer and the base model decides about the rows."""

    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None = None
    adds_bos: bool = Field(False, description="called on rendered text, it puts a bos before the one of the template")
    adds_before: str = Field("", description="what it puts before a text by itself; no stage lets it do so")
    adds_after: str = Field("", description="what it puts behind a text by itself; no stage lets it do so")
    begins_with: str = Field("", description="first token of a conversation")
    stop_token_ids: tuple[int, ...] = Field((), description="eos, and the template's end of turn where it is another")
    tokenisation: str | None = Field(None, description="digest of what becomes of a few fixed conversations")
    num_embeddings: int | None = Field(None, description="rows of the base model's embeddings (config.json)")
    max_position_embeddings: int | None = None


class DryRun(StrictModel):
    """One training step on the longest rows. Belongs to the machine and the settings that it names.

    `per_device_train_batch_size` is the largest that fits, `asked_batch_size` what compute says. Where compute gives
    micro-batches a number of tokens, `tokens_per_device` is the largest that fits, and the batch as many of the longest
    rows as go into it.
    """

    subject: str = Field("", description="training stage whose step it was")
    device: str
    precision: str
    per_device_train_batch_size: int
    activation_checkpointing: bool
    packing: bool = True
    lora_r: int | None = Field(None, description="rank of the adapters that alone were trained")
    asked_batch_size: int | None = None
    asked_tokens: TokensPerDevice = Field("none", description="compute.tokens_per_device")
    tokens_per_device: int | None = Field(
        None, description="tokens that a micro-batch may hold; none: a number of rows"
    )
    num_tokens: int = Field(description="tokens of the batch, padding not counted")
    seconds: float
    peak_memory_bytes: int = Field(description="highest during the step; model, gradients, optimizer state included")
    generation_bytes: int = Field(
        0, description="RLVR, computed: model, optimizer state, reference, and the keys and values of all rollouts"
    )


class PreflightOutputs(StrictModel):
    """Rows as they will be trained on, and the report (`logs/report.html`, `logs/report.json`)."""

    file: ArtifactPath = Field("rows.parquet", description="tokenised rows; for prompts the rows themselves")
    report_file: ArtifactPath = Field("logs/report.html", description="among the logs: its figures are of a machine")
    num_rows: int = Field(ge=0, description="rows that are left: one line each in `file`")
    num_source_rows: int = Field(ge=0)
    num_dropped: int = Field(0, ge=0, description="longer than max_length")
    num_empty: int = Field(0, ge=0, description="left out: nothing to train on, once cut")
    num_truncated: int = Field(0, ge=0)
    num_overlong: int = Field(0, ge=0, description="longer than max_length: dropped, truncated, or empty once cut")
    num_malformed: int = Field(0, ge=0, description="left out: the template does not render them")
    num_eos_lost: int = Field(0, ge=0, description="cut rows whose closing eos is not trained on")
    num_without_eos: int = Field(0, ge=0, description="whole rows whose last trained token is not eos")
    num_unstable: int = Field(0, ge=0, description="prompt is not how the tokens of the row begin")
    num_special: int = Field(0, ge=0, description="rows whose own text spells a special token, and becomes that token")
    num_special_trained: int = Field(0, ge=0, description="of these, rows where it stands in an answer")
    num_headers: int = Field(0, ge=0, description="rows whose own text holds a header of the chat template")
    num_two_bos: int = Field(0, ge=0, description="rows that begin with two bos tokens")
    num_beyond_embeddings: int = Field(0, ge=0, description="rows with a token that the base model has no embedding of")
    num_duplicates: int = Field(0, ge=0, description="rows with the same tokens as one before them")
    num_equal: int = Field(0, ge=0, description="pairs whose chosen and rejected side are the same tokens, once cut")
    num_with_tools: int = Field(0, ge=0, description="rows that offer functions or call one")
    num_with_reasoning: int = Field(0, ge=0, description="rows with reasoning_content")
    num_untrained_turns: int = Field(0, ge=0, description="answers that are context only (train false)")
    refusals: dict[str, int] = Field({}, description="why the template does not render a row -> rows; most first")
    longest: int = Field(0, ge=0, description="tokens of the longest row that is left; of a pair's longer side")
    num_tokens: int = Field(0, ge=0, description="of one epoch, as the trainer counts them; both answers of a pair")
    num_trained_tokens: int = Field(0, ge=0, description="tokens with a loss")
    lengths: LengthReport
    kinds: dict[str, int] = Field({}, description="prompts of RLVR: rows of each verifier and each kind of constraint")
    tokens_by_source: dict[str, int] = Field(
        {}, description="number of a source -> tokens of its rows, as they are counted in num_tokens; none: one source"
    )
    tokenizer: TokenizerFacts | None = None
    disk_bytes: int | None = Field(
        None, description="most that the training has on disk while it runs (tasks/trainer/disk.py)"
    )
    first_rows: dict[str, tuple[int, ...]] = Field({}, description="finding -> first rows that show it, counted from 0")
    dry_run: DryRun | None = None
