"""Answers that say how they ended. lm-eval passes on the text alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Answer(str):
    """What a model wrote, as text, which lm-eval takes for any other text.

    stop        `eos`, `length` (it was ended by the limit on its tokens) or the stop string that ended it
    num_tokens  of the answer, the one that ended it included

    None where the backend does not say, and where lm-eval makes what is right an answer too, to compare the two.
    """

    stop: str | None
    num_tokens: int | None

    def __new__(cls, text: str, stop: str | None = None, num_tokens: int | None = None) -> Answer:
        made = super().__new__(cls, text)
        made.stop, made.num_tokens = stop, num_tokens
        return made


def end_of(ids: Sequence[int], stop_ids: Collection[int], stops: Sequence[str], decode: Any) -> tuple[str, int]:
    """What ended an answer, and how many tokens it has.

    ids     tokens after the prompt, padding after the end included
    decode  gives the text of token ids
    """
    num_tokens = next((place + 1 for place, one in enumerate(ids) if one in stop_ids), len(ids))
    text = decode(ids[:num_tokens])
    found = [(text.index(stop), stop) for stop in stops if stop and stop in text]
    if not found:
        return ("eos" if num_tokens and ids[num_tokens - 1] in stop_ids else "length"), num_tokens
    stop = min(found)[1]
    low, high = 1, num_tokens  # the fewest tokens whose text holds the stop string
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stop in decode(ids[:middle]) else (middle + 1, high)
    return stop, low


class NotesEnds:
    """Mixed into lm-eval's HFLM: its answers are `Answer`s.

    HFLM gives texts in the order of the requests, and decides the batches. It tells its cache hook of each answer in
    the order in which the answers were generated: so an end finds its answer.
    """

    _ends: list[tuple[str, int]]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        hook, self._ends = self.cache_hook, []  # type: ignore[has-type]
        ends: dict[str, list[tuple[str, int]]] = defaultdict(list)
        in_order = count()

        def told(method: str, request: Any, answer: str) -> None:
            ends[_name(request)].append(self._ends[next(in_order)])
            hook.add_partial(method, request, answer)

        self.cache_hook = SimpleNamespace(add_partial=told)
        try:
            texts = super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self.cache_hook = hook
        waiting = {name: iter(found) for name, found in ends.items()}
        return [
            Answer(text, *next(waiting.get(_name(one.args), iter(())), (None, None)))
            for text, one in zip(texts, requests, strict=True)
        ]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """(batch, tokens) -> (batch, tokens of prompt and answer)."""
        made: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)  # type: ignore[misc]
        ends_by = self.model.generation_config.eos_token_id  # type: ignore[attr-defined]
        stop_ids = {self.eot_token_id, *(ends_by if isinstance(ends_by, list) else [ends_by])}  # type: ignore[attr-defined]
        rows = made[:, context.shape[1] :].tolist()
        self._ends += [end_of(row, stop_ids, stop, self.tok_decode) for row in rows]  # type: ignore[attr-defined]
        return made


def _name(request: Any) -> str:
    return json.dumps(request, default=str, sort_keys=True)
