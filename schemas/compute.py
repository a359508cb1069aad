"""How stages are run. Nothing here enters an artifact key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from smoltulu.schemas.budget import largest_batch, most_ranks
from smoltulu.schemas.common import MAX_PATH, StrictModel, machinery


def _whole_tokens(value: Any) -> Any:
    if value in ("auto", "none", None) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(
        f"is {value!r:.60}; allowed are auto, none, or a whole number of tokens above 0: as many as a micro-batch may "
        "hold on one device"
    )


def _none_for_null(value: Any) -> Any:
    return "none" if value is None else _whole_tokens(value)


#: Tokens that a micro-batch may hold on one device.
TokensPerDevice = Literal["auto", "none"] | int
#: How the ranks of a training share its model: see tasks/trainer/sharded.py.
Parallel = Literal["ddp", "fsdp2"]


class StageCompute(StrictModel):
    """Per-stage exceptions from `compute`."""

    per_device_train_batch_size: int | None = machinery(None, ge=1)
    tokens_per_device: Annotated[TokensPerDevice | None, BeforeValidator(_whole_tokens)] = machinery(None)
    per_device_eval_batch_size: int | None = machinery(None, ge=1)
    save_steps: int | None = machinery(None, ge=1)
    logging_steps: int | None = machinery(None, ge=1)
    num_processes: int | None = machinery(None, ge=1)
    parallel: Parallel | None = machinery(None)
    num_threads: int | None = machinery(None, ge=1)
    host_memory_gb: float | None = machinery(None, gt=0)
    max_hours: float | None = machinery(None, gt=0)


class ComputeSettings(StrictModel):
    """One machine's shape."""

    store: str = machinery(
        "${SMOLTULU_STORE:-artifacts/store}",
        max_length=MAX_PATH,
        description="folder of the artifact store; ${VARIABLE:-default} is expanded",
    )
    remote: str | None = machinery(
        None,
        max_length=MAX_PATH,
        description="URL of a shared store (s3://bucket/folder, gs://, file:///...), which the local one then caches; "
        "${VARIABLE:-default} is expanded; credentials come from the environment, never from here",
    )
    allow_http: bool = machinery(
        False, description="take a shared store whose URL is not encrypted (http://), from another machine than this"
    )
    device: Literal["auto", "cpu", "cuda"] = machinery("auto")
    precision_fallback: bool = machinery(
        True, description="run bfloat16 stages in float32, with a warning, on devices without it"
    )
    num_processes: int = machinery(
        1,
        ge=1,
        description="training processes (GPUs) per stage; a training whose effective batch they do not divide takes "
        "the most of them that do, with a warning",
    )
    parallel: Parallel = machinery(
        "ddp",
        description="ddp: each process holds the whole training; fsdp2: a part of weights, gradients and optimizer, "
        "and it fetches a layer's weights when they are due. Steps and model are the same",
    )
    rank_timeout_minutes: float = machinery(
        30.0,
        gt=0,
        le=20_000,  # torch counts milliseconds as a C int: 35,791 minutes
        description="with several processes: minutes that one may keep the others waiting; then it is named, with its "
        "stack, and all are ended",
    )
    device_memory_gb: float | None = machinery(
        None, gt=0, description="memory of one device in 10^9 bytes: `plan` says which trainings cannot fit into it"
    )
    device_tflops: float | None = machinery(
        None, gt=0, description="10^12 FLOPs a second that one device sustains in training: `plan` estimates time from "
        "it where no similar stage was run"
    )  # fmt: skip
    num_threads: int | None = machinery(
        None, ge=1, description="CPU threads per stage process, and processes of the preflight; none: all cores"
    )
    host_memory_gb: float | None = machinery(
        None, gt=0, description="main memory of a stage in 10^9 bytes, as `smoltulu launch` asks a cluster for it; "
        "none: what the cluster gives"
    )  # fmt: skip
    per_device_train_batch_size: int = machinery(
        1,
        ge=1,
        description="gradient_accumulation_steps is derived from it; one that does not divide the effective batch is "
        "lowered, with a warning, to the largest that does",
    )
    tokens_per_device: Annotated[TokensPerDevice, BeforeValidator(_none_for_null)] = machinery(
        "none",
        description="SFT, reward model, DPO: a micro-batch holds rows of up to so many tokens, padding counted, in "
        "place of per_device_train_batch_size rows; an optimizer step holds the same rows. auto: as many tokens as the "
        "per_device_train_batch_size longest rows have",
    )
    per_device_eval_batch_size: int = machinery(8, ge=1)
    activation_checkpointing: bool = machinery(False, description="trade compute for memory")
    compile: bool = machinery(
        False,
        description="layers of trained models by torch.compile: fewer kernels, rounded otherwise; half a minute at the "
        "start; brings nothing on a CPU, not measured on a GPU",
    )
    packing: bool = machinery(
        True,
        description="SFT, reward model, DPO: rows of a micro-batch lie end to end instead of being padded, and each "
        "attends to itself only: the same mathematics, rounded otherwise",
    )
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = machinery(
        ("tensorboard",), description="where loss, learning rate, speed and memory go besides the artifact's history"
    )
    dataloader_num_workers: int | None = machinery(
        None, ge=0, description="processes of a training that make its batches ahead; none: one with a GPU, else 0"
    )
    generation_device: str | None = machinery(
        None,
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="rlvr.engine transformers: device of a copy of the policy, which writes, as cuda:1; none: no copy",
    )
    vllm_server: str | None = machinery(
        None,
        max_length=MAX_PATH,
        pattern=r"^https?://",
        description="rlvr.engine vllm: URL of a server on devices of its own (vllm serve); none: beside the training",
    )
    vllm_memory_share: float = machinery(
        0.3, gt=0, lt=1, description="rlvr.engine vllm beside the training: share of the device's memory that it takes"
    )
    vllm_sleep: bool = machinery(
        True, description="rlvr.engine vllm beside the training: it gives its memory back between rollouts"
    )
    save_steps: int = machinery(500, ge=1, description="optimizer steps between resumable checkpoints")
    save_total_limit: int = machinery(2, ge=1, description="newest checkpoints kept; the best is kept beside them")
    keep_extension_checkpoint: bool = machinery(
        True,
        description="with a `schedule`: keep the trainer checkpoint that a larger budget goes on from in the artifact, "
        "about three times the model's size",
    )
    logging_steps: int = machinery(10, ge=1)
    max_parallel_stages: int = machinery(
        1, ge=1, description="stages that may run side by side, e.g. reward model and DPO"
    )
    launcher: Literal["process", "warm", "inline"] = machinery(
        "process",
        description="warm: a fork of a process that has imported everything, and begins seconds sooner (sweeps); "
        "inline: in the flow's process, for debugging",
    )
    min_free_disk_gb: float = machinery(1.0, ge=0, description="a stage does not start with less free disk than this")
    max_hours: float | None = machinery(
        None,
        gt=0,
        description="hours that a stage may take in one run; then it is stopped, and the next run goes on from its "
        "checkpoint",
    )
    stages: dict[str, StageCompute] = machinery({}, description="exceptions per stage, by its name")

    @property
    def is_sharded(self) -> bool:
        """Whether a training is divided among its processes. One alone has nothing to divide."""
        return self.parallel == "fsdp2" and self.num_processes > 1

    @property
    def by_tokens(self) -> bool:
        """Whether trainings on rows cut their optimizer steps by tokens."""
        return self.tokens_per_device != "none"

    def of(self, stage: str, effective_batch_size: int | None = None) -> ComputeSettings:
        """These settings with the exceptions of `stage` applied.

        effective_batch_size  of a training: it runs on the most of its processes that divide it, each with the largest
                              per-device batch that does. That changes no result
        """
        exceptions = self.stages.get(stage)
        own = self if exceptions is None else self.model_copy(update=exceptions.model_dump(exclude_none=True))
        if effective_batch_size is None:
            return own
        num_ranks = most_ranks(own.num_processes, effective_batch_size)
        size = largest_batch(own.per_device_train_batch_size, effective_batch_size, num_ranks)
        fitting = {"num_processes": num_ranks, "per_device_train_batch_size": size}
        return own if fitting.items() <= dict(own).items() else own.model_copy(update=fitting)
