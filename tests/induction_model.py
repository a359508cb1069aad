"""A Llama whose weights are written by hand: a head that looks one token back, and heads that copy what it found.

Layer 0, head 1 attends to the token before (rotation alone decides) and writes it beside the token itself. The copying
heads of layer 1 look for a position whose token before is the present one, and write that position's token where the
head of the model reads. So the model continues every text that it has seen, and knows nothing else.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smoltulu.tasks.selection.probes import Probe
from smoltulu.tasks.world.lookups import INSTRUCTION, WORD_LISTS

#: Tokens of the texts of `induction_probes`.
VOCABULARY = 32
#: A token is a code of so many signs. Codes of different tokens are nearly orthogonal.
_CODE = 48
#: Parts of the hidden state: the token, the token before, the token that is copied, and a constant.
_TOKEN, _BEFORE, _COPIED, _ONE = 0, _CODE, 2 * _CODE, 3 * _CODE
_WIDTH = 3 * _CODE + 24  # divisible by 4, 6 and 8 heads
_HEAD_DIM = 112
#: From this dimension on, up to the half, the rotation is too slow to matter within some hundred tokens.
_STILL = 8
_THETA = 1e28
_SHARP = 40.0

PREVIOUS_TOKEN_HEAD = (0, 1)


def induction_model(
    copying_heads: Sequence[int] = (2,),
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int | None = None,
    vocab_size: int = VOCABULARY,
) -> LlamaForCausalLM:
    """`copying_heads`: of layer 1. All other weights are zero."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=_WIDTH,
        intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: Any = LlamaForCausalLM(config).eval()
    codes = torch.randn(vocab_size, _CODE, generator=torch.Generator().manual_seed(0)).sign() / _CODE**0.5
    same, half, group = torch.eye(_CODE), _HEAD_DIM // 2, num_heads // config.num_key_value_heads

    def part(start: int) -> slice:
        return slice(start, start + _CODE)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight[:, part(_TOKEN)] = codes
        model.model.embed_tokens.weight[:, _ONE] = 1.0
        model.lm_head.weight[:, part(_COPIED)] = codes

        # Query and key are constant. Rotated by their distance, they agree best one token apart.
        layer, head = PREVIOUS_TOKEN_HEAD
        attention = model.model.layers[layer].self_attn
        start, shared = head * _HEAD_DIM, (head // group) * _HEAD_DIM
        for pair in range(4):
            angle = torch.tensor(_THETA ** (-pair / half))
            attention.k_proj.weight[shared + pair, _ONE] = _SHARP
            attention.q_proj.weight[start + pair, _ONE] = _SHARP * float(angle.cos())
            attention.q_proj.weight[start + pair + half, _ONE] = -_SHARP * float(angle.sin())
        attention.v_proj.weight[part(shared), part(_TOKEN)] = same
        attention.o_proj.weight[part(_BEFORE), part(start)] = same

        attention = model.model.layers[1].self_attn
        for head in copying_heads:
            start, shared = head * _HEAD_DIM, (head // group) * _HEAD_DIM
            attention.q_proj.weight[part(start + _STILL), part(_TOKEN)] = _SHARP * same
            attention.k_proj.weight[part(shared + _STILL), part(_BEFORE)] = _SHARP * same
            attention.v_proj.weight[part(shared), part(_TOKEN)] = same
            attention.o_proj.weight[part(_COPIED), part(start)] = same
    return model


def induction_probes(count: int = 6, needle_length: int = 3) -> list[Probe]:
    """Texts in which a token and what follows it once are asked for at the end. No other token stands twice."""
    probes = []
    rng = random.Random(0)
    for _ in range(count):
        tokens = rng.sample(range(4, VOCABULARY), 20)
        # Not the first token: it has none before it, attends to itself and so seems to follow itself.
        start = rng.randint(2, len(tokens) - needle_length - 1)
        ids = [*tokens, *tokens[start - 1 : start + needle_length]]
        end = len(ids)
        probes.append(
            Probe("", "", "", 2, 0, 0, tuple(ids), (start, start + needle_length), (end - needle_length, end))
        )
    return probes


def lookup_tokenizer() -> PreTrainedTokenizerFast:
    """Words, signs, and the last sign of a key together with what stands between key and value.

    So a value can be found by the one token before it, where keys end differently.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    signs = string.ascii_letters + string.digits
    pieces = {word for words in WORD_LISTS for word in words} | set(signs + string.punctuation + " \n")
    pieces |= {f'{sign}": "' for sign in signs} | set(INSTRUCTION.replace(".", " ").replace(":", " ").split())
    pieces |= {f" {piece}" for piece in pieces if piece.isalpha() and len(piece) > 1}
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "<eos>", "<unk>", *sorted(pieces)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = "|".join(sorted(piece for piece in pieces if piece.isalpha() and len(piece) > 1))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(rf'[A-Za-z0-9]": "| ?\b(?:{words})\b|(?m:.)'), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def lookup_model(folder: Path, copying_heads: Sequence[int] = (2,), num_heads: int = 4, num_layers: int = 2) -> Path:
    """A folder with a model that does most probes, and its tokenizer."""
    tokenizer = lookup_tokenizer()
    induction_model(copying_heads, num_layers, num_heads, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
