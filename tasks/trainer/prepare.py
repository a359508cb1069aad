"""What the process of a stage with a model sets before anything is loaded, and which GPUs it refuses."""

from __future__ import annotations

import os
from collections.abc import Sequence

from smoltulu.tasks.models.folders import device_of
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.tracking import require_trackers


def prepare_torch(context: StageContext) -> None:
    """Settings of the process: threads, and no cuDNN attention where its gradients are wrong.

    ValueError where a tracker is not installed, or the GPUs are not one to a process.
    """
    import torch
    import transformers

    require_trackers(context.compute.report_to)
    if context.compute.num_threads:
        torch.set_num_threads(context.compute.num_threads)
    if device_of(context.compute) == "cuda":
        # Not compute.num_processes: a stage that is no training has one process, whatever that says.
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        _check_num_gpus(torch.cuda.device_count(), num_ranks)
        _check_same_gpus([torch.cuda.get_device_name(number) for number in range(num_ranks)])
    # pytorch#196678 (found by trl#7181): NaN gradients with a mask, since 2.11 on; seen on an H200 with 2.11. Off from
    # that version on, until one is known to be fixed.
    if torch.cuda.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.utils.logging.disable_progress_bar()


def _check_num_gpus(num_gpus: int, num_processes: int) -> None:
    if num_processes > num_gpus:
        raise ValueError(
            f"compute.num_processes is {num_processes} and there are {num_gpus} GPUs; set it to at most {num_gpus}, or "
            "CUDA_VISIBLE_DEVICES to more of them"
        )
    if num_processes == 1 and num_gpus > 1:
        # Stages in processes of their own see one (tasks/engine/launch.py). transformers' trainer would spread a batch
        # over all it sees, and so multiply the effective batch.
        raise ValueError(
            f"one process sees {num_gpus} GPUs and would train on all of them with another effective batch; with "
            "compute.launcher inline set CUDA_VISIBLE_DEVICES to one of them"
        )


def _check_same_gpus(names: Sequence[str]) -> None:
    """ValueError where ranks would train on different cards: all wait for the slowest, and the smallest runs out."""
    if len(set(names)) > 1:
        cards = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
        raise ValueError(
            f"compute.num_processes is {len(names)}, and their GPUs are not alike ({cards}); set CUDA_VISIBLE_DEVICES "
            "to GPUs of one kind, and compute.num_processes to their number"
        )
