"""Losses and hidden states of rendered rows: what a selector model says of them, batch by batch.

Rows are taken longest first, in batches of a bounded number of tokens. They lie end to end where the model can attend
so (tasks/trainer/packed_attention.py), else they are padded on the right. Logits exist for a chunk of the scored
positions at a time. So the memory of a batch does not grow with the length of its rows, up to the longest row that is
longer than a batch. Means are taken in float64. Which rows share a batch changes nothing but rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import MaskKind
from smoltulu.tasks.models.batches import padded
from smoltulu.tasks.models.folders import fit_embeddings, load_language_model, use_bfloat16
from smoltulu.tasks.selection.masking import plain_and_masked
from smoltulu.tasks.selection.rendering import Rendered
from smoltulu.tasks.selection.scores_file import NO_NUMBER, PartScore
from smoltulu.tasks.trainer.packed_attention import pack, segments_of_lengths

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")

#: Tokens of a batch for each row of compute.per_device_eval_batch_size.
ROW_TOKENS = 512
#: Logits that exist at a time: 64 MiB in float32; on a CPU what its cache holds, but for some rows at least.
CHUNK_LOGITS, CPU_CHUNK_LOGITS, _CHUNK_ROWS = 1 << 24, 1 << 22, 128
#: A loss below this counts as this: the relative rise of nearly nothing says nothing (ours).
MIN_LOSS = 0.1


@dataclass(frozen=True)
class Measured:
    """What was measured of a row. `problem`: why it has no score, or ""."""

    loss: float | None = None
    masked_loss: float | None = None
    score: float | None = None
    problem: str = ""
    parts: tuple[PartScore, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows as a model reads them. starts: place of each row's first token in the flattened hidden states."""

    rows: list[Rendered]
    arguments: dict[str, Any]
    starts: list[int]


@dataclass(frozen=True)
class Selector:
    """A selector model, and how its batches are made."""

    model: PreTrainedModel
    max_tokens: int
    packs: bool
    pad_id: int
    is_sorted: bool = True

    def batches(self, rows: Sequence[Rendered]) -> Iterator[Batch]:
        """Longest first, so that a batch that does not fit into memory fails at once."""
        lengths = [len(row.ids) for row in rows]
        for places in batches_of(lengths, self.max_tokens, self.is_sorted):
            yield self.batch([rows[place] for place in places])

    def batch(self, rows: list[Rendered]) -> Batch:
        """Rows end to end, or padded on the right."""
        import torch

        device = self.model.device
        lengths = [len(row.ids) for row in rows]
        if not self.packs:
            ids, mask = padded([row.ids for row in rows], "right", self.pad_id, device)
            arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            return Batch(rows, arguments, [number * max(lengths) for number in range(len(rows))])
        segments = segments_of_lengths(lengths)
        arguments = {
            "input_ids": torch.tensor([[token for row in rows for token in row.ids]], device=device),
            "position_ids": torch.tensor([segments.position_ids], device=device),
            "segments": segments,
        }
        return Batch(rows, arguments, [part.query[0] for part in segments.parts])


def selector_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a folder in float32, the same each time: also where its embeddings have to grow, which is by chance.

    A part of the rows may be scored by another process, or days later. ValueError: the folder is no model that we load.
    """
    import torch

    model = load_language_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fit_embeddings(model, tokenizer)
    return model.eval()


def load_selector(
    folder: Path, tokenizer: PreTrainedTokenizerBase, precision: str, compute: ComputeSettings, device: str
) -> Selector:
    """The model of a folder, in float32 unless `precision` is bfloat16. device: of this process.

    Raises:
        ValueError: the folder is no model that we load, or its logits cannot be made apart from its layers.
    """
    import torch

    model = selector_model(folder, tokenizer)
    if use_bfloat16(precision, compute):
        for parameter in model.parameters():  # not the buffers: rotary frequencies need float32
            parameter.data = parameter.data.to(torch.bfloat16)
    model.to(device).eval()
    packs, before = compute.packing, model.config.get_text_config()._attn_implementation
    if packs:
        try:
            pack(model)
        except ValueError as error:
            logger.info("selection: rows are padded, not packed: %s", error)
            model.set_attn_implementation(before)
            packs = False
    selector = Selector(
        model,
        max_tokens=compute.per_device_eval_batch_size * ROW_TOKENS,
        packs=packs,
        pad_id=tokenizer.pad_token_id,
    )
    check_head(selector)
    return selector


def batches_of(lengths: Sequence[int], max_tokens: int, is_sorted: bool = True) -> Iterator[list[int]]:
    """Places of rows in batches, longest row first. A batch, padded, has at most `max_tokens` tokens, or one row.

    is_sorted  false: in the order in which they come, which is only for comparison
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place]) if is_sorted else list(range(len(lengths)))
    batch: list[int] = []
    longest = 0
    for place in order:
        longest = max(longest, lengths[place])
        if batch and longest * (len(batch) + 1) > max_tokens:
            yield batch
            batch, longest = [], lengths[place]
        batch.append(place)
    if batch:
        yield batch


def hidden_states(selector: Selector, batch: Batch) -> torch.Tensor:
    """Last-layer hidden states, after the last norm: (tokens, hidden), padding included."""
    made: torch.Tensor = selector.model.base_model(**batch.arguments, use_cache=False).last_hidden_state
    return made.flatten(0, 1)


