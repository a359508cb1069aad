"""Stage `world`: the synthetic data of the recipe `tiny`."""

from __future__ import annotations

from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.world import WorldConfig, WorldOutputs
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.world.generate import generate_world


class NoInputs(StrictModel):
    """The inputs of a stage that needs no other artifact."""


def make_world(config: WorldConfig, inputs: NoInputs, context: StageContext) -> tuple[WorldOutputs, dict[str, float]]:
    """Generate every file of the world into the artifact."""
    outputs = generate_world(config, context.folder)
    return outputs, {f"num_rows_{name}": float(count) for name, count in outputs.num_rows.items()}


world = Stage("world", 2, WorldConfig, NoInputs, WorldOutputs, make_world)
