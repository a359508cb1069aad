"""Log-likelihoods of all choices of an item from one pass over its context.

lm-eval runs the context once for every choice. Here the choices lie behind their context, side by side: each sees the
context and itself, and counts its positions from the context's end. What a token sees is exactly what it sees alone, so
the sums are those of separate passes (1e-4 nats in float32). Items lie behind each other in one row, so nothing is
padded, and logits are made for the scored tokens only.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger("smoltulu")

Request = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation

#: Tokens of a pass for each unit of batch size. A pass of one item may be longer.
TOKENS_PER_BATCH_UNIT = 64
#: At most so many tokens for each hidden dimension d. The attention of a token costs 4 d operations for every token of
#: the pass, those of other items for nothing, and the rest of a layer 24 d²: with 2 d tokens, a third of that. Below
#: the second number a pass costs what it costs to begin one.
TOKENS_PER_DIMENSION, MIN_TOKENS = 2, 256
#: Nats by which a sum may differ from one alone, or the model does not read the mask: whole nats, of random tokens.
_TOLERANCE = {"torch.float32": 1e-3, "torch.float64": 1e-3}
_TOLERANCE_ROUNDED = 0.5  # bfloat16 and float16


class Likelihood(NamedTuple):
    """Of one continuation: sum of its tokens' log-probabilities in nats, and whether each was the likeliest."""

    sum: float
    is_greedy: bool


@dataclass
class Item:
    """A context and the continuations that are scored behind it.

    continuations  tokens -> numbers of the requests that ask for them
    num_tokens     of input: the last token of a continuation is none
    """

    context: tuple[int, ...]
    continuations: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    num_tokens: int = 0


