"""A sweep at a glance, as plain values: its blocks by state, what failed, hours, memory, disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smoltulu.flows.sweeping.extension import with_extension
from smoltulu.flows.sweeping.forecast import BlockForecast, Needs, by_block, check_limit, estimate, forecast_of, kind_of
from smoltulu.flows.sweeping.grid import cells_of
from smoltulu.flows.sweeping.states import CellState, known_states, records_of, states_of, sweep_folder
from smoltulu.schemas.sweep import Place, SweepSettings, places
from smoltulu.tasks.engine.stores import open_store


def status_of(asked: SweepSettings, store_root: Path) -> dict[str, Any]:
    """What the last runs left, from what they wrote down: no graph is built. Plain JSON values.

    ValueError where the record, or what was added to the sweep, cannot be read.
    """
    folder = sweep_folder(store_root, asked.name)
    sweep = with_extension(asked, folder)
    states = known_states(store_root, folder, places(sweep))
    forecast = forecast_of(sweep, store_root, states.values())
    ended = [one for one in states.values() if one is not None and one.message]
    return {
        "sweep": sweep.name,
        "store": str(store_root),
        **_totals(sweep, by_block(sweep, forecast, states)),
        "failed": _messages(ended, "failed"),
        "diverged": _messages(ended, "diverged"),
    }


def plan_of(asked: SweepSettings, store_root: Path) -> dict[str, Any]:
    """What a run would do: as `status_of`, by today's keys, with memory and disk of a cell of every kind.

    ValueError for what a run would refuse before anything is trained.
    """
    folder = sweep_folder(store_root, asked.name)
    sweep = with_extension(asked, folder)
    cells = list(cells_of(sweep, unresolved="keep"))
    states: Mapping[Place, CellState | None] = {
        one.cell.place: one for one in states_of(store_root, folder, records_of(cells))
    }
    forecast = forecast_of(sweep, store_root, states.values())
    missing = {place for place, one in states.items() if one is None or one.state not in ("done", "diverged")}
    store = open_store(cells[0].graph.compute, checked=False)
    # Of every kind a cell that is missing, if there is one: of a finished one nothing is left to do.
    needs = estimate(forecast, sorted(cells, key=lambda cell: cell.place not in missing), store)
    shared = dict(item for one in needs.values() for item in one.shared.items())
    blocks = by_block(sweep, forecast, states)
    try:
        note, refusal = check_limit(sweep, blocks), None
    except ValueError as error:
        note, refusal = None, str(error)
    first = cells[0].graph
    return {
        "sweep": sweep.name,
        "recipe": sweep.recipe,
        "stage": sweep.stage,
        "store": str(store_root),
        **_totals(sweep, blocks),
        "num_workers": sweep.num_workers,
        "max_hours": sweep.max_hours,
        "device_memory_gb": first.compute.device_memory_gb,
        "needs": _needs(needs, missing),
        "shared": [{"key": key, "node": node, "status": status} for key, (node, status) in shared.items()],
        "unresolved": sorted({f"{one.repository}@{one.revision}" for cell in cells for one in cell.graph.unresolved}),
        "note": note,
        "refusal": refusal,
    }


def _needs(needs: Mapping[Any, Needs], missing: Iterable[Place]) -> dict[str, Any]:
    """Of the smallest and the largest cell, and what the models of all missing ones take."""
    memory = [one.device_bytes for one in needs.values() if one.device_bytes is not None]
    disk = [needs[kind_of(place)].disk_bytes for place in missing]
    return {
        "device_bytes": [min(memory), max(memory)] if memory else None,
        "disk_bytes": sum(known) if (known := [one for one in disk if one is not None]) else None,
        "num_without_disk_bytes": len(disk) - len(known),
    }


def _totals(sweep: SweepSettings, blocks: Sequence[BlockForecast]) -> dict[str, Any]:
    num_cells = sum(one.num_cells for one in blocks)
    return {
        "blocks": [
            {
                "name": one.name,
                **one.counts,
                "cells": one.num_cells,
                "missing": one.num_missing,
                "seconds": one.seconds,
                "cells_without_forecast": one.num_unknown,
                "forecast_from": list(one.bases),
            }
            for one in blocks
        ],
        "cells": num_cells,
        "missing": sum(one.num_missing for one in blocks),
        "seconds": sum(one.seconds for one in blocks),
        "cells_without_forecast": sum(one.num_unknown for one in blocks),
    }


def _messages(ended: Sequence[CellState], state: str) -> list[dict[str, str]]:
    return [{"cell": one.cell.place.name, "message": one.message} for one in ended if one.state == state]
