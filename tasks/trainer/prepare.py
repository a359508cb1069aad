"""What the process of a stage with a model sets before anything is loaded, and which GPUs it refuses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from smoltulu.tasks.limits import NVIDIA_GPUS
from smoltulu.tasks.models.folders import device_of
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.tracking import require_trackers


def prepare_torch(context: StageContext) -> None:
    """Settings of the process: threads, and no cuDNN attention where its gradients are wrong.

    ValueError where a tracker is not installed, or there are fewer GPUs than processes.
    """
    import torch
    import transformers

    require_trackers(context.compute.report_to)
    if context.compute.num_threads:
        torch.set_num_threads(context.compute.num_threads)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    has_driver = torch.version.cuda and NVIDIA_GPUS.is_dir()
    if context.compute.device != "cpu" and gpus and has_driver and not torch.cuda.is_available():
        raise ValueError(  # device auto would train on the CPU for weeks
            f"this stage was given the GPU {gpus} (CUDA_VISIBLE_DEVICES), and torch finds none there; look at "
            "nvidia-smi, name GPUs that are there, or set compute.device to cpu"
        )
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


def give_back_memory() -> None:
    """Have glibc give back what loaded models left on the host once they lie on a GPU: 4 bytes a parameter and process.

    The launcher tells it to keep large buffers, which speeds up trainings on a CPU.
    """
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)


def _check_num_gpus(num_gpus: int, num_processes: int) -> None:
    if num_processes > num_gpus:
        raise ValueError(
            f"compute.num_processes is {num_processes} and there are {num_gpus} GPUs; set it to at most {num_gpus}, or "
            "CUDA_VISIBLE_DEVICES to more of them"
        )


def _check_same_gpus(names: Sequence[str]) -> None:
    """ValueError where ranks would train on different cards: all wait for the slowest, and the smallest runs out."""
    if len(set(names)) > 1:
        cards = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
        raise ValueError(
            f"compute.num_processes is {len(names)}, and their GPUs are not alike ({cards}); set CUDA_VISIBLE_DEVICES "
            "to GPUs of one kind, and compute.num_processes to their number"
        )
