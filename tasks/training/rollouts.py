"""Rollouts: what a policy writes after prompts. One interface, and transformers as the backend behind it.

Every token is drawn with a uniform random number that depends on the seed, the rollout batch, the prompt, the sample
and the place of the token, and on nothing else. So a training that goes on from a checkpoint needs no random state, and
neither the batches of generation nor the number of processes choose what is written (but for the rounding of sums).
tests/tasks/training/test_rollouts.py says what any other backend must keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from smoltulu.tasks.models.decoding import Written, write
from smoltulu.tasks.training.grpo import caches_as_attended

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

#: What random numbers are for: parts of their key, so that no two purposes share numbers.
TOKENS, PROMPT_ORDER, MINIBATCHES, HELD_OUT_ROWS, HELD_OUT_TOKENS = 1, 2, 3, 4, 5

#: What a backend returns of each request: ids with the ending token, whether they were ended, and each id's
#: log-probability under the distribution that it was drawn from (the softmax of the logits over the temperature).
Rollout = Written


@dataclass(frozen=True)
class Request:
    """A rollout to be written.

    prompt_ids  token ids of the prompt
    batch       number of the rollout batch
    prompt      number of the prompt in the training's rows
    sample      number of the sample of this prompt in this batch
    """

    prompt_ids: Sequence[int]
    batch: int
    prompt: int
    sample: int


class Backend(Protocol):
    """Writes rollouts with the policy as it is now.

    It must keep: results come in the order of the requests; ids are 1 to max_new_tokens long; `stopped` says that the
    last id is a stop id, and no other id is one; a rollout depends on its own request and on the weights only; every
    token of the vocabulary can come with its probability under softmax(logits / temperature): no top-k, no top-p.
    """

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]: ...


def random_words(seed: int, purpose: int, counter: tuple[int, int, int], num: int) -> np.ndarray:
    """`num` random 64-bit words of Philox 4x64-10 (Salmon et al., SC 2011), a function of its key and counter.

    Word t of a stream is made of (seed, purpose, counter, t // 4) alone. The raw words are taken, whose values numpy
    promises not to change.
    """
    import numpy as np

    words: np.ndarray = np.random.Philox(key=[seed, purpose], counter=[0, *counter]).random_raw(num)
    return words


def uniform_draws(seed: int, request: Request, num: int, purpose: int = TOKENS) -> np.ndarray:
    """(num,) float32 in [0, 1) with 24 random bits each, one for each token that a rollout may have."""
    import numpy as np

    words = random_words(seed, purpose, (request.sample, request.prompt, request.batch), num)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def shuffled(seed: int, purpose: int, counter: tuple[int, int, int], num: int) -> list[int]:
    """A permutation of `num` numbers that depends on the arguments alone."""
    import numpy as np

    order: list[int] = np.argsort(random_words(seed, purpose, counter, num), kind="stable").tolist()
    return order


def prompts_of_batch(seed: int, batch: int, num_prompts: int, num_rows: int) -> list[int]:
    """Which rows rollout batch `batch` takes: epochs over all rows, end to end, each in an order of its own.

    An epoch's order depends on seed and epoch alone. A batch may end one epoch and begin the next.
    """
    lines: list[int] = []
    for epoch in range(batch * num_prompts // num_rows, ((batch + 1) * num_prompts - 1) // num_rows + 1):
        start = epoch * num_rows
        first, last = max(batch * num_prompts - start, 0), min((batch + 1) * num_prompts - start, num_rows)
        lines += shuffled(seed, PROMPT_ORDER, (epoch, 0, 0), num_rows)[first:last]
    return lines


def transformers_backend(
    model: PreTrainedModel,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    purpose: int = TOKENS,
) -> Backend:
    """Rollouts by transformers: prompts of similar length together, padded on the left, with a key-value cache.

    One autocast lies around all tokens, which keeps the cast weights; the cache holds what attention reads.

    batch_size  rollouts written at once; None: all
    purpose     what the random numbers are for
    """

    def rollouts(requests: Sequence[Request]) -> list[Rollout]:
        import numpy as np
        import torch

        if not requests:
            return []
        draws = torch.from_numpy(
            np.stack([uniform_draws(seed, request, max_new_tokens, purpose) for request in requests])
        )
        was_training = model.training
        model.eval()  # with activation checkpointing, a model that trains keeps no cache
        try:
            with autocast(), caches_as_attended():
                return write(
                    model,
                    [request.prompt_ids for request in requests],
                    draws,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size or len(requests),
                    temperature=temperature,
                    stop_ids=stop_ids,
                    pad_id=pad_id,
                )
        finally:
            model.train(was_training)

    return rollouts
