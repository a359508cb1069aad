"""The jobs of a recipe as one script that submits them to Slurm: an `sbatch` a job, each after those it waits for.

Slurm tells a job of its coming end by SIGUSR1 (`--signal=B:USR1@SECONDS`, sent to the batch shell alone: ranks that do
not expect it would die of it), up to a minute early; also of a preemption, where the site has
SlurmctldParameters=preempt_send_user_signal. The shell passes it on as SIGTERM, the stage writes its checkpoint, the
runner ends with 143, and the job is queued again. SIGTERM from Slurm itself is a cancellation, after which nothing is
queued, or a preemption without that parameter, after which Slurm queues the job (`--requeue`), and the stage has
KillWait seconds (30). Behaviour: man pages of sbatch and slurm.conf, 22.05.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence

from smoltulu.flows.launching.jobs import ClusterJob
from smoltulu.flows.launching.settings import LAST_SECONDS, STOPPED, LaunchSettings

#: What every job runs; its arguments are nodes. `wait` ends at every signal, so that it is called until all is
#: over, and once more for the status, which the shell keeps.
_JOB = """\
#!/usr/bin/env bash
cd {project} || exit 1
runner= ending=
forward() {{ ending=$1; [ -z "$runner" ] || kill -TERM "$runner"; }}
trap 'forward requeue' USR1
trap 'forward cancelled' TERM
{command} "$@" &
runner=$!
[ -z "$ending" ] || kill -TERM "$runner"
while
  wait "$runner"
  kill -0 "$runner" 2>/dev/null
do :; done
wait "$runner"
status=$?
if [ "$ending" = requeue ] && [ "$status" = {stopped} ]; then
  echo "stopped with its checkpoint written; queued again"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

_ORDER = "every job is one run of its stages, which others wait for by its number"
_PREEMPTION = "the job sets it, so that a stage that is stopped writes its checkpoint and is queued again"
#: Options of sbatch that a job cannot be given: who sets them.
_OWN = {
    "time": "--hours sets it, and is held against the time between two checkpoints",
    "partition": "--partition sets it",
    "account": "--account sets it",
    "mem": "compute.host_memory_gb sets it, also for each stage",
    "cpus-per-task": "compute.num_threads or --cpus-per-device sets it",
    "gpus-per-node": "compute.num_processes sets it",
    **dict.fromkeys(("nodes", "ntasks", "array", "wrap", "wait", "test-only", "dependency", "job-name"), _ORDER),
    **dict.fromkeys(("parsable", "quiet", "kill-on-invalid-dep", "chdir", "output", "error", "hold"), _ORDER),
    **dict.fromkeys(("signal", "requeue", "no-requeue", "open-mode"), _PREEMPTION),
}

_SCRIPT = """\
#!/usr/bin/env bash
# {title}
# Rendered by `smoltulu launch --print slurm`: read it, then `bash` it. What is done is found in the store, so that it
# may be run again after a failure.
{notes}set -euo pipefail
umask 077
folder={folder}
mkdir -p "$folder"
cat >"$folder/recipe.yaml" <<'{end}'
{recipe}
{end}
cat >"$folder/job.sh" <<'{end}'
{job}{end}

submit() {{ sbatch --parsable {common} "$@"; }}

{submissions}
echo "submitted {num_jobs} jobs; their logs: $folder"
"""


def render(
    jobs: Sequence[ClusterJob],
    settings: LaunchSettings,
    *,
    name: str,
    recipe: str,
    folder: str,
    project: str,
    python: str,
    notes: Sequence[str] = (),
) -> str:
    """The script. recipe: its YAML; folder: where recipe and logs go; project: where jobs run; python: interpreter."""
    # No line of the recipe can end the text that it is in.
    end = f"END_{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    grace = str(settings.grace_seconds - LAST_SECONDS)
    command = [python, "-P", "-m", "smoltulu.flows.local", f"{folder}/recipe.yaml", "--grace-seconds", grace, "--nodes"]
    common = [
        f"--chdir={project}",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{settings.grace_seconds}",
        "--kill-on-invalid-dep=yes",
        # %j alone: names of jobs may hold what sbatch reads as a pattern.
        f"--output={folder.replace('%', '%%')}/%j.log",
        *_given(settings),
    ]
    variables = {job.name: f"job_{number}" for number, job in enumerate(jobs, start=1)}
    return _SCRIPT.format(
        title=f"Recipe {name} as {len(jobs)} Slurm jobs",
        notes="".join(f"# {' '.join(note.split())}\n" for note in notes),
        folder=shlex.quote(folder),
        end=end,
        recipe=recipe.rstrip("\n"),
        job=_JOB.format(project=shlex.quote(project), command=shlex.join(command), stopped=STOPPED),
        common=shlex.join(common),
        submissions="\n".join(_submission(job, name, variables) for job in jobs),
        num_jobs=len(jobs),
    )


def _given(settings: LaunchSettings) -> list[str]:
    given = {"--partition": settings.partition, "--account": settings.account}
    options = [f"{name}={value}" for name, value in given.items() if value]
    if settings.hours is not None:
        options.append(f"--time={slurm_time(settings.hours)}")
    for option in settings.options:
        if not option.startswith("--") or not option[2:3].isalpha() or not option.isprintable():
            raise ValueError(f"--option {option!r:.80}: give a long option of sbatch, e.g. --option=--constraint=h100")
        name = option[2:].partition("=")[0]
        # sbatch takes the beginning of a name for the name.
        if own := next((own for own in _OWN if own.startswith(name)), None):
            raise ValueError(f"--option {option!r:.80}: {_OWN[own]}; leave it out")
    return [*options, *settings.options]


def slurm_time(hours: float) -> str:
    """As sbatch takes it: days-hours:minutes:seconds; rounded up to whole minutes, as Slurm does."""
    minutes = max(-(-round(hours * 3600) // 60), 1)
    return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"


def _submission(job: ClusterJob, recipe: str, variables: dict[str, str]) -> str:
    options = [f"--job-name={recipe}-{job.name}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={job.num_cpus}"]
    if job.num_devices:
        options.append(f"--gpus-per-node={job.num_devices}")
    if job.memory_gb is not None:
        options.append(f"--mem={max(round(job.memory_gb * 1e9 / (1 << 20)), 1)}M")
    words = [shlex.quote(option) for option in options]
    if job.after:
        words.append("--dependency=afterok:" + ":".join(f"${{{variables[name]}%%;*}}" for name in sorted(job.after)))
    words += ['"$folder/job.sh"', *(shlex.quote(node) for node in job.nodes)]
    return f"{variables[job.name]}=$(submit {' '.join(words)})"
