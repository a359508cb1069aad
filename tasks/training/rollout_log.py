"""What a training's rollouts were made of, for readers and tests: prompts of every batch, and samples with rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.keys import LOGS_FOLDER

if TYPE_CHECKING:
    from smoltulu.tasks.training.ppo_batch import Episode

#: One line a rollout batch: {"batch", "step", "rows"}, the rows of the preflight in the order in which they were used.
PROMPTS_FILE = f"{LOGS_FOLDER}/prompts.jsonl"
#: One line a completion: {"step", "row", "prompt", "completion", "verdict", "reward", ...}.
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
            lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
            write_atomically(file, "".join(line for line in lines if (at := _step_of(line)) is not None and at < step))

    def add(self, batch: int, step: int, rows: Sequence[int], episodes: Sequence[Episode]) -> None:
        """A rollout batch, before its first optimizer step; `step`: of the last one before it."""
        _append(self.prompts, [{"batch": batch, "step": step, "rows": list(rows)}])
        if batch % self.every == 0:
            _append(self.samples, [_sample(step, episode) for episode in episodes[:_NUM_SAMPLES]])

    def publish(self, folder: Path) -> None:
        """Copy both into the artifact."""
        (folder / LOGS_FOLDER).mkdir(exist_ok=True)
        for file in (self.prompts, self.samples):
            (folder / LOGS_FOLDER / file.name).write_bytes(file.read_bytes())


def _sample(step: int, episode: Episode) -> dict[str, Any]:
    score = episode["score"]
    return {
        "step": step,
        "row": episode["row"],
        "prompt": episode["prompt"][-1]["content"][-_MAX_CHARACTERS:],
        "completion": episode["text"][:_MAX_CHARACTERS],
        "num_tokens": len(episode["ids"]),
        "stopped": episode["stopped"],
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
