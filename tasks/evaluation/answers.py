"""Answers that say how they ended. lm-eval passes on the text alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Request, Sampling
from smoltulu.tasks.models.batches import padded

if TYPE_CHECKING:
    import torch

#: What generation settings may say without a say in what is likeliest.
_GREEDY = {
    "_from_model_config", "attention_mask", "bos_token_id", "do_sample", "eos_token_id", "max_completion_tokens",
    "max_gen_toks", "max_length", "max_new_tokens", "max_tokens", "pad_token_id", "temperature", "top_k", "top_p",
    "transformers_version", "until", "use_cache",
}  # fmt: skip


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

    Greedy answers are written by our engine (tasks/generation): all requests at once, in a batch that stays full. Tasks
    that draw, and models whose generation settings do more than choose the likeliest token, go on by transformers'
    `generate`, a batch to the end of its longest answer. What an answer says is the same, but for the rounding of sums
    and for special tokens that are stop strings: `generate` ends a batch when all its answers have one, and lm-eval's
    text of an answer, which has no special tokens, then went on behind it.
    """

    _ends: list[tuple[str, int]]
    _rows_at_once: int

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        hook, self._ends = self.cache_hook, []  # type: ignore[has-type]
        ends: dict[str, list[tuple[str, int]]] = defaultdict(list)
        in_order = count()

        def told(method: str, request: Any, answer: str) -> None:
            ends[_name(request)].append(self._ends[next(in_order)])
            hook.add_partial(method, request, answer)

        self.cache_hook = SimpleNamespace(add_partial=told)
        self._rows_at_once = size = self.batch_size_per_gpu  # type: ignore[has-type]
        if all(self._is_greedy(one.args[1]) and "max_length" not in one.args[1] for one in requests):
            self.batch_size_per_gpu = max(len(requests), 1)
        try:
            texts = super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self.cache_hook, self.batch_size_per_gpu = hook, size
        waiting = {name: iter(found) for name, found in ends.items()}
        return [
            Answer(text, *next(waiting.get(_name(one.args), iter(())), (None, None)))
            for text, one in zip(texts, requests, strict=True)
        ]

    def _is_greedy(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings of a request, and the model's own, only choose the likeliest token."""
        model: Any = self.model  # type: ignore[attr-defined]
        draws = settings.get("do_sample") or (settings.get("temperature") and settings.get("do_sample") is None)
        return not (draws or settings.keys() - _GREEDY or model.generation_config.to_diff_dict().keys() - _GREEDY)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """(batch, tokens) -> (batch, tokens of prompt and answer)."""
        import torch

        model: Any = self
        ends_by = model.model.generation_config.eos_token_id
        stop_ids = {model.eot_token_id, *(ends_by if isinstance(ends_by, list) else [ends_by])} - {None}
        # lm-eval adds the text of its eos.
        stops = [one for one in stop if one and one not in {self._decode([token]) for token in stop_ids}]
        if not self._is_greedy(settings) or max_length <= context.shape[1]:
            made: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)  # type: ignore[misc]
            rows = made[:, context.shape[1] :].tolist()
        else:
            prompts = [row[mask.bool()].tolist() for row, mask in zip(context, settings["attention_mask"], strict=True)]
            rows = self._greedy(prompts, max_length - context.shape[1], tuple(stop_ids), stops)
            ids, _ = padded(rows, "right", model.tokenizer.pad_token_id, context.device)
            made = torch.cat([context, ids], dim=1)
        self._ends += [end_of(row, stop_ids, stops, self._decode) for row in rows]
        return made

    def _decode(self, ids: Sequence[int]) -> str:
        """With special tokens, which may be stop strings; as lm-eval's own stopping criterion."""
        text: str = self.tok_decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
        return text

    def _greedy(
        self, prompts: list[list[int]], num_tokens: int, stop_ids: tuple[int, ...], stops: Sequence[str]
    ) -> list[list[int]]:
        """Token ids after each prompt."""
        model: Any = self
        engine = TransformersEngine(
            model.model, pad_id=model.tokenizer.pad_token_id, batch_size=self._rows_at_once, decode=self._decode
        )
        sampling = Sampling(num_tokens, 0.0, stop_ids, stop_strings=tuple(stops))
        return [one.ids for one in engine.generate([Request(ids, 0, 0, 0) for ids in prompts], sampling)]


def _name(request: Any) -> str:
    return json.dumps(request, default=str, sort_keys=True)
