"""Overrides that make the world and the base model of `tiny` as small as its stages can bear."""

from __future__ import annotations

from typing import Any

#: After a handful of steps no model knows when to stop.
LENIENT_GATE = {"num_prompts": 2, "max_new_tokens": 8, "min_stopped_share": 0}
SMALL_TINY: dict[str, Any] = {
    "world.num_pretrain": 200,
    "world.num_sft": 300,
    "world.num_preference": 120,
    "world.num_rlvr": 120,
    "world.num_eval_arithmetic": 40,
    "world.num_eval_instructions": 20,
    "world.num_eval_verified": 40,
    "world.num_preference_eval": 40,
    "world.planted_sft": 5,
    "world.planted_preference": 3,
    "world.planted_rlvr": 3,
    "base_model.scratch.num_steps": 5,
    "base_model.scratch.num_hidden_layers": 2,
    "base_model.scratch.hidden_size": 32,
    "base_model.scratch.intermediate_size": 64,
    "base_model.scratch.num_attention_heads": 2,
    "sft.gate": LENIENT_GATE,
    "dpo.gate": LENIENT_GATE,
    "rlvr.gate": LENIENT_GATE,
}
