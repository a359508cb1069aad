"""The command line `smoltulu`: what Prefect's own commands do not do. Heavy imports wait until they are needed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from smoltulu.flows.cli import (
    audit,
    chat,
    compare,
    ladder,
    launch,
    nightly,
    output,
    rates,
    report,
    store,
    sweep,
    tables,
)

Recipe = Annotated[str, typer.Argument(help="a preset's name or the path of a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="dotted field and value, e.g. dpo.learning_rate=5e-7")
]

app = typer.Typer(
    help="Tulu 3 post-training as one Prefect workflow. Flows are started with `prefect deployment run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def up(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="of the server; 4200 unless given")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="flow runs at a time; 1 unless given")] = None,
) -> None:
    """Start server, work pool, deployments and worker on this machine, in the background."""
    from smoltulu.flows.machine import machine, places, prefect_api

    home = places.default_home()
    with output.failures(machine.MachineError):
        running = machine.up(home, port, limit, output.echo)
    output.echo(f"\nUI        {running.url.removesuffix('/api')}")
    output.echo(f"logs      {home / 'logs'}")
    # `prefect` reads prefect.toml in the folder where it is called; `smoltulu` finds the server itself.
    told = prefect_api.url_of(prefect_api.DEFAULT_PORT) if Path("prefect.toml").is_file() else None
    if running.url != os.environ.get("PREFECT_API_URL", told):
        output.echo(f"export    export PREFECT_API_URL={running.url}")
    # Without an activated environment the commands are not on the PATH.
    tools = "" if shutil.which("prefect") else f"{Path(sys.executable).parent}/"
    output.echo(f"try       {tools}prefect deployment run smoltulu/tiny --watch")
    output.echo(f"stop      {tools}smoltulu down")


@app.command()
def down() -> None:
    """Stop everything that `smoltulu up` started, running flows included, and nothing else."""
    from smoltulu.flows.machine import machine, places

    with output.failures(machine.MachineError):
        anything = machine.down(places.default_home(), say=output.echo)
    output.echo("all down" if anything else "nothing of ours runs")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run(
    context: typer.Context,
    deployment: Annotated[str, typer.Argument(help="flow/deployment, e.g. smoltulu/full")],
) -> None:
    """Run `prefect deployment run DEPLOYMENT --watch [...]`, after checking server, deployment and worker.

    Prefect itself waits silently if no worker polls. Everything after DEPLOYMENT goes to Prefect unchanged, except that
    FILE in `-p recipe=FILE` (sweep, ladder) becomes an absolute path: the flow runs in another folder.
    """
    from smoltulu.flows.machine import doctor, places, prefect_api
    from smoltulu.flows.recipe import check_parameter, whole_path
    from smoltulu.flows.recipe_problems import did_you_mean

    with output.failures():
        for text in context.args:
            check_parameter(text)
        names = [match[1] for text in context.args if (match := re.match(r"(?:-p|--param=)?([a-z]+)=", text))]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{', '.join(doubles)}: given more than once, and Prefect keeps the last; keep one of them"
            )
        of_file = re.compile(r"((?:-p|--param=)?(?:recipe|sweep|ladder)=)(.*)", re.DOTALL)
        arguments = [
            match[1] + whole_path(match[2]) if (match := of_file.fullmatch(text)) else text for text in context.args
        ]
    home = places.default_home()
    url = doctor.api_url(home)
    if not doctor.reachable(url):
        output.fail(doctor.no_server(url))
    registered = dict(prefect_api.deployments(url))
    if deployment not in registered:
        output.fail(
            f"no deployment is called {deployment!r}{did_you_mean(deployment, registered)}; registered: "
            f"{', '.join(registered) or 'none'}; `smoltulu up` registers them"
        )
    pool = registered[deployment]
    if pool is not None and not doctor.pollers(home, url, pool):
        output.fail(doctor.NO_WORKER.format(pool=pool))
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "prefect", "deployment", "run", deployment, "--watch", *arguments]
    environment = prefect_api.client_environment(url)
    if not sys.stdout.isatty():
        environment.setdefault("COLUMNS", str(output.WIDTH))  # else Prefect folds the log at 80
    os.execve(sys.executable, command, environment)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="what to write; an existing file stays as it is")] = Path("recipe.yaml"),
    extends: Annotated[str, typer.Option(help="preset that it changes, e.g. tiny")] = "smoltulu-1130",
) -> None:
    """Write a recipe file that extends a preset and lists every setting with its meaning, commented out."""
    from smoltulu.flows.cli.init import commented_recipe

    with output.failures():
        text = commented_recipe(extends)
        try:
            with file.open("x") as stream:
                stream.write(text)
        except FileExistsError:
            output.fail(f"{file} exists already, and is left as it is; name another file")
    output.echo(f"wrote     {file}")
    output.echo(f"look      smoltulu plan {shlex.quote(str(file))}")
    output.echo(f"run       smoltulu run smoltulu/full -p {shlex.quote(f'recipe={file}')}")


@app.command()
def plan(
    recipe: Recipe,
    override: Overrides = None,
    until: Annotated[str | None, typer.Option(help="last stage to run")] = None,
    refresh: Annotated[list[str] | None, typer.Option(help="stage to make again; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Show per stage what a run would do (cached, resumes or runs), why, and its cost. Needs no server.

    Of a sweep or a ladder: its blocks, cells, hours, memory and disk.
    """
    from smoltulu.flows.cli.plan import make_plan, plan_arguments, run_parameters, show
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.recipe import parse_overrides, whole_path
    from smoltulu.flows.sweeping.grid import is_ladder, is_sweep

    if is_sweep(recipe):
        if override or until or refresh:
            output.fail(f"{recipe} is a sweep, whose plan takes no --override, --until or --refresh; leave them out")
        sweep.show_plan_of(recipe, None, as_json)
        return
    if is_ladder(recipe):
        if override or until or refresh:
            output.fail(f"{recipe} is a ladder, whose plan takes no --override, --until or --refresh; leave them out")
        ladder.ladder(recipe, "plan", None, as_json)
        return
    arguments = plan_arguments(recipe, override or [])
    with output.failures():
        recipe = whole_path(recipe)
        os.chdir(PROJECT)  # a flow runs there, and relative paths of overrides start there
        overrides = parse_overrides(override or [])
        planned = make_plan(recipe, overrides, until, refresh or [])
    show(planned, as_json, run_parameters(recipe, overrides), arguments)


