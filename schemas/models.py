"""A base model reference, and what a stage that makes a model takes and gives."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.schemas.common import MAX_NAME, MAX_PATH, ArtifactPath, StrictModel, machinery, science
from smoltulu.schemas.held_out import HeldOutOutputs
from smoltulu.schemas.held_out_loss import HeldOutLossOutputs


class ModelSource(StrictModel):
    """A base model: a Hub repository at a revision, a local folder, or made from scratch. Exactly one of the three."""

    repository: str | None = science(
        None, max_length=MAX_NAME, description="Hub model, e.g. HuggingFaceTB/SmolLM2-1.7B"
    )
    revision: str = science(
        "main", max_length=MAX_NAME, description="a branch or tag is resolved to its commit before keying"
    )
    path: str | None = machinery(
        None,
        max_length=MAX_PATH,
        description="local folder with config.json, *.safetensors, tokenizer; keyed by content",
    )
    scratch: BaseModelConfig | None = science(None, description="architecture and pre-training of a model made here")
    num_parameters: int | None = machinery(
        None, ge=1, description="for `plan`, until the model is there: disk, memory and FLOPs of the trainings"
    )
    pad_token: str | None = science(
        None,
        max_length=MAX_NAME,
        description="written into the tokenizer; a special token of the vocabulary that ends no answer. None given: "
        "the base's own, or `<pad>` is added where that is missing or ends an answer",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("repository", "path", "scratch") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a base model has exactly one of repository, path, scratch; got {given or 'none'}")
        return self


class BaseModelInputs(StrictModel):
    """Text for a model made from scratch: the world's folder (pretrain.jsonl) or the SFT rows file."""

    world: str | None = Field(None)
    dataset: str | None = Field(None)
    chat_template: str = Field("", description="text of the Jinja template, where a pad token is given")


class ModelOutputs(StrictModel):
    """A saved model folder: safetensors, config, generation config, tokenizer with its chat template.

    For the reward model it is a sequence classifier with one score.
    """

    folder: ArtifactPath = Field("model", description="relative to the artifact")
    num_parameters: int = Field(ge=1)
    num_steps: int = Field(0, ge=0, description="optimizer steps of this stage")
    num_tokens: int = Field(0, ge=0, description="tokens seen by this stage, as the trainer counts them")
    history_file: ArtifactPath | None = Field(None, description="logged metrics by step, one JSON object a line")
    samples_file: ArtifactPath | None = Field(
        None, description="some completions of RLVR with reward, verdict and reason, by step; one JSON object a line"
    )
    critic: ArtifactPath | None = Field(None, description="folder of PPO's critic: as the model, with one score")
    held_out: HeldOutOutputs | None = Field(None, description="RLVR: what its held-out prompts say, and what was kept")
    held_out_file: ArtifactPath | None = Field(
        None, description="every evaluation of the held-out prompts; one JSON object a line"
    )
    held_out_loss: HeldOutLossOutputs | None = Field(
        None, description="SFT, reward model and DPO: losses of held-out rows, and which weights were kept"
    )
