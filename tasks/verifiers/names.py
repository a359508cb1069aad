"""Names and versions of the verifiers, and the nearest to a name that nobody knows.

A name in a recipe or in a row may carry a version: `gsm8k@paper`. `paper` is the rule of open-instruct at the commit of
Tulu 3 (26b7325, December 2024) with its bugs; `fixed`, the default, is without them (docs/verifiers.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: Enters the key of every data set with RLVR rows. Raise it where a verdict on any row changes.
VERIFIERS_VERSION = "2"

#: Verifier -> its versions. The first is meant where none is named.
VERSIONS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("fixed", "paper"),
    "gsm8k_strict": ("fixed",),
    "math": ("fixed", "paper"),
    "ifeval": ("fixed", "paper"),
    "constraint": ("fixed",),
    "exact_match": ("fixed",),
    "format": ("fixed",),
}


def canonical_name(name: str) -> str:
    """The one spelling of a verifier: lower case, without `@fixed`.

    Raises:
        ValueError: unknown verifier, or one without that version; with the nearest name and all that are known.
    """
    verifier, mark, version = str(name).strip().lower().partition("@")
    if verifier not in VERSIONS:
        raise ValueError(
            f"unknown verifier {str(name)[:60]!r}{did_you_mean(verifier, VERSIONS)}; known are {', '.join(VERSIONS)}. "
            "Map the data's name to one of these with the source's `verifiers`, or drop its rows"
        )
    if mark and version not in VERSIONS[verifier]:
        known = ", ".join(f"{verifier}@{known}" for known in VERSIONS[verifier])
        raise ValueError(
            f"verifier {verifier!r} has no version {version[:60]!r}{did_you_mean(version, VERSIONS[verifier])}; there "
            f"is {known}"
        )
    return f"{verifier}@{version}" if version and version != VERSIONS[verifier][0] else verifier


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where a known name is near, else nothing."""
    near = get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
