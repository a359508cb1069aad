"""JSON of any shape, and JSON that is nearly right: what a store may hold after damage or ill will."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

_WORDS = ("", ".", "..", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "é", "gen-0001", "0" * 64, "sft", "x" * 5000)
_NUMBERS = (0, -1, 1, 2, 99, 2**31, 2**63, 10**400, 1e308, -1e308, 5e-324, float("inf"), float("nan"))
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.integers(), st.floats(), st.sampled_from(_WORDS), st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS) | st.text(), inner),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, inner in items for place in _places(inner, (*path, name)))]


@st.composite
def nearly(draw: st.DrawFn, valid: Any) -> Any:
    """A value with one to three places replaced, removed, or added to."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)[1:]
        if not places:  # all of it was removed
            return draw(values)
        *above, last = draw(st.sampled_from(places))
        holder = value
        for name in above:
            holder = holder[name]
        what = draw(st.sampled_from(("replace", "remove", "add")))
        if what == "remove":
            del holder[last]
        elif what == "replace":
            holder[last] = draw(values)
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(_WORDS))] = draw(values)
    return value


@st.composite
def texts(draw: st.DrawFn, valid: Any) -> bytes:
    """Bytes of such a file: mostly JSON, of about the right shape or of any; sometimes no JSON at all."""
    kind = draw(st.sampled_from(("nearly", "nearly", "nearly", "any", "bytes", "deep")))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "deep":
        depth = draw(st.sampled_from((50, 150, 900, 3000, 100_000)))
        opening, closing = draw(st.sampled_from((("[", "]"), ('{"a":', "}"))))
        return (opening * depth + "0" + closing * depth).encode()
    return json.dumps(draw(nearly(valid) if kind == "nearly" else values)).encode(errors="surrogatepass")
