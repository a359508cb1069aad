"""Contract of the stage that builds a base model from nothing: tokenizer, architecture, a moment of pre-training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from smoltulu.schemas.common import StrictModel, machinery, science


class MupSettings(StrictModel):
    """Maximal update parametrisation: one learning rate for all widths (arXiv 2203.03466; MiniCPM 2404.06395, table 7).

    The model is a Granite, which has the multipliers. Sizes of a ladder share `base_width` and the width of a head.
    """

    base_width: int = science(ge=1, description="hidden_size at which rates and initial weights are as given")
    embedding_multiplier: float = science(12.0, gt=0, description="of the embeddings' output (MiniCPM)")
    residual_scale: float = science(
        1.4, gt=0, description="a branch is added times this / sqrt(num_hidden_layers) (MiniCPM)"
    )


class BaseModelConfig(StrictModel):
    """A small Llama, trained from random weights on plain texts: for recipes in which nothing is loaded."""

    seed: int = science(0, ge=0, description="initial weights and order of the texts")

    vocab_size: int = science(
        768, ge=300, le=65_536, description="of the byte-level BPE tokenizer, its two special tokens included"
    )
    hidden_size: int = science(128, ge=8)
    intermediate_size: int = science(384, ge=8)
    num_hidden_layers: int = science(4, ge=1)
    num_attention_heads: int = science(4, ge=1)
    max_position_embeddings: int = science(512, ge=16, description="longest sequence, tokens")
    tie_word_embeddings: bool = science(True)
    initializer_range: float = science(
        0.06, gt=0.0, le=1.0, description="standard deviation of the initial weights; 0.02 is too small at this width"
    )
    rope_theta: float = science(
        500.0, gt=1.0, description="base of the rotary positions: low, as the sequences are short"
    )

    mup: MupSettings | None = science(
        None, absent=None, description="initializer_range and learning_rate are then those of base_width; set 0.1"
    )

    learning_rate: float = science(3e-3, gt=0.0, le=1.0, description="peak; warm-up 5 % of the steps, then linear to 0")
    num_steps: int = science(200, ge=0, description="optimizer steps of pre-training; 0 leaves random weights")
    effective_batch_size: int = science(16, ge=1, description="sequences per optimizer step")
    sequence_length: int = science(128, ge=8, description="tokens per packed pre-training sequence")
    max_texts: int = science(
        20_000, ge=1, description="at most so many texts are read; the tokenizer and the training see no others"
    )
    max_text_characters: int = science(2_000, ge=16, description="longer texts are cut here")
    texts: Literal["given", "copying", "both"] = science(
        "given",
        absent="given",
        description="copying: the tokenizer learns from the texts given, the model from lookups and repeated segments, "
        "and its first weights copy: a selector model that can copy (docs/selection.md); both: the model learns from "
        "both, and so also knows what the texts given are about",
    )

    num_threads: int | None = machinery(None, ge=1, description="torch threads; None leaves torch's default")

    @model_validator(mode="after")
    def _can_copy(self) -> Self:
        """A model that is to copy has room for the circuit that it starts with (tasks/base_model/copying.py)."""
        if self.texts == "given":
            return self
        head_dim = self.hidden_size // self.num_attention_heads
        allowed = {
            "num_hidden_layers": (self.num_hidden_layers, "2 or more", self.num_hidden_layers >= 2),
            "tie_word_embeddings": (self.tie_word_embeddings, "false", not self.tie_word_embeddings),
            "rope_theta": (self.rope_theta, "1e8 or more", self.rope_theta >= 1e8),
            "hidden_size / num_attention_heads": (head_dim, "12 or more", head_dim >= 12),
            "num_attention_heads": (self.num_attention_heads, "6 or more", self.num_attention_heads >= 6),
            "mup": (self.mup and "set", "none", self.mup is None),
        }
        wrong = [f"{name} {given} (allowed: {said})" for name, (given, said, fits) in allowed.items() if not fits]
        if wrong:
            raise ValueError(f"texts {self.texts}: a model that is to copy needs other settings: {', '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "choose sizes that divide"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads is {self.hidden_size // self.num_attention_heads}; rotary "
                "positions need an even number"
            )
        if self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} is above max_position_embeddings "
                f"{self.max_position_embeddings}: shorten the one or raise the other"
            )
        return self
