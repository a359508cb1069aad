"""Modules of ours that were imported twice: beside `smoltulu.tasks` also as `tasks`, say, with classes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests import ROOT

TOPS = ("flows", "tasks", "artifacts", "schemas", "recipes")
#: Prefect loads an entrypoint that is given as a file under a name of its own. Its imports are ours all the same, and
#: nothing in these files is held or compared across modules: a second copy of them changes nothing.
ENTRYPOINTS = {
    ROOT / entry["entrypoint"].partition(":")[0]
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
}
#: lm-eval loads what lies beside its task definitions under the file's path. Functions only, nothing is held there.
BY_LM_EVAL = ROOT / "recipes" / "lm_eval"


def second_copies() -> list[str]:
    """`name (file)` of every module in this process that is ours, but not the one that is imported by its full name."""
    found = []
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/").resolve()
        if not any(path.is_relative_to(ROOT / top) for top in TOPS) or path in ENTRYPOINTS or path.parent == BY_LM_EVAL:
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        whole = ".".join(("smoltulu", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        # What runs as a program is there under that name only, unless somebody imports it besides.
        alone = name in ("__main__", "__mp_main__") and whole not in sys.modules
        if sys.modules.get(whole) is not module and not alone:
            found.append(f"{name} ({path})")
    return found
