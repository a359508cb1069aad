"""The store that a recipe names."""

from __future__ import annotations

from smoltulu.artifacts.store import Store
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_path, expand_text


def open_store(compute: ComputeSettings, checked: bool = True) -> Store:
    """The store of `compute`, with the shared one behind it where `compute.remote` names one.

    checked  try at once what a run needs of the shared store. Raises ValueError where it cannot be used.
    """
    root = expand_path(compute.store)
    if compute.remote is None:
        return Store(root)
    from smoltulu.artifacts.shared.door import Remote, SharedStore

    store = SharedStore(root, Remote(expand_text(compute.remote), allow_http=compute.allow_http))
    if checked:
        store.remote.check(writing=store.remote.writable)
    return store
