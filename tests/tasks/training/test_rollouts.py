"""Which prompts a rollout batch takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.training.rollouts import prompts_of_batch, shuffled


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_epochs_lie_end_to_end_and_each_has_every_row_once(num_rows: int, num_prompts: int, seed: int) -> None:
    num_batches = -(-3 * num_rows // num_prompts)
    batches = [prompts_of_batch(seed, batch, num_prompts, num_rows) for batch in range(num_batches)]
    assert {len(lines) for lines in batches} == {num_prompts}
    stream = list(itertools.chain(*batches))
    for epoch in range(3):
        of_epoch: Sequence[int] = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(of_epoch) == list(range(num_rows))
        assert of_epoch == shuffled(seed, 2, (epoch, 0, 0), num_rows)
