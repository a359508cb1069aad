"""`smoltulu chat`: talk to a model of the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoltulu.flows.cli.output import echo, fail, failures
from smoltulu.flows.cli.store import StoreOption, finished, open_catalogue, ref_of

if TYPE_CHECKING:
    from smoltulu.artifacts.manifests import Ref
    from smoltulu.schemas.run import RunRecord


def chat(
    what: Annotated[str, typer.Argument(help="RUN:STAGE (as tiny-…:sft), a tag, first digits of a key, or a folder")],
    say: Annotated[list[str] | None, typer.Option("--say", help="turns to say, one answer each; then end")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    template: Annotated[str | None, typer.Option(help="shipped chat template or file, for the model's own")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0: greedy")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    store: StoreOption = None,
) -> None:
    """Talk to a model of the store, in its own chat template. An empty line or Ctrl-D ends it, /new begins anew."""
    with failures():
        folder = _folder(what, store)
        from smoltulu.tasks.models.conversation import Conversation

        talk = Conversation(
            folder, template=template, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    if not say:
        echo(f"{folder}\nEmpty line: end. /new: begin anew.")
    for text in say or iter(_ask, None):
        if text == "/new":
            talk.forget()
            continue
        try:
            ended = talk.answer(text, _show)
        except ValueError as error:  # no room is left: what was said so far is not lost with it
            if say:
                fail(error)
            echo(f"error: {error}")
            continue
        echo("" if ended else f" [cut after {max_new_tokens:,} tokens]")


def _ask() -> str | None:
    """What the user says; None to end."""
    try:
        return input("> ") or None
    except (EOFError, KeyboardInterrupt):
        return None


def _show(piece: str) -> None:
    # A model writes what it likes: no control character of a terminal but the line's end.
    sys.stdout.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def _folder(what: str, store: Path | None) -> Path:
    """The model's folder. ValueError where something else is meant."""
    from pydantic import TypeAdapter

    from smoltulu.artifacts.manifests import dig
    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.schemas.common import ArtifactPath

    if Path(what).is_dir():
        return Path(what)
    catalogue = open_catalogue(store)

    def models(run: RunRecord) -> dict[str, Ref]:
        made = refs_of_run(run).items()
        return {node: ref for node, ref in made if dig(catalogue.known(ref), "outputs", "folder") is not None}

    found = ref_of(catalogue, what, "model", models)
    generation, manifest = finished(catalogue, found)
    inside = manifest["outputs"].get("folder")
    if inside is not None:
        folder = generation / TypeAdapter(ArtifactPath).validate_python(inside)
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{what} ({found.stage}) is no model; name a model's artifact, e.g. of sft, dpo or rlvr")
