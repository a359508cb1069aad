"""A Llama whose weights are written by hand: a head that looks one token back, and heads that copy what it found.

Layer 0, head 1 attends to the token before (rotation alone decides) and writes it beside the token itself. The copying
heads of layer 1 look for a position whose token before is the present one, and write that position's token where the
head of the model reads. So the model continues every text that it has seen, and knows nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smoltulu.tasks.selection.probes import Probe

VOCABULARY = 32
#: Parts of the hidden state: the token, the token before, the token that is copied, and a constant.
_TOKEN, _BEFORE, _COPIED, _ONE = 0, VOCABULARY, 2 * VOCABULARY, 3 * VOCABULARY
_WIDTH = 128
_HEAD_DIM = 128
#: From this pair of dimensions on the rotation is too slow to matter within a thousand tokens.
_STILL = 32
_SHARP = 40.0

PREVIOUS_TOKEN_HEAD = (0, 1)


def induction_model(
    copying_heads: Sequence[int] = (2,), num_layers: int = 2, num_heads: int = 4, num_key_value_heads: int | None = None
) -> LlamaForCausalLM:
    """`copying_heads`: of layer 1. All other weights are zero."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e14},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config).eval()
    group = num_heads // config.num_key_value_heads
    tokens = torch.arange(VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight[tokens, _TOKEN + tokens] = 1.0
        model.model.embed_tokens.weight[:, _ONE] = 1.0
        model.lm_head.weight[tokens, _COPIED + tokens] = 20.0

        # Query and key are constant. Rotated by their distance, they agree best one token apart.
        layer, head = PREVIOUS_TOKEN_HEAD
        attention = model.model.layers[layer].self_attn
        frequencies = 1e14 ** (-torch.arange(_HEAD_DIM // 2) / (_HEAD_DIM // 2))
        start, shared = head * _HEAD_DIM, (head // group) * _HEAD_DIM
        for pair in range(4):
            angle = float(frequencies[pair])
            attention.k_proj.weight[shared + pair, _ONE] = _SHARP
            attention.q_proj.weight[start + pair, _ONE] = _SHARP * float(torch.tensor(angle).cos())
            attention.q_proj.weight[start + pair + _HEAD_DIM // 2, _ONE] = -_SHARP * float(torch.tensor(angle).sin())
        attention.v_proj.weight[shared + tokens, _TOKEN + tokens] = 1.0
        attention.o_proj.weight[_BEFORE + tokens, start + tokens] = 1.0

        attention = model.model.layers[1].self_attn
        for head in copying_heads:
            start, shared = head * _HEAD_DIM, (head // group) * _HEAD_DIM
            attention.q_proj.weight[start + _STILL + tokens, _TOKEN + tokens] = _SHARP
            attention.k_proj.weight[shared + _STILL + tokens, _BEFORE + tokens] = _SHARP
            attention.v_proj.weight[shared + tokens, _TOKEN + tokens] = 1.0
            attention.o_proj.weight[_COPIED + tokens, start + tokens] = 1.0
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
