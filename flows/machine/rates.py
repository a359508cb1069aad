"""What `smoltulu doctor --gpu` measured on this user's machines: a file for each device, and the process that measures.

The state of a user may be shared by the machines of a cluster, so that a device has a file of its own by its name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from smoltulu.artifacts.files import make_folder, private_folder, read_plain, write_atomically
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.machine import MachineRates
from smoltulu.tasks.engine.environment import cpu_name
from smoltulu.tasks.machine.measure import SECONDS

_FOLDER = "rates"
#: What may go beyond the time of the measurement itself: imports, and a first kernel.
_MORE_SECONDS = 120.0


def measure(home: Path, folder: Path, seconds: float = SECONDS, device: str = "auto") -> MachineRates:
    """Measure this machine in a process of its own, and keep what it says. A driver that hangs hangs that process.

    folder  where the disk is measured; it is made where there is none

    Raises:
        ValueError: the process ended without a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "smoltulu.tasks.machine.measure", str(folder), "--device", device]
    try:
        done = subprocess.run(
            [*command, "--seconds", str(seconds)],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds + _MORE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"nothing was measured within {seconds + _MORE_SECONDS:.0f} s: the process hung. Look at `nvidia-smi` and "
            f"at the file system of {folder}"
        ) from None
    lines = done.stdout.splitlines()
    try:
        rates = MachineRates.model_validate_json(lines[-1] if done.returncode == 0 and lines else "")
    except ValidationError as error:
        said = (done.stderr.strip().splitlines() or [first_problem(error)])[-1]
        raise ValueError(f"nothing was measured (status {done.returncode}): {said[:500]}") from None
    if rates.device == "cpu":
        rates = rates.model_copy(update={"name": cpu_name()})
    private_folder(home)
    write_atomically(make_folder(home / _FOLDER, home) / _file_name(rates), rates.model_dump_json(indent=1))
    return rates


def _file_name(rates: MachineRates) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", rates.name.lower()).strip("-")[:80]
    return f"{rates.device}-{plain or 'device'}.json"


def rates_of(home: Path, device: Literal["auto", "cpu", "cuda"]) -> MachineRates | None:
    """The rates that were measured last of such a device; `auto`: of a GPU, else of a CPU. None: there are none.

    A file that another version wrote, or that is damaged, says nothing.
    """
    found = []
    for file in sorted((home / _FOLDER).glob("*.json")):
        try:
            found.append(MachineRates.model_validate(json.loads(read_plain(file))))
        except (OSError, ValueError):
            continue
    wanted = ("cuda", "cpu") if device == "auto" else (device,)
    for kind in wanted:
        of_kind = [one for one in found if one.device == kind]
        if of_kind:
            return max(of_kind, key=lambda one: one.measured_at)
    return None
