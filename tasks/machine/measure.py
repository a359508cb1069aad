"""Measures this machine: `python -m smoltulu.tasks.machine.measure FOLDER` prints `MachineRates` as JSON.

Everything is repeated until its share of the time is over, and the fastest repetition counts: others that use the
machine only ever make it slower. Bandwidths count bytes read and written (as STREAM does). A matrix product has 2 n^3
FLOPs, causal attention 2 * 2 * n^2 * d * heads / 2 forward and 2.5 times that backward (FlashAttention-2, arXiv
2307.08691, section 4.1).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.machine import DecodeRate, MachineRates, TrainRate
from smoltulu.tasks.limits import memory, num_cores

if TYPE_CHECKING:
    import torch

SECONDS = 110.0
#: Shares of the time, in the order of the parts.
_SHARES = {"disk": 0.15, "copy": 0.05, "host copy": 0.05, "matmul": 0.2, "attention": 0.1, "train": 0.3, "decode": 0.15}
_MIN_REPEATS, _MAX_REPEATS = 3, 50
#: (hidden size, intermediate size, heads) of layers that models of the field have, the largest first: SmolLM2-1.7B,
#: 360M and 135M, and two for machines that could not do a step of these.
SHAPES = ((2048, 8192, 32), (960, 2560, 15), (576, 1536, 9), (256, 1024, 4), (64, 256, 2))
_NUM_LAYERS, _VOCAB = 2, 8192
_ROW = 1024  # tokens of a row
_DECODE_ROWS, _DECODE_STEPS = 16, 16


def fastest(act: Callable[[], Any], sync: Callable[[], None], seconds: float) -> float:
    """Seconds of the fastest of several repetitions, after one to warm up; as many as the time allows, at least one."""
    began = time.perf_counter()
    act()
    sync()
    best = math.inf
    for number in range(_MAX_REPEATS):
        start = time.perf_counter()
        if number >= 1 and start - began > seconds:
            break
        act()
        sync()
        best = min(best, time.perf_counter() - start)
    return best


def shape_for(flops_per_second: float, seconds: float) -> tuple[tuple[int, int, int], int]:
    """The largest layers of which a training step ends in time, and the tokens of that step.

    flops_per_second: of a matrix product, of which a step is taken to reach a quarter
    """
    for shape in SHAPES:
        for num_rows in (8, 4, 2, 1):
            num_tokens = num_rows * _ROW
            if 6 * num_parameters(shape) * num_tokens <= flops_per_second / 4 * seconds:
                return shape, num_tokens
    return SHAPES[-1], _ROW


def num_parameters(shape: tuple[int, int, int]) -> int:
    """Of the model that is measured: tied embeddings, layers, norms."""
    hidden, intermediate, _ = shape
    return _VOCAB * hidden + _NUM_LAYERS * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden) + hidden


def attention_flops(num_tokens: int, head_size: int, num_heads: int, num_rows: int) -> float:
    """Forward and backward, causal."""
    return 3.5 * 2 * 2 * num_rows * num_heads * head_size * num_tokens**2 / 2


class Machine:
    """The device, and how to wait for it."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        self.is_gpu = device == "cuda"
        self.sync: Callable[[], None] = torch.cuda.synchronize if self.is_gpu else lambda: None
        is_bfloat16 = self.is_gpu and torch.cuda.is_bf16_supported()
        self.dtypes: list[torch.dtype] = [torch.bfloat16, torch.float32] if is_bfloat16 else [torch.float32]

    def copy(self, seconds: float) -> float:
        """Bytes a second of a copy within the device's memory."""
        import torch

        num = (1 << 30 if self.is_gpu else 1 << 27) // 4
        source, target = torch.ones(num, device=self.device), torch.empty(num, device=self.device)
        return 2 * 4 * num / fastest(lambda: target.copy_(source), self.sync, seconds)

    def host_copy(self, seconds: float) -> float:
        """Bytes a second from pinned main memory to the device."""
        import torch

        if not self.is_gpu:
            raise _NotHere("there is no GPU")
        num = (1 << 28) // 4
        source, target = torch.ones(num).pin_memory(), torch.empty(num, device=self.device)
        return 4 * num / fastest(lambda: target.copy_(source, non_blocking=True), self.sync, seconds)

    def matmul(self, seconds: float) -> dict[str, float]:
        """FLOPs a second of a square matrix product, by precision: at the size that takes a twentieth of the time."""
        import torch

        found = {}
        for dtype in self.dtypes:
            num, share = 512, seconds / len(self.dtypes)
            while True:
                left = torch.randn(num, num, device=self.device).to(dtype)
                right = torch.randn(num, num, device=self.device).to(dtype)
                took = fastest(lambda a=left, b=right: a @ b, self.sync, share / 8)  # type: ignore[misc]
                if took > share / 20 or num == 8192:
                    break
                num *= 2
            found[str(dtype).removeprefix("torch.")] = 2 * num**3 / took
        return found

    def attention(self, seconds: float) -> float:
        """FLOPs a second of causal attention, forward and backward, as torch's SDPA does it."""
        import torch

        heads, size, tokens = (32, 64, 4096) if self.is_gpu else (4, 64, 512)
        parts = [
            torch.randn(1, heads, tokens, size, device=self.device, dtype=self.dtypes[0], requires_grad=True)
            for _ in range(3)
        ]

        def act() -> None:
            made = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            made.sum().backward()

        return attention_flops(tokens, size, heads, 1) / fastest(act, self.sync, seconds)

    def train(self, seconds: float, flops_per_second: float) -> TrainRate:
        """Optimizer steps of a model with the largest layers that end in time; half the rows where memory runs out."""
        import torch

        shape, num_tokens = shape_for(flops_per_second, seconds / 6)
        while True:
            try:
                return self._train(shape, num_tokens, seconds)
            except torch.OutOfMemoryError:
                if num_tokens <= _ROW:
                    raise
                num_tokens //= 2

    def _train(self, shape: tuple[int, int, int], num_tokens: int, seconds: float) -> TrainRate:
        import torch

        model = self._model(shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=self.is_gpu)
        ids = torch.randint(_VOCAB, (num_tokens // _ROW, _ROW), device=self.device)

        def act() -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtypes[0] == torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        took, size = fastest(act, self.sync, seconds), sum(one.numel() for one in model.parameters())
        return TrainRate(
            flops_per_second=6 * size * num_tokens / took,
            precision="bfloat16" if self.dtypes[0] == torch.bfloat16 else "float32",
            hidden_size=shape[0],
            num_parameters=size,
            num_tokens=num_tokens,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if self.is_gpu else None,
        )

    def decode(self, seconds: float, shape: tuple[int, int, int]) -> DecodeRate:
        """Steps of one token a row after a row's beginning, by transformers with its cache."""
        import torch

        model = self._model(shape).eval()
        ids = torch.randint(_VOCAB, (_DECODE_ROWS, 128), device=self.device)

        def act() -> None:
            with (
                torch.no_grad(),  # as tasks/generation/loop.py
                torch.autocast(self.device, torch.bfloat16, enabled=self.dtypes[0] == torch.bfloat16),
            ):
                cache, token = first.past_key_values, ids[:, -1:]
                for _ in range(_DECODE_STEPS):
                    made = model(input_ids=token, past_key_values=cache, use_cache=True)
                    cache, token = made.past_key_values, made.logits[:, -1:].argmax(-1)
                cache.crop(-_DECODE_STEPS)

        with torch.no_grad():
            first = model(input_ids=ids, use_cache=True)
        took, size = fastest(act, self.sync, seconds) / _DECODE_STEPS, sum(one.numel() for one in model.parameters())
        return DecodeRate(seconds_per_parameter=took / size, num_rows=_DECODE_ROWS, num_parameters=size)

    def _model(self, shape: tuple[int, int, int]) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, intermediate, heads = shape
        config = LlamaConfig(
            vocab_size=_VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
            num_key_value_heads=heads, num_hidden_layers=_NUM_LAYERS, max_position_embeddings=2 * _ROW,
            tie_word_embeddings=True, attn_implementation="sdpa",
        )  # fmt: skip
        return LlamaForCausalLM(config).to(self.device)


class _NotHere(Exception):
    """Why something cannot be measured on this machine."""


def disk(folder: Path, seconds: float) -> tuple[float, float, float]:
    """(bytes a second written and synced, read, seconds of a small file) in a folder."""
    block = os.urandom(1 << 24)  # 16 MiB; zeros some file systems do not store
    with tempfile.TemporaryDirectory(dir=folder, prefix=".smoltulu-doctor-") as name:
        place = Path(name)
        began, num = time.perf_counter(), 0
        with (place / "large").open("wb") as file:
            # Enough to get past a controller's cache, and no more than the time or 4 GiB.
            while num < 256 and (num < 4 or time.perf_counter() - began < seconds / 3):
                file.write(block)
                num += 1
            file.flush()
            os.fsync(file.fileno())
        written = num * len(block) / (time.perf_counter() - began)
        with (place / "large").open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began, num_read = time.perf_counter(), 0
            while part := file.read(1 << 24):
                num_read += len(part)
        read = num_read / (time.perf_counter() - began)
        times: list[float] = []
        while len(times) < 5 or (len(times) < 200 and sum(times) < seconds / 3):
            start = time.perf_counter()
            with (place / "draft").open("wb") as file:
                file.write(block[:4096])
                file.flush()
                os.fsync(file.fileno())
            os.replace(place / "draft", place / "small")
            times.append(time.perf_counter() - start)
    return written, read, sorted(times)[len(times) // 2]


def measured(folder: Path, device: str = "auto", seconds: float = SECONDS) -> MachineRates:
    """Measure everything. A part that fails is named in `not_measured`, and the others go on."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401 - its import takes no part of the time

    began = time.monotonic()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    machine, found, failed = Machine(device), {}, {}

    def part(name: str, act: Callable[[float], Any]) -> Any:
        left = seconds - (time.monotonic() - began)
        try:
            if left <= 0:
                raise _NotHere("the time was over")
            return act(min(seconds * _SHARES[name], left))
        except Exception as error:
            failed[name] = str(error).partition("\n")[0] or type(error).__name__
            return None
        finally:
            if machine.is_gpu:
                torch.cuda.empty_cache()

    on_disk = part("disk", lambda share: disk(folder, share))
    found["copy_bytes_per_second"] = part("copy", machine.copy)
    found["host_copy_bytes_per_second"] = part("host copy", machine.host_copy)
    products = found["matmul_flops_per_second"] = part("matmul", machine.matmul) or {}
    found["attention_flops_per_second"] = part("attention", machine.attention)
    best = max(products.values(), default=1e9)
    train = found["train"] = part("train", lambda share: machine.train(share, best))
    shape = next((one for one in SHAPES if train and one[0] == train.hidden_size), SHAPES[-1])
    found["decode"] = part("decode", lambda share: machine.decode(share, shape))
    names = ("disk_write_bytes_per_second", "disk_read_bytes_per_second", "small_file_seconds")
    found |= dict(zip(names, on_disk or (None, None, None), strict=True))
    return MachineRates(
        device=device,
        # A CPU's own name is the caller's to say: tasks/engine/environment.py reads it.
        name=torch.cuda.get_device_name() if machine.is_gpu else platform.machine(),
        num_devices=torch.cuda.device_count() if machine.is_gpu else 1,
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if machine.is_gpu else memory().total,
        folder=str(folder),
        not_measured=failed,
        num_threads=torch.get_num_threads(),
        host=platform.node(),
        torch=torch.__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        **found,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m smoltulu.tasks.machine.measure", description="Measure the machine")
    parser.add_argument("folder", type=Path, help="where the disk is measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(num_cores())
    print(measured(options.folder, options.device, options.seconds).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
