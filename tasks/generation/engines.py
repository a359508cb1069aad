"""The engines that run on transformers: on the policy itself, or on a copy with a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.generation.interface import Request, Sampling, Written, no_report
from smoltulu.tasks.generation.loop import write
from smoltulu.tasks.models.batches import OnBatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@contextmanager
def caches_as_attended() -> Iterator[None]:
    """Have caches hold keys and values in autocast's dtype, to which attention casts them anyway.

    Keys leave the rotary embedding in float32, and transformers' cache takes its dtype from the first key.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def cast_and_update(layer: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(keys.device.type):
            dtype = torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(dtype), values.to(dtype)
        return update(layer, keys, values, *args, **kwargs)

    DynamicLayer.update = cast_and_update
    try:
        yield
    finally:
        DynamicLayer.update = update


class TransformersEngine:
    """Writes with a model that is there: the policy as it is, so there is nothing to bring to it.

    batch_size  texts written at once; None: all
    around      lies around all tokens of a call: autocast, which then keeps the cast weights
    decode      text of token ids, where texts end with stop strings
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        batch_size: int | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.around, self.decode = around, decode

    def generate(self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch = no_report) -> list[Written]:
        """Prompts of similar length together, padded on the left, with a key-value cache."""
        if not requests:
            return []
        with self._evaluating(), self.around(), caches_as_attended():
            return write(
                self.model,
                requests,
                sampling,
                batch_size=self.batch_size or len(requests),
                pad_id=self.pad_id,
                decode=self.decode,
                on_batch=on_batch,
            )

    def logps(self, ids: Sequence[int]) -> list[float]:
        """See `Engine`. One forward pass."""
        import torch

        own = torch.tensor([list(ids)], device=self.model.device)
        with self._evaluating(), self.around(), torch.no_grad():
            logits = self.model(input_ids=own, use_cache=False).logits[0, :-1]
            logps = torch.log_softmax(logits.float(), -1).gather(1, own[0, 1:, None])
        made: list[float] = logps[:, 0].tolist()
        return made

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The policy's weights are its own."""

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout; and with activation checkpointing, a model that trains keeps no cache.

        Autocast keeps the cast weights of those alone that have gradients: frozen ones would be cast for each token.
        """
        was_training, frozen = self.model.training, [one for one in self.model.parameters() if not one.requires_grad]
        self.model.eval()
        for one in frozen:
            one.requires_grad_(True)
        try:
            yield
        finally:
            for one in frozen:
                one.requires_grad_(False)
            self.model.train(was_training)


class CopyEngine(TransformersEngine):
    """Writes with a model of its own, which may lie on another device. It has the weights of the last `sync`."""

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """ValueError where names or shapes are not those of the copy."""
        import torch

        missing = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                if name not in missing or missing[name].shape != weight.shape:
                    raise ValueError(
                        f"the policy's weight {name} {tuple(weight.shape)} has no place in the model that writes "
                        "rollouts; both must be loaded from one folder"
                    )
                missing.pop(name).copy_(weight)
        if missing:
            raise ValueError(f"the policy brought no {', '.join(sorted(missing))} to the model that writes rollouts")
