"""`smoltulu doctor --gpu`: what this machine does in a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, echo, failures, print_json, table

if TYPE_CHECKING:
    from smoltulu.schemas.machine import MachineRates


def measure_and_show(as_json: bool) -> None:
    """Measure, keep and print the rates of this machine."""
    from smoltulu.flows.machine.places import default_home, store_root
    from smoltulu.flows.machine.rates import measure

    if not as_json:
        echo("measuring, two minutes", err=True)
    with failures():
        rates = measure(default_home(), store_root())
    if as_json:
        print_json(rates.model_dump(mode="json"))
        return
    device = "GPU" if rates.device == "cuda" else "CPU"
    of_memory = readable.size(rates.memory_bytes)
    made = table("rate", "measured", "at", title=f"{rates.num_devices} x {rates.name} ({device}), {of_memory}")
    for row in lines(rates):
        made.add_row(*row)
    console().print(made)
    for name, why in rates.not_measured.items():
        echo(f"not measured: {name}: {why}")
    echo(f"`smoltulu plan` takes hours from these rates where no similar stage was run; kept in {default_home()}/rates")


def lines(rates: MachineRates) -> Iterator[tuple[str, str, str]]:
    """(rate, value, what it was measured at) of everything that was measured."""
    if rates.copy_bytes_per_second:
        yield "memory", _bytes(rates.copy_bytes_per_second), "a copy, read and written"
    if rates.host_copy_bytes_per_second:
        yield "host to device", _bytes(rates.host_copy_bytes_per_second), "from pinned memory"
    for precision, rate in rates.matmul_flops_per_second.items():
        yield "matrix product", _flops(rate), str(precision)
    if rates.attention_flops_per_second:
        yield "attention", _flops(rates.attention_flops_per_second), "causal, forward and backward"
    if rates.train is not None:
        at = f"hidden size {rates.train.hidden_size}, {rates.train.num_tokens:,} tokens, {rates.train.precision}"
        yield "training", _flops(rates.train.flops_per_second), at
    if rates.decode is not None:
        step = rates.decode.seconds_per_parameter * rates.decode.num_parameters
        at = f"{rates.decode.num_rows} rows, {readable.count(rates.decode.num_parameters)} parameters"
        yield "decoding", f"{rates.decode.num_rows / step:,.0f} tokens/s", at
    if rates.disk_write_bytes_per_second:
        yield "disk, written", _bytes(rates.disk_write_bytes_per_second), f"{rates.folder}, synced"
    if rates.disk_read_bytes_per_second:
        yield "disk, read", _bytes(rates.disk_read_bytes_per_second), rates.folder
    if rates.small_file_seconds:
        yield "small file", f"{1000 * rates.small_file_seconds:,.2f} ms", "4 kB written, synced and renamed"


def _bytes(rate: float) -> str:
    return f"{readable.size(rate)}/s"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.3g} TFLOP/s"
