"""Sends a training's metrics to trackers besides the artifact's history: TensorBoard, trackio, Weights & Biases.

Their files lie below `logs/` of the artifact. A training that resumes from a checkpoint starts new files and writes the
earlier metrics into them, so that they hold every step once. Nothing leaves the machine unless the environment asks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.keys import LOGS_FOLDER

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

logger = logging.getLogger("smoltulu")
PROJECT = "smoltulu"


class Tracker(Protocol):
    """A place for metrics."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


def require_trackers(names: Sequence[str]) -> None:
    """ValueError where the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"compute.report_to names {name}, which is not installed: pip install 'smoltulu[tracking]', or take it "
                "out of compute.report_to"
            )


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class Trackio:
    """A SQLite file, written by a thread of this process; no server runs. TRACKIO_SPACE_ID sends it to a Space too."""

    def __init__(self, folder: Path, run_name: str) -> None:
        wanted = os.environ.get("TRACKIO_DIR")
        # Read where trackio is imported, once.
        os.environ["TRACKIO_DIR"] = wanted or str(folder / "trackio")
        import trackio

        if wanted is None and os.environ.pop("TRACKIO_DIR") != str(trackio.utils.TRACKIO_DIR):
            raise ValueError(
                f"trackio keeps to one folder per process, here {trackio.utils.TRACKIO_DIR}: set compute.launcher to "
                "process, or TRACKIO_DIR to one folder for all runs"
            )
        # System metrics would be sampled by one more thread; peak memory is logged anyway.
        self.run = trackio.init(
            project=PROJECT, name=run_name, resume="never", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
        self.trackio = trackio

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.trackio.finish()


class WeightsAndBiases:
    """Online only if WANDB_MODE or WANDB_API_KEY is set and the server answers; `wandb sync` uploads a run later."""

    def __init__(self, folder: Path, run_name: str, run_id: str) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.folder = folder / "wandb"
        # wandb's own log; it would lie in the home folder.
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "cache"))

        def begin(mode: Any) -> Any:
            # The same id after a resume, so that the run continues.
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(folder),
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )

        try:
            self.run = begin(mode)
        except Exception as error:  # wandb's own have no common base
            if mode == "offline":
                raise
            logger.warning("wandb: %s; goes on offline: `wandb sync` sends it later", str(error).partition("\n")[0])
            wandb.teardown()  # it still holds the id
            self.run = begin("offline")

    def log(self, step: int, values: dict[str, float]) -> None:
        if step >= self.run.step:  # wandb would warn of every step that it has already
            self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()
        for path in self.folder.rglob("*"):
            if path.is_symlink():  # to the newest run, to its own log: an artifact holds plain files only
                path.unlink()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, run_id: str) -> list[Tracker]:
    """The trackers of `compute.report_to`, which write below `folder`. All attempts at a training share `run_id`."""
    made: list[Tracker] = []
    if "tensorboard" in names:
        made.append(TensorBoard(folder))
    if "trackio" in names:
        made.append(Trackio(folder, run_name))
    if "wandb" in names:
        made.append(WeightsAndBiases(folder, run_name, run_id))
    return made


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a logged entry, without the step."""
    return {name: float(value) for name, value in entry.items() if isinstance(value, (int, float)) and name != "step"}


def _run_id(work: Path, run_name: str) -> str:
    """The id stored in `work`. A resume uses it again, a training that starts over gets a new one."""
    file = work / "run_id"
    if not file.exists():
        write_atomically(file, f"{run_name}-{secrets.token_hex(4)}")
    return file.read_text()


def trackers(names: Sequence[str], folder: Path, work: Path) -> TrainerCallback:
    """A callback that sends the metrics of the main process to all trackers. `folder`, `work`: those of the stage."""
    from transformers import TrainerCallback

    # store/<stage>/<key>/work
    run_name = f"{work.parent.parent.name}-{work.parent.name[:12]}"

    class Trackers(TrainerCallback):
        def __init__(self) -> None:
            self.open: list[Tracker] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            logs = folder / LOGS_FOLDER
            logs.mkdir(exist_ok=True)
            self.open = open_trackers(names, logs, run_name, _run_id(work, run_name))
            for entry in state.log_history:
                self.log(entry["step"], entry)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.log(state.global_step, logs or {})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for tracker in self.open:
                tracker.finish()

        def log(self, step: int, entry: dict[str, Any]) -> None:
            if "train_runtime" not in entry:
                values = {f"train/{name}": value for name, value in numbers(entry).items()}
                for tracker in tuple(self.open):
                    try:
                        tracker.log(step, values)
                    except Exception as error:  # a chart must not end a training of days
                        logger.warning("%s takes no more metrics: %s", type(tracker).__name__, error)
                        self.open.remove(tracker)

    return Trackers()


def num_tokens(trainer: Trainer) -> int:
    """Tokens trained on, those before a resume included. GRPO counts them in the state, the other trainers in TRL."""
    return max(int(trainer.state.num_input_tokens_seen), getattr(trainer, "_total_train_tokens", 0))


def speed_and_memory(trainer: Trainer) -> TrainerCallback:
    """Have the trainer log the tokens seen, tokens per second since it started, and peak memory.

    TRL's count of tokens is kept in the checkpoints: without it SFT, reward model and DPO resume at zero.
    """
    from transformers import TrainerCallback

    log_of_trainer = trainer.log

    class TokenCount(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if hasattr(trainer, "_total_train_tokens"):
                trainer._total_train_tokens = int(state.num_input_tokens_seen)
            self.began, self.num_tokens_before = time.monotonic(), num_tokens(trainer)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.num_input_tokens_seen = num_tokens(trainer)

    count = TokenCount()

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["num_tokens"] = num_tokens(trainer)
            seconds, tokens = time.monotonic() - count.began, logs["num_tokens"] - count.num_tokens_before
            seconds -= getattr(trainer, "seconds_held_out", 0.0)
            if seconds > 0 and tokens > 0:
                logs["tokens_per_second"] = tokens / seconds
            logs["peak_memory_gb"] = peak_memory_bytes(trainer.args.device.type) / 1e9
        log_of_trainer(logs, *args, **kwargs)

    trainer.log = log
    return count


def peak_memory_bytes(device: str) -> int:
    """Highest allocated memory of a GPU; on a CPU the highest resident memory of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        # getrusage would begin with what the process that started this one had.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
