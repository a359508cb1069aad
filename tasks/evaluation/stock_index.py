"""lm-eval's index of its own 14,000 definitions: the same names, kinds, files and tags in a tenth of the time.

The index needs five fields of a file. Where they stand on a line of their own each, the file is not parsed; what is, is
parsed once, not once for every file that includes it. lm-eval parses a definition whole when it loads the task.
"""

from __future__ import annotations

import gc
import os.path
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FIELD = re.compile(rb'^"?(task|group|tag|class|include)"?[ \t]*:[ \t]*(.*?)[ \t\r]*$', re.MULTILINE)
#: At a line's beginning, these may give a field in another way.
_OTHER_FORM = re.compile(rb"""^(?:['?{\[!&*%<]|"(?!\w+"[ \t]*:))""", re.MULTILINE)
_PLAIN = re.compile(rb"(?:\.{1,2}/)*[A-Za-z_][\w./+-]*")
_QUOTED = re.compile(rb'"([\w./+-]+)"')
_NOT_TEXT = {b"true", b"false", b"yes", b"no", b"on", b"off", b"null", b"y", b"n"}


@contextmanager
def quick_index() -> Iterator[None]:
    """While it holds, lm-eval indexes definitions with our reader. What it does with what was read stays its own."""
    from lm_eval.tasks import _index

    own, _index.load_yaml = _index.load_yaml, _reader(os.path.dirname(_index.__file__))
    collects = gc.isenabled()
    gc.disable()  # nothing of what is read is garbage, and looking for some takes an eighth of the time
    try:
        yield
    finally:
        _index.load_yaml = own
        if collects:
            gc.enable()


def fields_of(text: bytes) -> dict[str, str] | None:
    """The fields that the index needs, of a definition in plain lines; None where it must be parsed.

    A group's members are none of them: only that it is a group.
    """
    found = _FIELD.findall(text)
    values = dict(found)
    if len(values) < len(found) or _OTHER_FORM.search(text):
        return None
    fields = {}
    for name, value in values.items():
        is_read = name != b"class" and (name != b"task" or b"group" not in values)
        if quoted := _QUOTED.fullmatch(value):
            value = quoted[1]
        elif is_read and (not _PLAIN.fullmatch(value) or value.lower() in _NOT_TEXT):
            return None
        fields[name.decode()] = value.decode()
    return fields


def _reader(stock: str) -> Any:
    """A `load_yaml` for the index. Files of the folder `stock` are known to be YAML; any other is parsed."""
    from lm_eval.tasks._yaml_loader import _Base

    class Loader(_Base):
        folder = ""

    Loader.add_constructor("!function", lambda loader, node: str(Path(loader.folder) / loader.construct_scalar(node)))
    known: dict[str, Any] = {}

    def read(path: str) -> Any:
        with open(path, "rb") as file:
            text = file.read()
        if path.startswith(stock) and (fields := fields_of(text)) is not None:
            return fields
        loader = Loader(text)
        loader.folder = os.path.dirname(path)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()

    def load_yaml(
        path: str | Path, *, resolve_func: bool = True, recursive: bool = True, seen: set[str] | None = None
    ) -> dict[str, Any]:
        assert not resolve_func and recursive, "the index asks for no functions, and for what a file includes"
        path, seen = os.path.normpath(path), set() if seen is None else seen
        if path in seen:  # the index leaves out whatever raises; lm-eval's reader also raises where two include a third
            raise ValueError(f"{path} is included twice")
        seen.add(path)
        if path not in known:
            known[path] = read(path)
        own = known[path]
        if not isinstance(own, dict):
            raise ValueError(f"{path} holds {type(own).__name__}, not a definition")
        merged: dict[str, Any] = {}
        includes = own.get("include", [])
        for include in includes if isinstance(includes, list) else [includes]:
            file = os.path.join(os.path.dirname(path), include)
            merged |= load_yaml(file, resolve_func=False, seen=seen)
            merged.pop("task_list", None)
        return merged | {name: value for name, value in own.items() if name != "include"}

    return load_yaml
