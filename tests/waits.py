"""Counts what would stop a process until its GPU has caught up, on a machine without one.

On a GPU, `torch.cuda.set_sync_debug_mode("error")` finds the same. Here two of torch's modes see the operations: one
those that reach the dispatcher (`item`, `bool`, `nonzero`, indexing by a mask, in the backward pass too), one the calls
that on a CPU do not (`tolist`, `numpy`, `cpu`), and numbers that are made a tensor of the device.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result, or its shape, is needed on the host.
_OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave", "_assert_async",
}  # fmt: skip
_METHODS = {"tolist", "numpy", "cpu", "__array__"}
_FACTORIES = {"tensor", "as_tensor", "new_tensor"}
#: Functions of ours that read what is on the host: file, name.
_OF_HOST = {
    ("waits.py", "places_of"),  # of a batch that is being made
    ("waits.py", "of_all_ranks"),  # gloo, from host to host
    ("waits.py", "tolist"),  # HostCopy: of the step before
}


class Waits:
    """What was seen, as "operation in function (file:line)"; `where` says into which list it goes now."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.where: str | None = None

    def note(self, operation: str) -> None:
        if self.where is None:
            return
        frames = traceback.extract_stack()
        if any((frame.filename.rpartition("/")[2], frame.name) in _OF_HOST for frame in frames):
            return
        if any("/data_loader.py" in frame.filename or "/dataloader.py" in frame.filename for frame in frames):
            return  # batches are made on the host
        of_torch = ("/torch/", "tests/waits.py")
        frame = [frame for frame in frames if not any(part in frame.filename for part in of_torch)][-1]
        where = f"{operation} in {frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"
        self.seen.setdefault(self.where, []).append(where)

    @contextlib.contextmanager
    def counted(self, where: str | None) -> Iterator[None]:
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with _Dispatched(self), _Called(self):
            yield


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _OPERATORS and not (name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None):
            self.waits.note(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.waits.note(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name in _METHODS:
            self.waits.note(name)
        is_placed = options.get("device") is not None or name == "new_tensor"
        if name in _FACTORIES and is_placed and not isinstance(args[name == "new_tensor"], torch.Tensor):
            self.waits.note(f"{name} on the device")
        return func(*args, **options)
