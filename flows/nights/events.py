"""Events of a night, for Prefect's automations (docs/nightly.md has examples). Sent with or without a server."""

from __future__ import annotations

import contextlib
from typing import Any

from prefect.events import emit_event

from smoltulu.tasks.comparison.night import Night, change_text, repetition_text

PREFIX = "smoltulu.evaluation"
#: Every event, and when it is sent.
EVENTS = {
    f"{PREFIX}.night": "a night told its verdict; where none comes for a day, no night ran",
    f"{PREFIX}.loss": "scores fell, at the level that a quarter allows; the flow fails",
    f"{PREFIX}.watch": "scores fell below the night's 5 % only",
    f"{PREFIX}.harness-changed": "the same weights gave other samples",
    f"{PREFIX}.model-failed": "a model could not be measured; the flow fails",
    f"{PREFIX}.absence": "nights before this one did not run",
}


def events_of(night: Night) -> list[tuple[str, dict[str, Any]]]:
    """Events and their payloads, that of the night itself last."""
    found: list[tuple[str, dict[str, Any]]] = []
    for verdict in ("loss", "watch"):
        if changes := night.of(verdict):
            texts = [change_text(one) for one in changes]
            found.append((verdict, {"message": "; ".join(texts), "changes": texts}))
    if night.changed:
        texts = [repetition_text(one) for one in night.changed]
        found.append(("harness-changed", {"message": "; ".join(texts), "changes": texts}))
    if night.failed:
        texts = [f"{model}: {why}" for model, why in night.failed.items()]
        found.append(("model-failed", {"message": "; ".join(texts), "models": list(night.failed)}))
    if night.num_missed:
        found.append(("absence", {"message": night.message(), "num_nights": night.num_missed}))
    return [*found, ("night", {"message": night.message(), "went_well": night.went_well})]


def send(recipe: str, night: Night) -> None:
    """Send the events of a night. A server that is gone must not cost the verdict."""
    resource = {"prefect.resource.id": f"smoltulu.recipe.{recipe}", "prefect.resource.name": recipe}
    for name, payload in events_of(night):
        with contextlib.suppress(Exception):
            emit_event(event=f"{PREFIX}.{name}", resource=resource, payload=payload)
