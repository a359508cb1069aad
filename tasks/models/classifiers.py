"""Models that give one score: reward models and critics. A causal language model whose output head is a score head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.folders import check_model_folder, fit_embeddings, load_tokenizer, stop_ids
from smoltulu.tasks.models.tokens import tokenisation
from smoltulu.tasks.models.weights import check_architecture, load_whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLASSIFIER = "ForSequenceClassification"
#: Labels of a classifier whose config names none; transformers.
_DEFAULT_NUM_LABELS = 2


def load_classifier(folder: Path) -> PreTrainedModel:
    """A classifier with one score, in float32, from a language model. Its head is new: the caller draws its weights."""
    import torch

    check_model_folder(folder)
    check_architecture(folder)  # of the language model: of a classifier its output head is left over
    return load_whole("AutoModelForSequenceClassification", folder, new_head=True, num_labels=1, dtype=torch.float32)


def load_reward_model(folder: Path) -> PreTrainedModel:
    """A sequence-classification model with one score, in float32. ValueError if the folder holds something else."""
    import torch

    check_one_score(folder)
    return load_whole("AutoModelForSequenceClassification", folder, dtype=torch.float32)


def load_to_score(folder: Path, tokenizer: PreTrainedTokenizerBase, bfloat16: bool) -> PreTrainedModel:
    """A reward model as a stage asks it: in bfloat16 the weights are cast, but not the head, which was in float32.

    Not the buffers: rotary frequencies in bfloat16 turn position 2,000 by another radian.
    """
    import torch

    model = load_reward_model(folder)
    fit_embeddings(model, tokenizer)
    stop_ids(model, tokenizer)
    if bfloat16:
        for name, parameter in model.named_parameters():
            if not name.startswith("score."):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def check_one_score(folder: Path) -> None:
    """ValueError where config.json does not describe a classifier with one score. Loads nothing."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(_CLASSIFIER) for name in architectures):
        raise ValueError(
            f"{folder.name} holds {', '.join(map(str, architectures)) or 'an unnamed architecture'}, not a reward "
            f"model (…{_CLASSIFIER}): its score head would be random"
        )
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", _DEFAULT_NUM_LABELS)
    if num_labels != 1:
        raise ValueError(f"a reward model gives one score; this one has num_labels {num_labels}")


def refuse_classifier(folder: Path) -> None:
    """ValueError where config.json describes a classifier, which writes nothing. Loads nothing."""
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    if any(str(name).endswith(_CLASSIFIER) for name in architectures):
        raise ValueError(
            f"{folder} holds {architectures[0]}, which gives scores and writes nothing; name a language model"
        )


def check_same_tokens(folder: Path, who: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the model in `folder`, called `who`, reads other tokens than `tokenizer` writes.

    Reads no weights. The vocabularies must be the same, and so must be what both make of a few conversations, which
    is the template.
    """
    from transformers import AutoTokenizer

    assert isinstance(tokenizer.chat_template, str)
    own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    theirs, ours = load_tokenizer(folder, tokenizer.chat_template).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        odd = sorted(dict(theirs.items() ^ ours.items()))
        raise ValueError(
            f"{who} {folder.name} has another vocabulary ({len(theirs):,} tokens) than the policy ({len(ours):,}); "
            f"they differ in {len(odd):,}, e.g. {odd[:3]}. Its scores of the policy's tokens would mean nothing: "
            "give one that was trained from the same base model"
        )
    rows = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if isinstance(rows, int) and rows < len(tokenizer):
        raise ValueError(
            f"{who} {folder.name} has embeddings for {rows:,} tokens and the policy's tokenizer {len(tokenizer):,}: "
            "save it again with the tokenizer that it was trained with"
        )
    if own.chat_template is not None and tokenisation(own) != tokenisation(tokenizer):
        raise ValueError(
            f"{who} {folder.name} was trained with another chat template: it makes other tokens of the same "
            "conversation; give one of this recipe's chat_template, or train it again"
        )


def keep_in_float32(head: torch.nn.Linear) -> None:
    """Take the score head out of bfloat16 autocast, which would round a score between 2 and 4 to a multiple of 1/64."""
    import torch

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight)

    head.forward = forward


def scores_of_tokens(model: Any, head: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The score head at every token of a batch, (B, T, 1). `model`: the classifier, as it is trained.

    transformers pools one score a row. The head gives one a token, and the model's own forward must call it, as
    several processes need.
    """
    found: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        model(**batch, use_cache=False)
    finally:
        hook.remove()
    return found[0]
