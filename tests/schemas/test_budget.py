"""How long a training is, by hand: steps, epochs, tokens, shares, micro-batches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.budget import (
    Budget,
    accumulation_steps,
    share_of,
    smaller_batch,
    steps_for_tokens,
    steps_per_epoch,
    tokens_of_steps,
)
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.schemas.training import DPOSettings, SFTSettings


@pytest.mark.parametrize(
    ("num_rows", "epochs", "batch", "expected"),
    [
        (939_343, 2, 8, 234_836),  # 117,417.9 -> 117,418 an epoch
        (15_960, 1.0, 16, 998),
        (64, 1.0, 16, 4),
        (65, 0.5, 16, 3),  # 5 an epoch, half of it 2.5
        (3, 1.0, 16, 1),
    ],
)
def test_steps_of_epochs(num_rows: int, epochs: float, batch: int, expected: int) -> None:
    assert Budget(batch, epochs).num_steps(num_rows, None) == expected


def test_steps_stand_above_tokens_and_tokens_above_epochs() -> None:
    assert Budget(16, 3.0, max_steps=7).num_steps(1000, 9) == 7 and Budget(16, max_steps=7).num_steps(None, None) == 7
    # 1,000 rows of 50 tokens: 200 a step of 4 rows.
    assert Budget(4, 3.0, max_tokens=1000).num_steps(1000, 50_000) == 5
    assert Budget(4, max_tokens=1000).num_steps(1000, None) is None and Budget(4).num_steps(None, 50_000) is None
    # No row at all: no answer, and no division by zero.
    assert Budget(4).num_steps(0, 0) is None and Budget(4, max_tokens=1000).num_steps(0, 0) is None


def test_steps_for_tokens() -> None:
    assert steps_for_tokens(1000, 10, 500, 4) == 5
    assert steps_for_tokens(1001, 10, 500, 4) == 6
    assert steps_for_tokens(1, 10, 500, 4) == 1
    # SmolTulu's two epochs of SFT: 939,343 rows of 517.4 tokens, batches of eight.
    rows, tokens = 939_343, 486_000_000
    assert steps_for_tokens(2 * tokens, rows, tokens, 8) == math.ceil(2 * rows / 8) == 234_836


@given(st.integers(1, 10**6), st.integers(1, 50), st.integers(1, 4000), st.integers(1, 999))
def test_a_token_budget_of_whole_steps_is_these_steps(rows: int, per_row: int, batch: int, steps: int) -> None:
    """Where a mean in floating point rounds up, it would be one step more."""
    assert steps_for_tokens(steps * batch * per_row, rows, rows * per_row, batch) == steps
    assert steps_for_tokens(steps * batch * per_row + 1, rows, rows * per_row, batch) == steps + 1


def test_tokens_of_steps() -> None:
    # 10 rows in batches of 4 are 3 steps an epoch; the third takes 2 rows.
    assert [tokens_of_steps(steps, 10, 500, 4) for steps in (0, 1, 2, 3, 4, 6)] == [0, 200, 400, 500, 700, 1000]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 50), st.integers(0, 50))
def test_tokens_of_steps_add_up(num_rows: int, batch: int, first: int, more: int) -> None:
    num_tokens = 7 * num_rows

    def tokens(num_steps: int) -> int:
        return tokens_of_steps(num_steps, num_rows, num_tokens, batch)

    an_epoch = steps_per_epoch(num_rows, batch)
    assert tokens(an_epoch) == num_tokens and tokens(first * an_epoch) == first * num_tokens
    assert tokens(first) <= tokens(first + more) <= 7 * batch * (first + more)


def test_shares_are_rounded_up_but_not_because_of_floating_point() -> None:
    assert 100 * 0.07 > 7 and share_of(0.07, 100) == 7
    assert share_of(0.1, 25) == 3 and share_of(0.0, 25) == 0 and share_of(1.0, 25) == 25
    assert share_of(1e-6, 1000) == 1 and share_of(0.03, 234_835) == 7046
    assert all(share_of(n / d, d) == n for d in range(1, 400) for n in range(d + 1))


def test_effective_batch_is_derived_and_refused_where_it_does_not_divide() -> None:
    assert accumulation_steps(12, ComputeSettings(per_device_train_batch_size=3)) == 4
    assert accumulation_steps(12, ComputeSettings(per_device_train_batch_size=3, num_processes=2)) == 2
    with pytest.raises(ValueError, match=r"12 is not a multiple of .* 5 .* one of \[1, 2, 3, 4, 6, 12\]"):
        accumulation_steps(12, ComputeSettings(per_device_train_batch_size=5))


@pytest.mark.parametrize(
    ("size", "effective_batch_size", "num_processes", "expected"),
    [(8, 8, 1, 4), (8, 16, 2, 4), (9, 9, 1, 3), (6, 12, 1, 3), (4, 12, 3, 2), (1, 8, 1, None), (5, 5, 1, 1)],
)
def test_smaller_batch(size: int, effective_batch_size: int, num_processes: int, expected: int | None) -> None:
    assert smaller_batch(size, effective_batch_size, num_processes) == expected


@given(st.integers(1, 99), st.integers(1, 300), st.integers(1, 9))
def test_the_batch_of_a_training_is_the_largest_that_divides(asked: int, effective: int, num_processes: int) -> None:
    compute = ComputeSettings(per_device_train_batch_size=asked, num_processes=num_processes)
    used = compute.of("sft", effective)
    assert used.num_processes == max(n for n in range(1, num_processes + 1) if effective % n == 0)
    size = used.per_device_train_batch_size
    assert size == max(n for n in range(1, asked + 1) if effective % (n * used.num_processes) == 0)
    assert accumulation_steps(effective, used) * size * used.num_processes == effective


def test_budget_of_each_training_and_whether_a_larger_one_can_go_on_from_it() -> None:
    wsd = {"kind": "wsd", "decay_ratio": 0.5}
    sft = SFTSettings(learning_rate=1e-3, effective_batch_size=8, max_length=64, num_train_epochs=2, lora={"r": 4})
    dpo = DPOSettings(learning_rate=1e-3, effective_batch_size=4, max_length=64, max_tokens=99, schedule=wsd)
    rlvr = GRPOSettings(
        learning_rate=1e-3, effective_batch_size=16, num_steps=5, steps_per_generation=3, max_prompt_length=64,
        max_completion_length=32, beta=0.1, schedule=wsd,
    )  # fmt: skip
    assert sft.budget == Budget(8, num_train_epochs=2) and not sft.is_extendable
    assert dpo.budget == Budget(4, max_tokens=99) and dpo.is_extendable
    # GRPO goes on at the border of its generations only: no larger budget can go on from it.
    assert rlvr.budget == Budget(16, max_steps=5) and not rlvr.is_extendable
