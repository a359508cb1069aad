"""Answers of a measurement that goes on: a file of its `work`, a line for each shard, so that a kill loses one at most.

The order of the requests is that of their texts' lengths, and shards are cut from it one after the other. So the
batches of a measurement that was interrupted are those of one that was not, and so is every answer, bit for bit. The
file lies in the work of the measurement's own key: nothing else reads it. Another version of a library, or of ours,
would not answer alike, so its answers are not gone on from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from smoltulu.tasks.evaluation.answers import Answer
from smoltulu.tasks.models.batches import OnBatch

#: File of `work`.
ANSWERS_FILE = "answers.jsonl"
#: Items of a shard for each unit of batch size. A written answer takes hundreds of passes, so its shards are small.
BATCHES_PER_SHARD, WRITTEN_BATCHES_PER_SHARD = 8, 2
_LIBRARIES = ("torch", "transformers", "lm_eval")
#: Raised when our own code answers otherwise, if only by the rounding of other batches; 2: tasks/generation.
_ANSWERS_VERSION = 2


class Kept:
    """Answers by what was asked. `add` appends to the file and waits for the disk."""

    def __init__(self, work: Path, device: str) -> None:
        """`device`: cpu or cuda, whose answers differ. OSError where the file cannot be read or written."""
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / ANSWERS_FILE
        self._header = {"device": device, "answers": _ANSWERS_VERSION} | {name: _version(name) for name in _LIBRARIES}
        self._answers: dict[str, Any] = {}
        if not self._read():
            self._file.write_text(json.dumps(self._header) + "\n")

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, name: str) -> bool:
        return name in self._answers

    def __getitem__(self, name: str) -> Any:
        return self._answers[name]

    def add(self, answers: dict[str, Any]) -> None:
        """Keep a shard: name of a request -> its answer, any JSON value."""
        self._answers |= answers
        with self._file.open("ab") as file:
            file.write(json.dumps(answers).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> bool:
        """Whether there were answers to go on from. A line that a kill cut short is cut off the file."""
        if not self._file.exists():
            return False
        whole = 0
        with self._file.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if not isinstance(value, dict) or (number == 0 and value != self._header):
                    break
                self._answers |= value if number else {}
                whole += len(line)
        if whole:
            os.truncate(self._file, whole)
        return whole > 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def in_shards(
    kept: Kept | None,
    requests: Sequence[tuple[Sequence[Any], Any]],
    num_items: int,
    answer: Callable[[list[int]], list[Any]],
    items: Sequence[Any] | None = None,
) -> list[Any]:
    """The answer of each request, taken from `kept` or asked for a shard at a time.

    Args:
        requests: text or tokens, by whose length they are ordered (the longest first), and what else decides the
            answer: JSON values.
        num_items: of a shard.
        answer: gives the answers of requests by their positions; JSON values.
        items: of each request, where several belong together (the choices of a question): a shard holds whole items.
            Those of an item follow each other.
    """
    names = list(_names(requests))
    if kept is None:
        return answer(list(range(len(requests))))
    own = items if items is not None else range(len(requests))
    groups = [list(group) for _, group in groupby(range(len(requests)), key=lambda place: own[place])]
    groups.sort(key=lambda group: -max(len(requests[place][0]) for place in group))
    waiting = [group for group in groups if not all(names[place] in kept for place in group)]
    for start in range(0, len(waiting), num_items):
        places = sorted(place for group in waiting[start : start + num_items] for place in group)
        kept.add(dict(zip((names[place] for place in places), answer(places), strict=True)))
    return [kept[name] for name in names]


def kept_scores(
    kept: Kept | None,
    label: str,
    texts: Sequence[Sequence[int]],
    batch_size: int,
    on_batch: OnBatch,
    score: Callable[[list[int], OnBatch], list[float]],
) -> list[float]:
    """One number for each text (token ids), a shard at a time. `score(positions, on_batch)`; `label`: of what asks."""
    num_done = 0

    def answer(places: list[int]) -> list[float]:
        nonlocal num_done
        scores = score(places, lambda num, _: on_batch(num_done + num, len(texts)))
        num_done += len(places)
        return scores

    requests = [(list(text), label) for text in texts]
    return in_shards(kept, requests, BATCHES_PER_SHARD * batch_size, answer)


def _names(requests: Sequence[tuple[Sequence[Any], Any]]) -> Iterator[str]:
    """A digest of what is asked; a number besides, where the same is asked several times."""
    seen: Counter[str] = Counter()
    for request in requests:
        name = hashlib.sha256(json.dumps(request, default=str, sort_keys=True).encode()).hexdigest()[:32]
        seen[name] += 1
        yield f"{name}#{seen[name]}"


class Resuming:
    """A model for lm-eval whose answers are kept. Everything else is asked of the model that it stands for."""

    def __init__(self, model: Any, kept: Kept | None) -> None:
        self._model, self._kept = model, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, is it what the model would write) of each continuation."""
        return [(value, is_greedy) for value, is_greedy in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt."""
        return [Answer(*made) for made in self._ask("generate_until", requests)]

    def _ask(self, method: str, requests: list[Any]) -> list[Any]:
        def answer(places: list[int]) -> list[Any]:
            made = getattr(self._model, method)([requests[place] for place in places], disable_tqdm=True)
            return [_plain(one) for one in made]

        texts = [
            ("".join(one for one in request.args if isinstance(one, str)), [method, *request.args])
            for request in requests
        ]
        items = [(request.task_name, request.doc_id) for request in requests]
        num_batches = WRITTEN_BATCHES_PER_SHARD if method == "generate_until" else BATCHES_PER_SHARD
        size = num_batches * self._model.batch_size
        return in_shards(self._kept, texts, size, answer, items)


def _plain(answer: Any) -> Any:
    if isinstance(answer, Answer):
        return [str(answer), answer.stop, answer.num_tokens]
    return [answer, None, None] if isinstance(answer, str) else answer