def cut(request: Request, max_length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A request, cut from the left to `max_length` inputs as lm-eval cuts it. The last token is no input.

    One token of context stays at least. A continuation longer than `max_length` loses its beginning, where lm-eval
    ends with an assertion.
    """
    context, continuation = request
    continuation = tuple(continuation[-max_length:])
    return tuple(context[-(max_length + 1 - len(continuation)) :]), continuation


def shared_contexts(requests: Sequence[Request], max_length: int) -> list[Item]:
    """Items of at most `max_length` tokens, the longest first, in which every request is once.

    Requests share an item where their contexts are the same after the cut.
    """
    items: list[Item] = []
    not_full: dict[tuple[int, ...], Item] = {}
    for number, request in enumerate(requests):
        context, continuation = cut(request, max_length)
        item = not_full.get(context)
        if item is not None and continuation in item.continuations:
            item.continuations[continuation].append(number)
            continue
        num_inputs = len(continuation) - 1
        if item is None or item.num_tokens + num_inputs > max_length:
            item = not_full[context] = Item(context, num_tokens=len(context))
            items.append(item)
        item.continuations[continuation] = [number]
        item.num_tokens += num_inputs
    return sorted(items, key=lambda item: -item.num_tokens)


def passes(items: Sequence[Item], num_tokens: int) -> Iterator[list[Item]]:
    """Items one after the other, as many as come to `num_tokens`, and one at least."""
    batch: list[Item] = []
    length = 0
    for item in items:
        if batch and length + item.num_tokens > num_tokens:
            yield batch
            batch, length = [], 0
        batch.append(item)
        length += item.num_tokens
    if batch:
        yield batch


def choice_likelihoods(
    model: PreTrainedModel, requests: Sequence[Request], *, max_length: int, batch_size: int
) -> Iterator[tuple[list[int], Likelihood]]:
    """Numbers of requests and what is asked of them, pass by pass."""
    of_width = TOKENS_PER_DIMENSION * getattr(model.config.get_text_config(), "hidden_size", 0)
    num_tokens = min(batch_size * TOKENS_PER_BATCH_UNIT, max(of_width, MIN_TOKENS))
    for batch in passes(shared_contexts(requests, max_length), num_tokens):
        asked = (numbers for item in batch for numbers in item.continuations.values())
        yield from zip(asked, _pass_likelihoods(model, batch), strict=True)


class Packed(NamedTuple):
    """The inputs of a pass.

    ids        [width]
    positions  [width]
    seen       [width, width] whether a column (first) sees another one
    kept       [num_kept] columns that predict a scored token
    where      [num scored tokens] which of the kept columns predicts each
    targets    [num scored tokens]
    """

    ids: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor
    kept: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor


def pack(batch: Sequence[Item]) -> Packed:
    """Context, first choice, second choice, …, next context, … in one row."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    of_item: list[int] = []
    part: list[int] = []  # 0 context, 1, 2, … continuations
    predictors: list[int] = []
    targets: list[int] = []
    for name, item in enumerate(batch):
        length = len(item.context)
        ids += item.context
        positions += range(length)
        part += [0] * length
        last = len(ids) - 1  # of the context: it predicts the first token of each continuation
        for number, continuation in enumerate(item.continuations, 1):
            inputs = continuation[:-1]
            predictors += [last, *range(len(ids), len(ids) + len(inputs))]
            targets += continuation
            ids += inputs
            positions += range(length, length + len(inputs))
            part += [number] * len(inputs)
        of_item += [name] * (len(ids) - len(of_item))
    items, parts = torch.tensor(of_item), torch.tensor(part)
    seen = (items[:, None] == items) & ((parts == 0) | (parts[:, None] == parts))
    kept, where = torch.tensor(predictors).unique(return_inverse=True)
    return Packed(torch.tensor(ids), torch.tensor(positions), seen.tril(), kept, where, torch.tensor(targets))


def _pass_likelihoods(model: PreTrainedModel, batch: Sequence[Item]) -> list[Likelihood]:
    """Of each item's continuations, in their order."""
    import torch

    packed = Packed(*(tensor.to(model.device) for tensor in pack(batch)))
    hidden = torch.finfo(model.dtype).min
    mask = torch.zeros(packed.seen.shape, dtype=model.dtype, device=model.device).masked_fill_(~packed.seen, hidden)
    with torch.inference_mode():
        logits = model(
            input_ids=packed.ids[None],
            position_ids=packed.positions[None],
            attention_mask=mask[None, None],
            logits_to_keep=packed.kept,
            use_cache=False,
        ).logits[0]  # [num_kept, vocabulary]
        # Sums of bfloat16 would be rounded to a quarter, and choices would tie.
        logps = logits.float().log_softmax(-1)
        of_targets = logps[packed.where, packed.targets].double().cpu()
        is_likeliest = (logps.argmax(-1)[packed.where] == packed.targets).cpu()
    lengths = [len(continuation) for item in batch for continuation in item.continuations]
    parts = zip(of_targets.split(lengths), is_likeliest.split(lengths), strict=True)
    return [Likelihood(float(values.sum()), bool(flags.all())) for values, flags in parts]


def why_not_shared(model: PreTrainedModel, max_length: int) -> str:
    """Why this model cannot run choices side by side; empty where it can. Tried out with a dozen tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and window and getattr(config, "use_sliding_window", True):
        kinds = {"sliding_attention"}
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"layers of the kind {', '.join(sorted(others))} read no mask"
    if "sliding_attention" in kinds and (window is None or window < max_length):
        return f"its attention reaches back {window} tokens, and prompts may have {max_length}"
    wanted = {"position_ids", "attention_mask", "logits_to_keep"}
    if missing := wanted - set(inspect.signature(model.forward).parameters):
        return f"it takes no {', '.join(sorted(missing))}"
    num_words = min(config.vocab_size, 200)
    tokens = [7 * number % num_words for number in range(14)]
    requests: list[Request] = [(tokens[:6], tokens[6:9]), (tokens[:6], tokens[9:]), (tokens[2:5], tokens[4:7])]
    together = [0.0] * len(requests)
    try:
        for (number,), likelihood in choice_likelihoods(model, requests, max_length=64, batch_size=1):
            together[number] = likelihood.sum
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it refuses a mask of two dimensions: {error}"
    tolerance = _TOLERANCE.get(str(model.dtype), _TOLERANCE_ROUNDED)
    off = max(abs(one - _alone(model, *request)) for one, request in zip(together, requests, strict=True))
    return "" if off <= tolerance else f"a mask of two dimensions changes its sums by {off:.2g} nats"


def _alone(model: PreTrainedModel, context: Sequence[int], continuation: Sequence[int]) -> float:
    import torch

    ids = torch.tensor([[*context, *continuation]], device=model.device)
    with torch.inference_mode():
        logps = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    return float(logps.gather(1, ids[0, len(context) :, None]).sum())


class SharesContexts:
    """Mixed into lm-eval's HFLM: requests with the same context are answered by one pass over it."""

    _why_not_shared: str | None = None

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, was each token the likeliest) of each request.

        Raises:
            ValueError: a choice that is empty, or logits that are no numbers.
        """
        lm: Any = self
        for texts, _, continuation in requests:
            if not continuation:
                raise ValueError(f"a choice has no tokens of its own: {_shown(texts)}. Leave the item out, or mend it")
        if self._why_not_shared is None:
            self._why_not_shared = why_not_shared(lm.model, lm.max_length)
            if self._why_not_shared:
                logger.info("each choice reads its context anew: %s: %s", type(lm.model).__name__, self._why_not_shared)
        if self._why_not_shared:
            plain = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)  # type: ignore[misc]
            for (texts, _, _), (value, _) in zip(requests, plain, strict=True):
                _check_number(value, texts)
            return list(plain)
        answers = [(math.nan, False)] * len(requests)
        tokens = [(context, continuation) for _, context, continuation in requests]
        for numbers, likelihood in choice_likelihoods(
            lm.model, tokens, max_length=lm.max_length, batch_size=lm.batch_size
        ):
            for number in numbers:
                texts = requests[number][0]
                _check_number(likelihood.sum, texts)
                answers[number] = (likelihood.sum, likelihood.is_greedy)
                if texts is not None:  # a window of a rolling request is not counted
                    lm.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers


def _check_number(value: float, texts: tuple[str, str] | None) -> None:
    if math.isnan(value):
        raise ValueError(
            f"the model's log-likelihood is no number (NaN): {_shown(texts)}. Its weights are damaged or its training "
            "diverged; measure an earlier checkpoint"
        )


def _shown(texts: tuple[str, str] | None) -> str:
    """The end of a context and its continuation, for a message."""
    return "a window of a text" if texts is None else f"{texts[1]!r:.60} after …{texts[0][-60:]!r}"