def influence(
    heads: Sequence[tuple[int, int]], kind: MaskKind, whole: bool
) -> Callable[[Selector, Batch], list[Measured]]:
    """AttentionInfluence (arXiv 2505.07293, eq. 5): how much the loss rises, relatively, where heads are masked."""

    def measure(selector: Selector, batch: Batch) -> list[Measured]:
        plain, masked = plain_and_masked(selector.model, heads, kind, batch.arguments)
        losses = row_losses(selector.model, plain.flatten(0, 1), batch, whole)
        raised = row_losses(selector.model, masked.flatten(0, 1), batch, whole)
        return [measured(row, whole, own, other) for row, own, other in zip(batch.rows, losses, raised, strict=True)]

    return measure


def perplexity(whole: bool) -> Callable[[Selector, Batch], list[Measured]]:
    """Mean loss of the scored tokens: its exponential is the perplexity, and ranks the same."""

    def measure(selector: Selector, batch: Batch) -> list[Measured]:
        losses = row_losses(selector.model, hidden_states(selector, batch), batch, whole)
        return [measured(row, whole, own, None) for row, own in zip(batch.rows, losses, strict=True)]

    return measure


def influence_score(loss: float, masked_loss: float) -> float:
    """(masked - plain) / max(plain, 0.1)."""
    return (masked_loss - loss) / max(loss, MIN_LOSS)


def measured(row: Rendered, whole: bool, losses: np.ndarray, masked: np.ndarray | None) -> Measured:
    """A row's figures from the losses of its scored tokens, float32, in their order.

    A row with a loss that is no number, of either pass, has none.
    """
    import numpy as np

    def figures(where: Any) -> tuple[float, float | None, float]:
        loss = float(losses[where].mean(dtype=np.float64))
        if masked is None:
            return loss, None, loss
        raised = float(masked[where].mean(dtype=np.float64))
        return loss, raised, influence_score(loss, raised)

    loss, masked_loss, score = figures(slice(None))
    if not all(math.isfinite(value) for value in (loss, masked_loss or 0.0, score)):
        return Measured(problem=NO_NUMBER)
    places = np.array(row.scored(whole))
    parts = []
    for part in row.parts:
        where = (places >= part.first) & (places < part.last)
        assert where.any(), (row.id, part)
        own, raised, rise = figures(where)
        parts.append(PartScore(part.turn, part.step, part.first, part.last, int(where.sum()), own, raised, rise))
    return Measured(loss, masked_loss, score, parts=tuple(parts))


def row_losses(model: PreTrainedModel, hidden: torch.Tensor, batch: Batch, whole: bool) -> list[np.ndarray]:
    """Cross-entropy of each row's scored tokens, in float32. hidden: (tokens, hidden), as `hidden_states`."""
    import torch

    places = [row.scored(whole) for row in batch.rows]
    before = [start + place - 1 for start, own in zip(batch.starts, places, strict=True) for place in own]
    targets = [row.ids[place] for row, own in zip(batch.rows, places, strict=True) for place in own]
    losses = token_losses(
        model, hidden[torch.tensor(before, device=hidden.device)], torch.tensor(targets, device=hidden.device)
    )
    made: list[np.ndarray] = [one.numpy() for one in losses.cpu().split([len(own) for own in places])]
    return made


def token_losses(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32: (N,). hidden: (N, hidden), of the positions before the targets (N,).

    The logits of a chunk are made by the model's own forward with its layers left out: whatever it does to them, such
    as to scale or to cap, is done.
    """
    import torch
    from torch.nn.functional import cross_entropy

    chunk = CPU_CHUNK_LOGITS if hidden.device.type == "cpu" else CHUNK_LOGITS
    size = max(_CHUNK_ROWS, chunk // model.get_input_embeddings().num_embeddings)
    losses = []
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        with _layers_left_out(model, part[None]):
            logits = model(inputs_embeds=part[None], use_cache=False).logits[0]
        losses.append(cross_entropy(logits.float(), wanted, reduction="none"))
    return torch.cat(losses)


@contextmanager
def _layers_left_out(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Inside, the model's layers give these hidden states, (1, N, hidden), whatever they read."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Given(BaseModelOutputWithPast):
        """Nothing but hidden states, whatever else a head asks for: what routers said, attentions, a cache."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    body = model.base_model
    assert body is not model and "forward" not in vars(body), type(model).__name__
    body.forward = lambda *args, **kwargs: Given(last_hidden_state=hidden)
    try:
        yield
    finally:
        del body.forward


def check_head(selector: Selector) -> None:
    """ValueError where `token_losses` are not those of the model as a whole: its head is made in an unknown way."""
    import torch
    from torch.nn.functional import cross_entropy

    model = selector.model
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    unknown = ValueError(
        f"{type(model).__name__} makes its logits in a way that is not known here; give another selection.model "
        "(Llama, Qwen, Granite, SmolLM2)"
    )
    if model.base_model is model:
        raise unknown
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        made = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hidden = getattr(made, "last_hidden_state", None)
        if hidden is None:  # the body of a model of texts and images is a language model with a head of its own
            raise unknown
        ours = token_losses(model, hidden[0, :-1], ids[0, 1:])
    whole = cross_entropy(logits.float(), ids[0, 1:], reduction="none")
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
    # NaN counts as equal: rows without a loss are listed.
    if not torch.allclose(ours, whole, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise unknown


def score_rows(
    selector: Selector, rows: Sequence[Rendered], measure: Callable[[Selector, Batch], list[Measured]]
) -> dict[int, Measured]:
    """Number of each row -> what was measured of it."""
    import torch

    found: dict[int, Measured] = {}
    with torch.no_grad():
        for batch in selector.batches(rows):
            found |= zip([row.row for row in batch.rows], measure(selector, batch), strict=True)
    return found
