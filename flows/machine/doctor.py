"""Checks this machine before a long run. Imports no torch; takes about two seconds."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import psutil

from smoltulu.artifacts import readable
from smoltulu.artifacts.files import exposed
from smoltulu.flows.machine import machine, prefect_api, processes
from smoltulu.flows.machine.file_systems import doubt_of_locks, is_of_one_machine, mount_of_folder, without_locks
from smoltulu.flows.machine.places import store_root
from smoltulu.recipes import CHECKOUT, CONSTRAINTS
from smoltulu.tasks.engine.environment import as_tested, cpu_name, installed_versions, pinned_version
from smoltulu.tasks.limits import memory, num_cores

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

MIN_FREE_DISK_GB = 1.0
FULL_RECIPE_DISK_GB = 60.0  # weights, optimizer state and two checkpoints of a 1.7B model, per training stage in turn
MIN_MEMORY_GB = 4.0  # what the recipe `tiny` needs
HUB_SECONDS = 1.5
MAX_CLOCK_SECONDS = 60
_HUB_ADVICE = "needed only for recipes that name Hub models or data"
#: Dependencies of a dependency. A wrong version breaks Prefect without an error (see pyproject.toml).
CAPPED = ("fastapi", "sqlalchemy")
NO_WORKER = (
    "no worker polls the pool {pool}: run `smoltulu up`, or `prefect worker start --pool {pool}` in another terminal"
)

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. `advice`: what to do; empty if nothing."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def examine(home: Path, fix: bool = False) -> list[Check]:
    """Every check, in the order of the table. `fix` sets runs whose process is gone to Crashed."""
    hub: list[Check] = []
    # A silent name server blocks longer than any timeout that can be set, so the check gets its own thread.
    asking = threading.Thread(target=lambda: hub.append(_hub()), daemon=True)
    asking.start()
    version = ".".join(map(str, sys.version_info[:3]))
    checks = [
        Check("Python", "ok", f"{version}, {sys.prefix}"),
        *_packages(),
        _gpu(),
        _cpu(),
        _disk(),
        _locks(),
        _clock(),
    ]
    checks += [_memory(), _token(), *_writable(home), *_folders(home)]
    checks += examine_prefect(home, api_url(home), fix)
    asking.join(HUB_SECONDS)
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return checks + (hub or [Check("Hub", "warn", f"{address} does not answer", _HUB_ADVICE)])


# --- the machine -----------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """Requirements of the project: from the checkout's pyproject.toml, else from the installed package."""
    if CHECKOUT:
        return list(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"])
    return [text for text in importlib.metadata.requires("smoltulu") or [] if "extra ==" not in text]


def _packages() -> Iterator[Check]:
    """Requirements that are not met, and packages in versions that were not tested."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requirements()]
    installed = installed_versions(requirement.name for requirement in wanted)
    wrong, other = [], []
    for requirement in wanted:
        name = requirement.name
        if name not in installed or not requirement.specifier.contains(installed[name], prereleases=True):
            has = f"{installed[name]} is installed" if name in installed else "it is missing"
            wrong.append(f"{name}{requirement.specifier} is required, {has}")
        elif not as_tested(name, installed[name]):
            other.append(f"{name} {installed[name]} (tested: {pinned_version(name)})")
    advice = "make setup" if CHECKOUT else f"pip install --upgrade -c {CONSTRAINTS} smoltulu"
    if wrong:
        broken = ". Other versions of fastapi or SQLAlchemy break deployments or cron schedules without an error"
        capped = any(text.startswith(CAPPED) for text in wrong)
        yield Check("packages", "fail", "; ".join(wrong), advice + (broken if capped else ""))
    if other:
        yield Check("versions", "warn", "not as tested: " + ", ".join(other), advice)
    if not wrong and not other:
        yield Check("packages", "ok", f"all {len(wanted)} as tested")


def _gpu() -> Check:
    none = "recipe `tiny` is made for a CPU; the others need a GPU"
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("GPU", "warn", "none found (no nvidia-smi)", none)
    try:
        done = subprocess.run(
            [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("GPU", "warn", f"nvidia-smi does not answer: {error}", "check the driver")
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        said = (done.stderr or done.stdout).strip().splitlines()
        return Check("GPU", "warn", f"nvidia-smi: {said[0] if said else 'lists no GPU'}", none)
    detail = "; ".join(f"{name} free" for name in names)
    if missing := _missing_for_triton():
        return Check("GPU", "warn", f"{detail}; no {missing}", "install it: kernels of the trainers are compiled here")
    if len({name.partition(",")[0] for name in names}) > 1:
        return Check("GPU", "warn", detail, "a training takes GPUs of one kind only: name them in CUDA_VISIBLE_DEVICES")
    return Check("GPU", "ok", detail)


def _missing_for_triton() -> str | None:
    """The C compiler or header that Triton needs and does not find, if any. Slim containers have neither."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"{header} (python3-dev)"


def _cpu() -> Check:
    return Check("CPU", "ok", f"{cpu_name()}, {num_cores()} cores; on another CPU the same recipe gives other scores")


def _obstacle(folder: Path) -> str | None:
    """Why nothing could be written and locked in a folder, which need not exist yet; None if it could. It is tried."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is a {'link that leads nowhere' if there.is_symlink() else 'file'}, no folder"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".smoltulu-doctor-") as file, open(file.name, "rb") as other:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return f"{there} keeps no locks (flock): two runs would write one artifact"
    except OSError as error:
        return f"{there} cannot be written or locked: {error.strerror}"


def _writable(home: Path) -> Iterator[Check]:
    """Folders that runs write into besides the store."""
    from huggingface_hub.constants import HF_HUB_CACHE

    # Without a cache, recipes that take nothing from the Hub run all the same.
    places: list[tuple[str, Path, str, Status]] = [
        ("home", home, "SMOLTULU_HOME", "fail"),
        ("cache", Path(HF_HUB_CACHE), "HF_HUB_CACHE", "warn"),
    ]
    for name, folder, variable, status in places:
        if (obstacle := _obstacle(folder)) is not None:
            yield Check(name, status, obstacle, f"change that, or set {variable}")
        else:
            yield Check(name, "ok", str(folder))


def _clock() -> Check:
    """Whether the store's file system has this machine's time: gc asks what was used lately, by the times of files."""
    root = store_root()
    there = next((path for path in (root, *root.parents) if path.is_dir()), root)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            ahead = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:
        return Check("clock", "warn", f"the time in {there} is not known", "")
    if abs(ahead) > MAX_CLOCK_SECONDS:
        said = f"files in {there} get a time {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        return Check("clock", "warn", said, "set the clocks (NTP): gc goes by the times of files")
    return Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def _disk() -> Check:
    root = store_root()
    if (obstacle := _obstacle(root)) is not None:
        return Check("disk", "fail", f"store {root}: {obstacle}", "change that, or name another store (SMOLTULU_STORE)")
    existing = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    detail = f"{readable.size(free)} free in {root}"
    if free < MIN_FREE_DISK_GB * 1e9:
        return Check("disk", "fail", detail, "no stage starts like this: free some, or move the store (SMOLTULU_STORE)")
    if free < FULL_RECIPE_DISK_GB * 1e9:
        return Check("disk", "warn", detail, f"a 1.7B recipe wants about {FULL_RECIPE_DISK_GB:.0f} GB; `tiny` needs 1")
    return Check("disk", "ok", detail)


def _locks() -> Check:
    """Whether the store's locks hold between machines, as far as the mount says so."""
    root = store_root()
    mount = mount_of_folder(root)
    if mount is None:
        return Check("locks", "warn", f"which file system {root} is on is not known", "")
    if (why := without_locks(mount)) is not None:
        return Check("locks", "warn", why, "use this store from one machine only, or put it elsewhere (SMOLTULU_STORE)")
    if (doubt := doubt_of_locks(mount)) is not None:
        return Check("locks", "warn", doubt, "look there before a second machine uses this store")
    reach = "of this machine" if is_of_one_machine(mount) else "for all machines, by its mount"
    return Check("locks", "ok", f"{mount.folder} is {mount.kind}: locks {reach}")


def _folders(home: Path) -> Iterator[Check]:
    """Store, reports and state that every user of this machine can read or write."""
    root = store_root()
    kept = {"store": root, "reports": root.parent / "reports", "state": home}
    open_to = {name: what for name, path in kept.items() if (what := exposed(path)) is not None}
    for name, what in open_to.items():
        status: Status = "fail" if what == "written" else "warn"
        advice = f"chmod o-rwx {shlex.quote(str(kept[name]))}"
        yield Check(f"{name} access", status, f"{kept[name]} can be {what} by every user of this machine", advice)
    if not open_to:
        yield Check("access", "ok", "store, reports and state are closed to other users, or not there yet")


def _memory() -> Check:
    total, available = memory()
    detail = f"{readable.size(available)} of {readable.size(total)} available"
    if available < MIN_MEMORY_GB * 1e9:
        return Check("memory", "warn", detail, f"recipe `tiny` needs {MIN_MEMORY_GB:.0f} GB, others more")
    return Check("memory", "ok", detail)


def _token() -> Check:
    """Whether there is a token; it is never shown."""
    if os.environ.get("HF_TOKEN"):
        return Check("HF token", "ok", "HF_TOKEN is set (a worker that was started before it was set lacks it)")
    from huggingface_hub import get_token

    if get_token():
        return Check("HF token", "warn", "saved by `hf auth login`, HF_TOKEN is not set", "to publish: export HF_TOKEN")
    return Check("HF token", "warn", "none", "for gated data and to publish: export HF_TOKEN before `smoltulu up`")


def _hub() -> Check:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("Hub", "ok", "not asked: HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:  # an answer, too
        date = error.headers.get("Date")
    except (OSError, ValueError) as error:
        return Check("Hub", "warn", f"{address} cannot be reached: {getattr(error, 'reason', error)}", _HUB_ADVICE)
    ahead = 0.0
    with contextlib.suppress(ValueError, TypeError):
        ahead = parsedate_to_datetime(date).timestamp() - time.time()
    if abs(ahead) > MAX_CLOCK_SECONDS:
        side = "ahead of" if ahead > 0 else "behind"
        said = f"{address} answers; its clock is {abs(ahead):.0f} s {side} this machine's"
        return Check("Hub", "warn", said, "set this machine's clock (NTP): signatures of shared stores hang on it")
    return Check("Hub", "ok", f"{address} answers")


# --- Prefect ---------------------------------------------------------------------------------------------------------


def api_url(home: Path) -> str:
    """URL of the server for commands: PREFECT_API_URL, else ours, else Prefect's settings, else port 4200."""
    if given := os.environ.get("PREFECT_API_URL"):
        return given
    if server := machine.running(home, "server"):
        return prefect_api.url_of(server.port)
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or prefect_api.url_of(prefect_api.DEFAULT_PORT)


def no_server(url: str) -> str:
    """The error text if no server answers at `url`."""
    parts = urlsplit(url)
    text = f"no Prefect server answers at {url}"
    if prefect_api.is_local(url) and parts.port and not prefect_api.port_is_free(parts.port):
        text += f" (port {parts.port} is taken by {prefect_api.port_holder(parts.port)})"
    return f"{text}: run `smoltulu up`, or set PREFECT_API_URL"


def reachable(url: str) -> bool:
    """Whether a Prefect API answers, with the credentials of Prefect's settings."""
    if prefect_api.is_local(url):
        return prefect_api.answers(url)
    with contextlib.suppress(Exception), prefect_api.client(url) as server:
        return server.api_healthcheck() is None
    return False


def pollers(home: Path, url: str, pool: str) -> list[str] | None:
    """Workers that poll a pool; None if there is no such pool.

    A killed worker of ours does not count, although the server lists it for another minute and a half.
    """
    names = prefect_api.online_workers(url, pool)
    ours = machine.read_record(home, "worker")
    if names and ours and not machine.running(home, "worker"):
        names = [name for name in names if name != ours.name]
    return names


def expected_deployments() -> list[tuple[str, str]]:
    """(entrypoint, name) of everything that prefect.yaml lists."""
    import yaml

    return [(entry["entrypoint"], entry["name"]) for entry in yaml.safe_load(machine.prefect_yaml())["deployments"]]


def examine_prefect(home: Path, url: str, fix: bool = False) -> Iterator[Check]:
    """Check server, pool, worker, deployments and runs. Without a server, the rest is not checked."""
    ours = machine.running(home, "server")
    if ours and url.rstrip("/") != (ours_url := prefect_api.url_of(ours.port)):
        detail = f"PREFECT_API_URL is {url}, `smoltulu up` runs {ours_url}"
        yield Check("address", "warn", detail, f"export PREFECT_API_URL={ours_url}")
    if not reachable(url):
        yield Check("server", "fail", no_server(url).partition(": run ")[0], "smoltulu up, or set PREFECT_API_URL")
        return
    yield Check("server", "ok", url)

    pool = prefect_api.POOL
    names = pollers(home, url, pool)
    if names is None:
        yield Check("pool", "fail", f"there is no work pool {pool}", "smoltulu up")
    else:
        yield Check("pool", "ok", pool)
        if names:
            verb = "polls" if len(names) == 1 else "poll"
            yield Check("worker", "ok", f"{len(names)} {verb} the pool: {', '.join(names)}")
        else:
            detail, _, advice = NO_WORKER.format(pool=pool).partition(": run ")
            yield Check("worker", "fail", detail, f"run {advice}")

    with prefect_api.client(url) as server:
        there = {(deployment.entrypoint, deployment.name) for deployment in server.read_deployments()}
    missing = [name for entrypoint, name in expected_deployments() if (entrypoint, name) not in there]
    if missing:
        yield Check("deployments", "fail", f"not registered: {', '.join(missing)}", "smoltulu up")
    else:
        yield Check("deployments", "ok", f"all {len(expected_deployments())} of prefect.yaml are registered")
    yield _stuck(url, fix)


def _stuck(url: str, fix: bool) -> Check:
    """Runs in state Running whose process is gone: after a power cut they keep that state for ever."""
    if not prefect_api.is_local(url):
        return Check("stuck runs", "ok", "not looked at: the server is on another machine, so may be the runs")
    with prefect_api.client(url) as server:
        stuck = stuck_runs(server)
        listed = ", ".join(f"{run.name} ({run.id})" for run in stuck)
        if not stuck:
            return Check("stuck runs", "ok", "none")
        if not fix:
            return Check("stuck runs", "warn", f"Running, but their process is gone: {listed}", "smoltulu doctor --fix")
        from prefect.states import Crashed

        for run in stuck:
            server.set_flow_run_state(run.id, Crashed(message="smoltulu doctor: its process is gone"), force=True)
        prefect_api.close_task_runs(server)
    return Check("stuck runs", "ok", f"set to Crashed: {listed}")


def stuck_runs(server: SyncPrefectClient) -> list[FlowRun]:
    """Unfinished runs that a worker on this machine started and that have no live process."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    going = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
    runs = server.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=going)), limit=200)
    alive = {processes.flow_run_of(process) for process in processes.processes_with("PREFECT__FLOW_RUN_ID")}
    return [run for run in runs if str(run.id) not in alive and _process_is_gone(run)]


def _process_is_gone(run: FlowRun) -> bool:
    """Whether the process that the worker recorded has ended. False for a run that no worker started."""
    pid = (run.infrastructure_pid or "").rpartition(":")[2]
    if not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
    except psutil.NoSuchProcess:
        return True
    # The id is in use. If we may read its environment, which does not name the run, it is another process.
    return not processes.alive(process) or processes.environment_of(process) is not None
