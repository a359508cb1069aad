"""What Prefect is told of a night, and the example automations: as Prefect's own command reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import yaml
from prefect.events import Event
from prefect.events.clients import AssertingEventsClient
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.worker import EventsWorker

from smoltulu.flows.nights import events
from smoltulu.tasks.comparison.night import Repeated
from tests import ROOT
from tests.tasks.comparison.test_night import comparison, night

EXAMPLES = yaml.safe_load((ROOT / "docs" / "examples" / "nightly-automations.yaml").read_text())["automations"]


def test_every_event_of_a_night_with_its_words() -> None:
    everything = night(
        comparison("a", 20), comparison("b", 9), failed={"dpo": "no room"}, num_missed=2,
        repeated=[Repeated("sft", "a", 40, 3), Repeated("sft", "b", 40)],
    )  # fmt: skip
    sent = dict(events.events_of(everything))
    assert {f"{events.PREFIX}.{name}" for name in sent} == events.EVENTS.keys()
    assert sent["loss"]["changes"][0].startswith("sft a 1.0000 -> 0.5000") and len(sent["loss"]["changes"]) == 1
    assert sent["watch"]["changes"][0].startswith("sft b") and sent["model-failed"]["models"] == ["dpo"]
    assert "HARNESS CHANGED: sft a" in sent["harness-changed"]["message"]
    assert sent["absence"]["num_nights"] == 2
    assert sent["night"] == {"message": everything.message(), "went_well": False}
    assert [name for name, _ in events.events_of(night(new=()))] == ["night"]


def test_events_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    AssertingEventsClient.reset()
    worker = EventsWorker.instance(AssertingEventsClient)
    monkeypatch.setattr(EventsWorker, "instance", classmethod(lambda cls, *_: worker))
    events.send("tiny", night(comparison("a", 20)))
    worker.drain()
    sent: list[Event] = [event for client in AssertingEventsClient.all for event in client.events]
    assert [event.event for event in sent] == ["smoltulu.evaluation.loss", "smoltulu.evaluation.night"]
    assert {event.resource.id for event in sent} == {"smoltulu.recipe.tiny"}
    matching = [
        one["name"] for one in EXAMPLES
        if sent[0].event in one["trigger"]["expect"] and _trigger(one).match.matches(sent[0].resource)
    ]  # fmt: skip
    assert matching == ["smoltulu nightly, loss"]


def test_no_server_costs_no_verdict() -> None:
    """In a process of its own: Prefect's sender goes on trying in the background until that ends."""
    code = (
        "from smoltulu.flows.nights import events\nfrom smoltulu.tasks.comparison.night import Night\n"
        "events.send('tiny', Night(failed={'sft': 'no room'}))\nprint('told')"
    )
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "told\n"


def _trigger(example: dict[str, Any]) -> EventTrigger:
    trigger = AutomationCore.model_validate(example).trigger
    assert isinstance(trigger, EventTrigger)
    return trigger


def test_the_examples_are_automations_and_name_every_event() -> None:
    triggers = [_trigger(example) for example in EXAMPLES]
    named = {name for trigger in triggers for name in trigger.expect}
    assert named == events.EVENTS.keys()
    assert [trigger.posture.value for trigger in triggers] == ["Reactive"] * 4 + ["Proactive"]
    assert triggers[-1].within.total_seconds() == 26 * 3600
