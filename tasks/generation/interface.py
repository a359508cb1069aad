"""Generation: requests in, token ids out. One interface for RLVR, evaluation and samples, whatever engine writes.

Every token is drawn with a uniform random number that depends on the seed, the rollout batch, the prompt, the sample
and the place of the token, and on nothing else. So a run that goes on from a checkpoint needs no random state, and
neither the batches of generation nor the number of processes choose what is written (but for the rounding of sums).
tests/tasks/generation/test_generation.py says what every engine must keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from smoltulu.tasks.models.batches import OnBatch

if TYPE_CHECKING:
    import numpy as np
    import torch

#: What random numbers are for: parts of their key, so that no two purposes share numbers.
TOKENS, PROMPT_ORDER, MINIBATCHES, HELD_OUT_ROWS, HELD_OUT_TOKENS = 1, 2, 3, 4, 5


def no_report(num_done: int, num_texts: int) -> None:
    """Where nobody waits."""


@dataclass(frozen=True)
class Request:
    """A text to be written.

    prompt_ids  token ids of the prompt
    batch       number of the rollout batch; 0 outside of a training
    prompt      number of the prompt in the rows
    sample      number of the sample of this prompt in this batch
    draws       (max_new_tokens,) float32 in [0, 1) in place of those of the key, where a caller has numbers of its own
    """

    prompt_ids: Sequence[int]
    batch: int
    prompt: int
    sample: int
    draws: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How texts are written.

    temperature   0: greedy
    stop_ids      a text ends with the first of them, which is kept
    top_p         below 1, tokens come from the nucleus of this mass (arXiv 1904.09751). No rollout of a training does:
                  its update would not know
    seed          part of the key of all random numbers, as `purpose` is
    stop_strings  a text also ends with the token that completes one of them; `stopped` then is False
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    top_p: float = 1.0
    seed: int = 0
    purpose: int = TOKENS
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    ids      token ids, the one that ended it included
    stopped  whether the last of them ends an answer
    logps    log-probability of each id under the distribution that it was drawn from; none where decoding was greedy
    """

    ids: list[int]
    stopped: bool
    logps: list[float]


class Engine(Protocol):
    """Writes with a model.

    `generate` must keep: results come in the order of the requests; ids are 1 to max_new_tokens long; `stopped` says
    that the last id is a stop id, and no other id is one; a text depends on its own request and on the weights only;
    every token of the vocabulary can come with its probability under softmax(logits / temperature), unless top_p says
    otherwise.

    `logps` is the probe: log-probability of each id but the first, given those before it, at temperature 1.

    `sync` brings the weights of a policy, (name, whole tensor) each, to an engine that has weights of its own. It is
    asked for by tasks/generation/freshness.py alone.
    """

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch = no_report
    ) -> list[Written]: ...

    def logps(self, ids: Sequence[int]) -> list[float]: ...

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...


def random_words(seed: int, purpose: int, counter: tuple[int, int, int], num: int) -> np.ndarray:
    """`num` random 64-bit words of Philox 4x64-10 (Salmon et al., SC 2011), a function of its key and counter.

    Word t of a stream is made of (seed, purpose, counter, t // 4) alone. The raw words are taken, whose values numpy
    promises not to change.
    """
    import numpy as np

    words: np.ndarray = np.random.Philox(key=[seed, purpose], counter=[0, *counter]).random_raw(num)
    return words


def uniform_draws(seed: int, request: Request, num: int, purpose: int = TOKENS) -> np.ndarray:
    """(num,) float32 in [0, 1) with 24 random bits each, one for each token that a text may have."""
    import numpy as np

    words = random_words(seed, purpose, (request.sample, request.prompt, request.batch), num)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def draws_of(request: Request, sampling: Sampling) -> np.ndarray:
    """(max_new_tokens,): the request's own, or those of its key."""
    if request.draws is not None:
        assert len(request.draws) == sampling.max_new_tokens, "a number for each token that it may have"
        return request.draws
    return uniform_draws(sampling.seed, request, sampling.max_new_tokens, sampling.purpose)


def seed_of_request(request: Request, sampling: Sampling) -> int:
    """63 bits of the same key, for an engine that draws by itself and takes a seed for each request."""
    counter = (request.sample, request.prompt, request.batch)
    return int(random_words(sampling.seed, sampling.purpose, counter, 1)[0]) >> 1
