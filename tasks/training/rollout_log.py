"""What RLVR's rollouts were made of, for readers and tests: samples with rewards, and PPO's prompts of every batch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.keys import LOGS_FOLDER
from smoltulu.tasks.training.rewards import Score

#: One line a rollout batch: {"batch", "step", "rows"}, the lines of the rows that are trained on, in the order of use.
PROMPTS_FILE = f"{LOGS_FOLDER}/prompts.jsonl"
#: One line a completion: {"step", "id", "prompt", "completion", "verdict", "reward", "reason", ...}.
SAMPLES_FILE = f"{LOGS_FOLDER}/samples.jsonl"
#: Completions of a rollout batch that are kept, from so many batches of a training at most.
_NUM_SAMPLES, _NUM_BATCHES = 4, 250
_MAX_CHARACTERS = 4000


class RolloutLog:
    """The two files, in `work` while the training goes on; a resume drops what lies behind its checkpoint."""

    def __init__(self, work: Path, num_batches: int) -> None:
        self.prompts, self.samples = work / PROMPTS_FILE, work / SAMPLES_FILE
        self.every = -(-num_batches // _NUM_BATCHES)

    def begin(self, step: int) -> None:
        """Keep the lines of the steps before `step`. What a kill left half written goes too."""
        for file in (self.prompts, self.samples):
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                continue
            with file.open(encoding="utf-8", newline="\n") as stream:
                lines = list(stream)
            write_atomically(file, "".join(line for line in lines if (at := _step_of(line)) is not None and at < step))

    def add_prompts(self, batch: int, step: int, rows: Sequence[int]) -> None:
        """The prompts of a rollout batch, before its first optimizer step; `step`: of the last one before it."""
        _append(self.prompts, [{"batch": batch, "step": step, "rows": list(rows)}])

    def add_samples(self, batch: int, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """The first few `samples` (see `sample`), where this batch is one of those that are kept."""
        if batch % self.every == 0:
            _append(self.samples, [{"step": step, **one} for one, _ in zip(samples, range(_NUM_SAMPLES), strict=False)])

    def publish(self, folder: Path) -> str:
        """Copy what there is into the artifact. Returns the name of the file of samples."""
        (folder / LOGS_FOLDER).mkdir(exist_ok=True)
        for file in (self.prompts, self.samples):
            if file.exists():
                (folder / LOGS_FOLDER / file.name).write_bytes(file.read_bytes())
        return SAMPLES_FILE


def sample(row: Mapping[str, Any], text: str, num_tokens: int, stopped: bool, score: Score) -> dict[str, Any]:
    """What is kept of a rollout to a row {"id", "prompt", ...} of the data set."""
    return {
        "id": row["id"],
        "prompt": row["prompt"][-1]["content"][-_MAX_CHARACTERS:],
        "completion": text[:_MAX_CHARACTERS],
        "num_tokens": num_tokens,
        "stopped": stopped,
        "verdict": score.verdict,
        "reward": score.reward,
        "reason": score.reason,
    }


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


def _step_of(line: str) -> int | None:
    """The step of a whole line; None where it is none."""
    if not line.endswith("\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
