"""Where state, store and reports lie. Light: every command asks."""

from __future__ import annotations

import os
from pathlib import Path

from smoltulu.recipes import CHECKOUT
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_path

_STATE = ".smoltulu"


def find_project(here: Path) -> Path:
    """The nearest folder, from `here` upwards, that has state of ours, else `here`."""
    return next((folder for folder in (here, *here.parents) if (folder / _STATE).is_dir()), here)


#: The folder in which flows run, where relative paths outside recipe files start. The checkout; installed, the folder
#: in which `smoltulu up` was called, also from below it, and else the working folder.
PROJECT = CHECKOUT or find_project(Path.cwd())


def default_home() -> Path:
    """Folder of the background processes' state: `$SMOLTULU_HOME`, else `.smoltulu` in the project."""
    return Path(os.environ.get("SMOLTULU_HOME") or PROJECT / _STATE).absolute()


def store_root() -> Path:
    """Where artifacts go unless a recipe says otherwise; relative paths start at the project, as in a flow run."""
    return PROJECT / expand_path(ComputeSettings().store)
