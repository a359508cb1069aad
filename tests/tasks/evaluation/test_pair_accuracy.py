"""Pair accuracy: hand-computed cases, and batched scores against the plain forward pass."""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path

import pytest

from smoltulu.tasks.evaluation.pair_accuracy import (
    EncodedText,
    PairAccuracy,
    completion_logps,
    encode_pairs,
    implicit_reward_accuracy,
    rank_pairs,
    reward_scores,
)
from smoltulu.tasks.models.classifiers import load_reward_model
from tests.tiny_model import EOS, build_tiny_model, build_tokenizer

PAIRS = [
    {
        "id": f"pair-{number}",
        "prompt": [{"role": "user", "content": f"What is {number} plus {number}?"}],
        "chosen": [{"role": "assistant", "content": f"The answer is {2 * number}." + " Good." * number}],
        "rejected": [{"role": "assistant", "content": f"It is {2 * number + 1}"}],
    }
    for number in range(7)
]


def test_accuracy_and_margin_by_hand() -> None:
    # Margins 1, 0 and -4, and a tie is wrong: mean -1, variance (4 + 1 + 9) / 2 = 7
    measured = rank_pairs([2.0, 1.0, 1.5, 1.5, 0.0, 4.0])
    assert measured.right == [1.0, 0.0, 0.0]
    assert (measured.value, measured.stderr) == pytest.approx((1 / 3, math.sqrt((1 / 3) / 3)))
    assert (measured.margin, measured.margin_stderr) == pytest.approx((-1.0, math.sqrt(7 / 3)))
    assert rank_pairs([2.0, 1.0]) == PairAccuracy([1.0], 1.0, None, 1.0, None)
    with pytest.raises(ValueError, match="1 of 2 pairs have a score that is NaN or infinite"):
        rank_pairs([2.0, 1.0, math.nan, 0.0])


def test_normalised_and_summed_accuracy_can_disagree() -> None:
    long, short = EncodedText((1,) * 5, 1), EncodedText((1,) * 2, 1)
    # a: 0.5 against 1.0 per token (wrong), 2 against 1 summed (right); b: 1 against 0.25, 1 against 1 (a tie: wrong)
    mean, total, records = implicit_reward_accuracy(
        ["a", "b"], [long, short, short, long], [-10.0, -3.0, -3.0, -11.0], [-12.0, -4.0, -4.0, -12.0]
    )
    assert mean.value == 0.5 and total.value == 0.5
    assert [(record["id"], record["chosen"], record["rejected"]) for record in records] == [
        ("a", 0.5, 1),
        ("b", 1, 0.25),
    ]
    assert [record["right"] for record in records] == [0.0, 1.0]
    assert [record["right_unnormalised"] for record in records] == [1.0, 0.0]
    assert mean.stderr == pytest.approx(math.sqrt(0.5 / 2))  # variance of (0, 1) with n - 1 is 0.5
    # Margins: -0.5 and 0.75 per token, 1 and 0 summed; the standard error of two values is half their distance.
    assert (mean.margin, mean.margin_stderr) == pytest.approx((0.125, 1.25 / 2))
    assert (total.margin, total.margin_stderr) == pytest.approx((0.5, 0.5))


def test_completions_are_content_and_eos() -> None:
    tokenizer = build_tokenizer()
    ids, (_, rejected, *_) = encode_pairs(tokenizer, PAIRS, 256)
    assert ids == [pair["id"] for pair in PAIRS]
    assert tokenizer.decode(rejected.ids[rejected.num_prompt :]) == f"It is 1{EOS}"
    assert tokenizer.decode(rejected.ids[: rejected.num_prompt]) == "<|user|>\nWhat is 0 plus 0?\n<|assistant|>\n"


def test_long_pairs_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    _, texts = encode_pairs(tokenizer, PAIRS, 256)
    lengths = [
        max(len(chosen.ids), len(rejected.ids)) for chosen, rejected in zip(texts[::2], texts[1::2], strict=True)
    ]
    limit = sorted(lengths)[3]
    with caplog.at_level(logging.WARNING, logger="smoltulu"):
        ids, texts = encode_pairs(tokenizer, PAIRS, limit)
    kept = [pair["id"] for pair, length in zip(PAIRS, lengths, strict=True) if length <= limit]
    assert ids == kept and len(texts) == 2 * len(kept) < 2 * len(PAIRS)
    assert f"{len(PAIRS) - len(kept)} of 7 held-out pairs left out" in caplog.text
    with pytest.raises(ValueError, match=r"all 7 held-out pairs are longer than 8 tokens"):
        encode_pairs(tokenizer, PAIRS, 8)


def test_batched_reward_scores_equal_the_forward_pass_one_by_one(tmp_path: Path) -> None:
    import torch

    model = load_reward_model(build_tiny_model(tmp_path, num_labels=1)).eval()
    tokenizer = build_tokenizer()
    texts = [text.ids for text in encode_pairs(tokenizer, PAIRS, 256)[1]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
    for batch_size in (1, 3, 14):
        scores = reward_scores(model, tokenizer, texts, batch_size=batch_size)
        assert scores == pytest.approx(alone, abs=1e-6)
    measured = rank_pairs(scores)
    margins = [a - b for a, b in zip(alone[::2], alone[1::2], strict=True)]
    assert measured.value == sum(margin > 0 for margin in margins) / len(PAIRS)
    assert measured.margin == pytest.approx(sum(margins) / len(PAIRS), abs=1e-6)
    assert measured.margin_stderr == pytest.approx(statistics.stdev(margins) / math.sqrt(len(PAIRS)), abs=1e-6)
    assert len({round(score, 6) for score in alone}) > 5  # scores differ, so the comparison above says something


def test_a_head_in_bfloat16_is_scored_in_float32(tmp_path: Path) -> None:
    import torch

    model = load_reward_model(build_tiny_model(tmp_path, num_labels=1)).eval().to(torch.bfloat16)
    scores = reward_scores(model, build_tokenizer(), [[5, 6, 7], [8, 9, 10, 11]], batch_size=2)
    assert any(torch.tensor(score).bfloat16().item() != score for score in scores)


def test_pad_that_is_eos_is_refused(tmp_path: Path) -> None:
    model = load_reward_model(build_tiny_model(tmp_path, num_labels=1))
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pad token of its own"):
        reward_scores(model, tokenizer, [[1, 2]], batch_size=1)


def test_a_language_model_is_not_a_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a reward model"):
        load_reward_model(build_tiny_model(tmp_path))


def test_batched_completion_logps_equal_the_plain_sum(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(build_tiny_model(tmp_path))).eval()
    tokenizer = build_tokenizer()
    _, texts = encode_pairs(tokenizer, PAIRS, 256)
    expected = []
    for text in texts:
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        expected.append(sum(logp[place - 1, text.ids[place]].item() for place in range(text.num_prompt, len(text.ids))))
    for batch_size in (1, 5, 14):
        assert completion_logps(model, tokenizer, texts, batch_size=batch_size) == pytest.approx(expected, abs=1e-3)
