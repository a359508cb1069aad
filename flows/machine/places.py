"""Paths of state, store and reports. Imports little: every command needs it."""

from __future__ import annotations

import os
from pathlib import Path

from smoltulu.recipes import CHECKOUT
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_path

_STATE = ".smoltulu"


def find_project(here: Path) -> Path:
    """The nearest folder, from `here` upwards to the home folder, that has this user's state, else `here`.

    State of another user is ignored: in a folder that all may write to, it would decide what our worker runs.
    """
    above = [here, *here.parents]
    if (home := Path.home()) in above:
        above = above[: above.index(home)] or [here]
    return next((folder for folder in above if _is_ours(folder / _STATE)), here)


def _is_ours(folder: Path) -> bool:
    try:
        return folder.is_dir() and folder.stat().st_uid == os.getuid()
    except OSError:
        return False


#: The folder in which flows run. Relative paths outside recipe files start here. It is the checkout. Installed, it is
#: the folder in which `smoltulu up` was called, if that is the working folder or above it, else the working folder.
PROJECT = CHECKOUT or find_project(Path.cwd())


def default_home() -> Path:
    """Folder of the background processes' state: `$SMOLTULU_HOME`, else `.smoltulu` in the project."""
    return Path(os.environ.get("SMOLTULU_HOME") or PROJECT / _STATE).resolve()


def store_root() -> Path:
    """The default store of recipes. A relative path starts at the project, as in a flow run."""
    return PROJECT / expand_path(ComputeSettings().store)
