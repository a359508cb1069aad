"""Small models with the tokenizers of real families: a bos or an eos that is added, an end of turn besides eos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.tiny_model import EOS, build_tiny_model, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """Special tokens, and what the post-processor puts before and behind a text. `turns`: tokens of a chat template."""

    bos: str | None
    eos: str
    turns: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    are_turns_special: bool = True


#: Named after the real ones whose ways they have.
FAMILIES = {
    "tulu": Family(EOS, EOS),
    "llama3": Family(
        "<|begin_of_text|>", "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        before=("<|begin_of_text|>",),
    ),
    "smollm2": Family("<|im_start|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "qwen": Family(None, EOS, ("<|im_start|>", "<|im_end|>")),
    "gemma": Family("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), before=("<bos>",)),
    "adds eos": Family(EOS, EOS, ("<|im_start|>", "<|im_end|>"), behind=(EOS,)),
    "adds both": Family("<s>", "</s>", before=("<s>",), behind=("</s>",)),
    "turns are ordinary tokens": Family(None, EOS, ("<|im_start|>", "<|im_end|>"), are_turns_special=False),
}  # fmt: skip


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Without a chat template."""
    from tokenizers import AddedToken
    from tokenizers.processors import Sequence, TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_tokens([AddedToken(text, special=family.are_turns_special) for text in family.turns])
    tokenizer.add_special_tokens({"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {}))
    if family.bos is None:
        tokenizer.bos_token = None
    added = [(text, tokenizer.convert_tokens_to_ids(text)) for text in {*family.before, *family.behind}]
    template = TemplateProcessing(single=[*family.before, "$A", *family.behind], special_tokens=added)
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = Sequence([before, template]) if before is not None else template
    return tokenizer


def build_family(folder: Path, family: Family) -> Path:
    """Write a model of a family; its generation config names eos alone, as that of a base model."""
    from transformers import AutoModelForCausalLM

    build_tiny_model(folder)
    tokenizer = family_tokenizer(family)
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(config, name, value)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder
