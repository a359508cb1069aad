"""Stage `world`: a synthetic world that needs no download (word problems and instructions that code can check)."""

from smoltulu.tasks.world.generate import generate_world

__all__ = ["generate_world"]
