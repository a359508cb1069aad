"""How fast MATH answers are graded: by text in one process, by value in workers, and by math-verify alone.

    python benchmarks/verifiers.py [--workers 2] [--rounds 3]

Real answers: the 5,000 solutions of MATH's test set (SMOLTULU_REAL_DATA, default ../shared/data). Four inputs:

- own: each solution against its own answer, what a trained model mostly writes;
- other: each answer in another spelling (`\\frac12`, `1/2`, `x = …`, units) against the original;
- shuffled: each answer against that of another row, where the text can tell;
- symbolic: distinct pairs that the text cannot tell, for the workers, all of them busy.

math-verify grades some of the same answers in this process, as it comes: parse and verify, every text only once, so
that nothing comes from its cache. Prints Markdown and every goal, met or NOT met.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from smoltulu.tasks.verifiers import Graders
from smoltulu.tasks.verifiers.answers import last_boxed
from smoltulu.tasks.verifiers.math import expected_answers
from smoltulu.tasks.verifiers.rules import grade_quickly

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
MIN_TEXT, MIN_SYMBOLIC, MIN_VERIFIED = 5_000, 40, 0.998

Pair = tuple[str, str]  # completion, ground truth


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with gzip.open(DATA / "eval" / "math_test.jsonl.gz", "rt", encoding="utf-8") as file:
        solutions = [json.loads(line)["solution"] for line in file]
    golds = [last_boxed(solution) or "" for solution in solutions]
    others = random.Random(0).sample(golds, len(golds))
    shuffled = [(boxed(gold), truth) for gold, truth in zip(golds, others, strict=True)]
    own = list(zip(solutions, golds, strict=True))
    other = [(boxed(spelling), gold) for gold in golds for spelling in spellings(gold) if spelling != gold]
    by_text = [pair for pair in shuffled if grade_quickly("math", *pair) is not None]
    by_value = distinct([pair for pair in shuffled if grade_quickly("math", *pair) is None])

    print("| answers | number | right | per second and core | math-verify alone | ratio |\n|---|---|---|---|---|---|")
    speeds = {}
    for name, pairs in (("own", own), ("other", other), ("shuffled", by_text)):
        speeds[name] = statistics.median(text_speed(pairs) for _ in range(arguments.rounds))
        num_right = sum(right(grade_quickly("math", *pair)) for pair in pairs)
        peer = peer_speed(random.Random(1).sample(distinct(pairs), 300))
        speed = speeds[name]
        print(f"| {name} | {len(pairs):,} | {num_right:,} | {speed:,.0f} | {peer:.0f} | {speed / peer:,.0f} |")
    speed, num_right = symbolic_speed(by_value, arguments.workers)
    peer = peer_speed(by_value[:300])
    measured = f"{speed:.0f} per worker | {peer:.0f} | {speed / peer:.2f}"
    print(f"| symbolic, {arguments.workers} workers | {len(by_value):,} | {num_right} | {measured} |\n")
    share = sum(right(grade_quickly("math", *pair)) for pair in own) / len(own)
    for text, value, goal in (
        ("text, own answers per second and core", speeds["own"], MIN_TEXT),
        ("text, answers in other spellings per second and core", speeds["other"], MIN_TEXT),
        ("symbolic, distinct answers per second and worker, all busy", speed, MIN_SYMBOLIC),
        ("share of solutions that verify against their own answer", share, MIN_VERIFIED),
    ):
        print(f"- {'met' if value >= goal else 'NOT met'}: {text} ≥ {goal:,} (measured {value:,.4g})")


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def spellings(gold: str) -> list[str]:
    """Other spellings of an answer that the text alone decides."""
    return [
        re.sub(r"\\[dt]?frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold),
        re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold),
        re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold),
        gold.replace("(", "\\left(").replace(")", "\\right)"),
        f"x = {gold}",
        rf"{gold}\text{{ cm}}",
    ]


def distinct(pairs: list[Pair]) -> list[Pair]:
    """Pairs no two of which have an answer in common: nothing comes from a cache."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        if not seen & set(pair):
            kept.append(pair)
            seen |= set(pair)
    return kept


def right(verdict: object) -> bool:
    return verdict is not None and verdict.outcome == "right"  # type: ignore[attr-defined]


def text_speed(pairs: list[Pair]) -> float:
    """Answers per second of processor time. Ground truths are read anew: a training would read each once."""
    expected_answers.cache_clear()
    return len(pairs) / seconds(lambda: [grade_quickly("math", *pair) for pair in pairs], time.process_time)


def symbolic_speed(pairs: list[Pair], num_workers: int) -> tuple[float, int]:
    """Distinct answers per second and worker on the clock, after the workers have started; and how many were right."""
    with Graders(num_workers) as graders:
        graders.grade_all([("math", boxed(f"x+{number}"), f"{number}+x+0") for number in range(2 * num_workers)])
        verdicts = []
        wall = seconds(lambda: verdicts.extend(graders.grade_all(("math", *pair) for pair in pairs)), time.perf_counter)
    return len(pairs) / wall / num_workers, sum(map(right, verdicts))


def peer_speed(pairs: list[Pair]) -> float:
    """math-verify as its README has it, on the same answers: per second of processor time."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def grade_all() -> None:
        for completion, truth in pairs:
            verify(parse(f"${truth}$"), parse(completion))

    parse("$\\frac{x}{2}$")  # its tables are built with the first expression
    return len(pairs) / seconds(grade_all, time.process_time)


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begun = clock()
    work()
    return clock() - begun


if __name__ == "__main__":
    main()