@app.command()
def adopt(recipe: Recipe, override: Overrides = None) -> None:
    """Adopt finished stages from the version that read rows otherwise; rows are made again and compared."""
    from smoltulu.flows.graphs.recipe_graph import Graph
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.planning import adoption
    from smoltulu.flows.recipe import load_recipe, parse_overrides, whole_path
    from smoltulu.tasks.engine.launch import StageFailed
    from smoltulu.tasks.engine.stores import open_store

    with output.failures(StageFailed):
        recipe = whole_path(recipe)
        os.chdir(PROJECT)
        checked = load_recipe(recipe, parse_overrides(override or []))
        outcomes = adoption.adopt(Graph(checked), open_store(checked.compute), output.progress_log())
    table = output.table("stage", "what", "why")
    for outcome in outcomes:
        table.add_row(outcome.node, outcome.status, outcome.reason)
    output.console().print(table)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="set runs whose process is gone to Crashed")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="measure what this machine does in a second instead; two minutes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --gpu: the rates, as JSON")] = False,
) -> None:
    """Check this machine: versions, GPU, disk, token, server, worker, deployments, stuck runs.

    With --gpu: measure memory, matrix product, attention, training, decoding and disk, for `smoltulu plan`.
    """
    if gpu or as_json:
        if fix or not gpu:
            output.fail("--fix is of the checks, --json of --gpu; give --gpu, --gpu --json, or --fix")
        rates.measure_and_show(as_json)
        return
    from rich.text import Text

    from smoltulu.flows.machine import places
    from smoltulu.flows.machine.doctor import examine

    checks = examine(places.default_home(), fix)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = output.table("check", "", "found", "what to do")
    for check in checks:
        table.add_row(check.name, Text(check.status, colours[check.status]), check.detail, check.advice)
    output.console().print(table)
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        output.fail(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


_OTHERS = (launch.launch, compare.compare, tables.tables, chat.chat, report.report, audit.audit, ladder.ladder)
for command in (*store.COMMANDS, *_OTHERS):
    app.command()(command)
app.add_typer(nightly.app, name="nightly")
app.add_typer(sweep.app, name="sweep")

if __name__ == "__main__":
    app()
