"""`smoltulu nightly`: the baseline that nights compare with, and what they told. Needs no server, imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from smoltulu.flows.cli.output import console, echo, failures, print_json, table
from smoltulu.flows.cli.store import JsonOption, StoreOption, open_catalogue

if TYPE_CHECKING:
    from smoltulu.schemas.nightly import MeasuredModel

app = typer.Typer(help="The nights of a recipe: what they are compared with, and what they told.", no_args_is_help=True)
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="name of the recipe; needed where the store has nights or runs of several"),
]


@app.command()
def pin(
    what: Annotated[str, typer.Argument(help="a run; or an evaluation or evaluated model, by key or tag")],
    of: Annotated[
        str | None, typer.Option("--for", help="evaluation that it is the baseline of, if not its own: evaluation-dpo")
    ] = None,
    recipe: RecipeOption = None,
    store: StoreOption = None,
) -> None:
    """Pin a baseline: every later night is compared with it, until another is pinned. gc keeps it."""
    from smoltulu.flows.nights import baselines
    from smoltulu.tasks.nightly import pins

    catalogue = open_catalogue(store)
    with failures():
        chosen = baselines.chosen(catalogue, what, of)
        name = recipe or baselines.recipe_of(catalogue, what)
        before = pins.pin(catalogue.root, name, chosen, what)
    for node, measured in chosen.items():
        earlier = f" (before: {_name(before[node].measured)})" if node in before else ""
        echo(f"{name}: baseline of {node} is {_name(measured)}{earlier}")


@app.command()
def unpin(
    evaluations: Annotated[list[str] | None, typer.Argument(help="e.g. evaluation-sft; all unless given")] = None,
    recipe: RecipeOption = None,
    store: StoreOption = None,
) -> None:
    """Let go of baselines. Who pinned and unpinned, and when, stays recorded."""
    from smoltulu.flows.nights import baselines
    from smoltulu.tasks.nightly import pins

    catalogue = open_catalogue(store)
    with failures():
        name = recipe or baselines.only_recipe(catalogue)
        before = pins.unpin(catalogue.root, name, evaluations or [])
    for node, one in before.items():
        was = f"it was {_name(one.measured)}, pinned {one.pinned_at} by {one.pinned_by}"
        echo(f"{name}: {node} has no baseline any more; {was}")


@app.command()
def show(
    limit: Annotated[int, typer.Option(min=1, help="newest nights only")] = 14,
    recipe: RecipeOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the baselines of a recipe, who pinned them and when, and what its nights told."""
    from dataclasses import asdict

    from smoltulu.flows.nights import baselines
    from smoltulu.tasks.nightly.history import History
    from smoltulu.tasks.nightly.pins import read_pins

    catalogue = open_catalogue(store)
    with failures():
        name = recipe or baselines.only_recipe(catalogue)
        pins = read_pins(catalogue.root, name)
        history = History(catalogue.root, name)
        rows = history.read(set_aside=False)
    nights = [row for row in rows if row.kind == "night"][-limit:]
    if as_json:
        shown = {night.run for night in nights}
        print_json({"recipe": name, "pins": pins.model_dump(mode="json")["pins"],
                    "nights": [asdict(row) for row in rows if row.run in shown], "notes": history.notes})  # fmt: skip
        return
    out = console()
    pinned = table("baseline of", "evaluation", "pinned as", "by", "at", "until", title=name)
    for one in pins.pins:
        until = f"{one.unpinned_at} by {one.unpinned_by}" if one.unpinned_at else "now"
        pinned.add_row(one.node, _name(one.measured), one.named, one.pinned_by, one.pinned_at, until)
    out.print(pinned if pins.pins else f"{name}: no baseline; `smoltulu nightly pin` chooses one")
    if nights:
        told = table("night", "run", "went", "told", whole=("night",))
        for row in nights:
            told.add_row(row.at, row.run, row.verdict, row.reason)
        out.print(told)
    else:
        out.print("no night yet")
    for note in history.notes:
        echo(f"note: {note}", err=True)


def _name(one: MeasuredModel) -> str:
    return f"{one.stage}/{one.key[:12]} {one.generation}"
