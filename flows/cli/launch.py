"""`smoltulu launch RECIPE --print slurm | kubernetes`: the recipe as jobs of a cluster. Submits nothing."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from smoltulu.flows.cli.output import echo, failures


def launch(
    recipe: Annotated[str, typer.Argument(help="a preset's name or the path of a YAML file")],
    engine: Annotated[str, typer.Option("--print", help="what the jobs are printed for: slurm or kubernetes")],
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", help="dotted field and value, e.g. dpo.learning_rate=5e-7")
    ] = None,
    until: Annotated[str | None, typer.Option(help="last stage to run")] = None,
    hours: Annotated[float | None, typer.Option(help="most hours of a job, then it is queued again")] = None,
    grace_seconds: Annotated[int, typer.Option(help="for the last checkpoint, before a job is killed")] = 300,
    cpus_per_device: Annotated[int, typer.Option(help="cores for each process, where num_threads says nothing")] = 8,
    devices_per_node: Annotated[int | None, typer.Option(help="GPUs of a machine: more are refused")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Slurm: of sbatch, e.g. --option=--constraint=h100")] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: container image")] = None,
    claim: Annotated[str | None, typer.Option(help="Kubernetes: volume claim that all pods share")] = None,
    mount: Annotated[str, typer.Option(help="Kubernetes: where it is mounted")] = "/smoltulu",
) -> None:
    """Print the jobs that run a recipe on a cluster, each with the GPUs, cores and memory that its stages need.

    Jobs that are preempted, or whose time is over, write a checkpoint and are queued again. Stages that the store has
    already get no job.
    """
    from smoltulu.flows.launching.render import rendered
    from smoltulu.flows.launching.settings import LaunchSettings
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.recipe import check_stage_names, load_recipe, parse_overrides, whole_path

    with failures():
        if engine not in ("slurm", "kubernetes"):
            raise ValueError(f"--print {engine}: jobs are printed for slurm or kubernetes; give one of the two")
        settings = LaunchSettings(
            hours=hours, grace_seconds=grace_seconds, cpus_per_device=cpus_per_device, image=image, claim=claim,
            devices_per_node=devices_per_node, partition=partition, account=account, options=tuple(option or ()),
            mount=mount,
        )  # fmt: skip
        recipe = whole_path(recipe)
        os.chdir(PROJECT)  # a flow runs there, and relative paths of overrides start there
        checked = load_recipe(recipe, parse_overrides(override or []))
        check_stage_names(checked, until, [])
        text, notes = rendered(checked, until, engine, settings)  # type: ignore[arg-type]
    for note in notes:
        echo(f"note      {note}", err=True)
    sys.stdout.write(text)
