"""`python -m tests.faults.simulated`: schedules by their seeds, then calls of a process that fail."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.faults.simulated.schedules import Outcome, errors, try_error, try_schedule


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulated", description=__doc__)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the others follow")
    parser.add_argument("--errors", type=int, default=2000, help="failing calls, drawn by the seed; 0: every one")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with ProcessPoolExecutor(given.jobs) as pool:
        seeds = range(given.seed, given.seed + given.schedules)
        told = _tell("schedules", list(pool.map(try_schedule, seeds, chunksize=50)))
        calls = errors()
        if given.errors:
            calls = random.Random(given.seed).sample(calls, min(given.errors, len(calls)))
        told += _tell("failing calls", list(pool.map(_try_error, calls, chunksize=50)))
    print(f"{time.monotonic() - began:.0f} s, seeds from {given.seed}")
    return 1 if told else 0


def _try_error(one: tuple[str, int, int | None, bool]) -> Outcome:
    return try_error(*one)


def _tell(title: str, outcomes: list[Outcome]) -> int:
    """A table of what happened; how many went wrong."""
    happened = Counter(what.partition(" ")[0] for outcome in outcomes for what in outcome.happened)
    counts = ", ".join(f"{num} {what}" for what, num in sorted(happened.items()))
    wrong = [outcome for outcome in outcomes if outcome.problems]
    days = sum(outcome.seconds for outcome in outcomes) / 86_400
    print(f"{len(outcomes):,} {title}, {days:.1f} days of virtual time ({counts}): {len(wrong)} wrong", flush=True)
    for outcome in wrong[:20]:
        print(f"  {outcome.line()}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
