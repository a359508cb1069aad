"""What a machine does in a second, as `smoltulu doctor --gpu` measured it. Enters no key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smoltulu.schemas.common import StrictModel

Rate = Annotated[float, Field(gt=0)]


class TrainRate(StrictModel):
    """Optimizer steps of a Llama with these layers: forward, backward, clipping and AdamW, in the precision named."""

    flops_per_second: Rate = Field(description="6 FLOPs a parameter and token, embeddings included, as `plan` counts")
    precision: Literal["bfloat16", "float32"]
    hidden_size: int = Field(ge=1)
    num_parameters: int = Field(ge=1)
    num_tokens: int = Field(ge=1, description="of a micro-batch, one row after the other without padding")
    peak_memory_bytes: int | None = Field(None, ge=0, description="of the device; none on a CPU")


class DecodeRate(StrictModel):
    """Steps of one token for each row, with a key-value cache."""

    seconds_per_parameter: Rate = Field(description="of one such step")
    num_rows: int = Field(ge=1)
    num_parameters: int = Field(ge=1)


class MachineRates(StrictModel):
    """Rates of one device of this machine, and of the disk below the store. None: `not_measured` says why."""

    device: Literal["cuda", "cpu"]
    name: str = Field(description="of the device")
    num_devices: int = Field(ge=1)
    memory_bytes: int = Field(ge=1, description="of one device; of the machine, on a CPU")
    copy_bytes_per_second: Rate | None = Field(None, description="memory of the device, read and written")
    host_copy_bytes_per_second: Rate | None = Field(None, description="pinned main memory to the device")
    matmul_flops_per_second: dict[Literal["bfloat16", "float32"], Rate] = Field({})
    attention_flops_per_second: Rate | None = Field(None, description="causal, forward and backward")
    train: TrainRate | None = None
    decode: DecodeRate | None = None
    disk_write_bytes_per_second: Rate | None = Field(None, description="written and synced")
    disk_read_bytes_per_second: Rate | None = Field(None, description="past the page cache where the system allows")
    small_file_seconds: Rate | None = Field(None, description="a file of 4 kB written, synced and renamed")
    folder: str = Field("", description="that the disk was measured in")
    not_measured: dict[str, str] = Field({}, description="rate -> why")
    num_threads: int = Field(ge=1)
    host: str
    torch: str
    measured_at: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(ge=0, description="that all of it took")
