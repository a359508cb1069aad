"""What an optimizer step exchanges with its device and with other ranks, without waiting for the device.

A device runs behind the process that feeds it. Reading a number from it, copying to it from memory that is not pinned,
and choosing by a mask (whose number of true places is on the device) stop the process until the device has caught up,
and the device then waits for the process. So counts are made where batches are made, on the host; metrics stay on the
device until they are logged; and what must be read of every step is read a step later (`HostCopy`).

Batches padded on the right go into a model without their attention mask: no token sees those after it, and transformers
would read from the device whether the mask has anything to say.

tests/tasks/trainer/test_ranks_waits.py counts what stops a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.tokens import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer

#: Key of a batch: places of the tokens whose prediction counts, see `places_of`.
PLACES = "places"


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return tensor.device.type == "cpu"


class HostCopy:
    """Numbers on their way from the device: to be read once the device has done what it was given after them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        import torch

        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values = pinned.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = tensor

    def tolist(self) -> list[Any]:
        """Waits for what was asked for, not for what came after it."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._values.tolist()
        return values


def put(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers, or a tensor of the host, on the device. A GPU copies them while the process goes on."""
    import torch

    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def of_all_ranks(trainer: Trainer, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every rank, in their order; the same everywhere. From host to host: no device takes part."""
    import torch

    if trainer.accelerator.num_processes == 1:
        return [list(numbers)]
    own = torch.tensor([numbers], dtype=torch.float64)
    if trainer.accelerator.device.type == "cpu":
        gathered: list[list[float]] = trainer.accelerator.gather(own).tolist()
        return gathered
    made = [torch.empty_like(own) for _ in range(trainer.accelerator.num_processes)]
    torch.distributed.all_gather(made, own, group=_host_group(trainer))
    of_all: list[list[float]] = torch.cat(made).tolist()
    return of_all


def sums_over_ranks(trainer: Trainer, counts: Sequence[int]) -> list[int]:
    """Each count, summed over the ranks."""
    if trainer.args.world_size == 1:
        return list(counts)
    return [int(sum(column)) for column in zip(*of_all_ranks(trainer, counts), strict=True)]


def _host_group(trainer: Any) -> Any:
    """A group of gloo's beside that of the devices."""
    import torch

    if not hasattr(trainer, "host_group"):
        trainer.host_group = torch.distributed.new_group(backend="gloo", timeout=trainer.args.ddp_timeout_delta)
    return trainer.host_group


#: By number of the object: configs of models whose rows stand alone, or lie end to end by `segments`.
_CONFIGS: dict[int, Any] = {}


def look_for_no_packed_rows(model: PreTrainedModel) -> None:
    """Keep transformers from looking for packed rows in the positions of a model's batches.

    Where there is no attention mask it looks whether positions begin anew, and reads that from the device once a
    forward pass. Rows of this model lie end to end with `segments` only (tasks/trainer/packed_attention.py), and
    need no mask.
    """
    _CONFIGS.update({id(config): config for config in (model.config, model.config.get_text_config())})
    _patch_masks()


@cache
def _patch_masks() -> None:
    from transformers import masking_utils

    prepare = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if prepare is None:  # another version: it waits, and all else is the same
        return
    arguments = signature(prepare)

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        bound = arguments.bind(*args, **kwargs)
        if id(bound.arguments["config"]) in _CONFIGS:
            bound.arguments["position_ids"] = None
        return prepare(*bound.args, **bound.kwargs)

    masking_utils._preprocess_mask_arguments = without_positions


def places_of(shift_labels: torch.Tensor) -> torch.Tensor:
    """Where a batch (B, T) of labels without a shift left to do has any: places in its B * T tokens, (N,). On the host.

    On a device the number of places, and so the shape of what is chosen by a mask, must be read first.
    """
    places: torch.Tensor = (shift_labels.flatten() != IGNORED).nonzero()[:, 0]
    return places
