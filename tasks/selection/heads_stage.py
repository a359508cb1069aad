"""Stage `selection_heads`: the heads of a model that copy, with the evidence that they do.

Probes that only copying can answer (`probes.py`) give every head a retrieval score (`retrieval.py`). The highest are
chosen (`heads.py`). Then they are masked, and random sets of the same layers too: the chosen ones must cost more, or
the scores mean nothing. The domain in which an influence is compared with the number of lookups are graded probes: of
one length, with none to as many answers shown as fit, so that only the lookups differ.

heads.json has: model (digest of its folder, num_layers, num_heads, num_parameters, planted: whether it began with a
copying circuit written by hand, tasks/base_model/copying.py), mask, rule, threshold, top_share,
scores (layer x head), chosen ([layer, head], highest score first), probes (what they are, and how well the model does
them), control (plain, chosen and random: heads, accuracy, correlation), single_heads (accuracy with one head masked,
layer x head; null where that is dear), resampled, gates (name, passed, sentence). The work goes on after a kill where
it stopped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.files import made_from_folder, write_atomically
from smoltulu.artifacts.keys import canonical_json, folder_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.selection import Head, SelectionHeadsConfig, SelectionHeadsInputs, SelectionHeadsOutputs
from smoltulu.tasks.base_model.copying import PLANTED
from smoltulu.tasks.models.folders import device_of, load_tokenizer
from smoltulu.tasks.selection.attention import HeadPlace, attention_modules
from smoltulu.tasks.selection.heads import (
    Effect,
    choose_heads,
    gates,
    random_sets,
    rank_correlation,
)
from smoltulu.tasks.selection.masking import masked_passes
from smoltulu.tasks.selection.probes import Probe, make_graded_probes, make_probes
from smoltulu.tasks.selection.retrieval import (
    Reading,
    batch_of,
    choices,
    read_probes,
    retrieval_scores,
)
from smoltulu.tasks.selection.scoring import influence_score, selector_model, token_losses
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.prepare import prepare_torch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger("smoltulu")

#: Probes that are kept together: what a kill can cost.
PART_PROBES = 8
#: Every head is masked by itself where that takes at most so many FLOPs: a minute on one core.
SINGLE_HEADS_FLOPS = 1e12
ADVICE = (
    "a selector model that cannot do this ranks rows by nothing. Choose selection.method rds_plus or length; or give "
    "selection.model a larger model, or one that learned to copy (scratch: {texts: copying}); or set selection.gate to "
    "warn to go on all the same"
)


def find_heads(
    config: SelectionHeadsConfig, inputs: SelectionHeadsInputs, context: StageContext
) -> tuple[SelectionHeadsOutputs, dict[str, float]]:
    """Score all heads, choose those that copy, and test the choice.

    Raises:
        ValueError: a model whose heads cannot be told; probes longer than its context; no score above zero; no head
            that the rule chooses; a loss that is no number; with gate `stop`, a gate that fails.
    """
    prepare_torch(context)
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    model = selector_model(Path(inputs.model), tokenizer).to(device_of(context.compute))
    num_layers, num_heads = len(attention_modules(model)), model.config.get_text_config().num_attention_heads
    planted = bool(getattr(model.config, PLANTED, False))
    if planted:
        logger.warning(
            "the selector model began with a copying circuit that was written into its weights (scratch texts): that "
            "it has heads that copy is no finding"
        )
    _check_context(model, config)
    settings = config.probes
    probes, others = make_probes(tokenizer, settings), make_probes(tokenizer, settings, draw=1)
    graded = make_graded_probes(tokenizer, settings, settings.num_probes)
    singles = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    some = probes[:PART_PROBES]
    flops = 2.0 * model.num_parameters() * len(singles) * sum(len(probe.input_ids) for probe in some)
    parts = _Parts(config, inputs, context, len(probes) + len(others) + len(probes) + len(graded))
    pad = tokenizer.pad_token_id

    readings = parts.readings("probes", probes, lambda part: read_probes(model, part, pad))
    accuracy = sum(reading.is_right for reading in readings) / len(readings)
    scores = retrieval_scores(readings)
    choice = choose_heads(scores, config.heads)
    if not choice.heads:
        raise ValueError(
            f"no head has a retrieval score of {config.heads.threshold:g} (selection.heads.threshold): the largest is "
            f"{max(map(max, scores)):.3f}, and the model does {accuracy:.0%} of the probes; {ADVICE}"
        )
    again = retrieval_scores(parts.readings("others", others, lambda part: read_probes(model, part, pad)))
    resampled = choose_heads(again, config.heads).heads if any(map(any, again)) else []

    sets = [
        choice.heads,
        *random_sets(choice.heads, num_layers, num_heads, config.heads.num_random_sets, settings.seed),
    ]
    right = parts.rows("right", probes, lambda part: _right(model, part, sets, config, pad))
    losses = parts.rows("losses", graded, lambda part: _losses(model, part, sets, config, pad))
    if not all(math.isfinite(loss) for row in losses for loss in row):  # ranks of these would be those of chance
        raise ValueError(
            "the selector model's loss of a probe is no number, with or without some heads; look at its weights, or "
            "give another selection.model"
        )
    lookups = [probe.num_shown + 1 for probe in graded]
    effects = [
        Effect(
            heads,
            sum(row[number] for row in right) / len(right),
            rank_correlation(lookups, [influence_score(row[0], row[number]) for row in losses]),
        )
        for number, heads in enumerate([[], *sets])
    ]
    plain, chosen, *controls = effects
    single_heads = None
    if flops <= SINGLE_HEADS_FLOPS:
        alone = parts.rows("single", some, lambda part: _right(model, part, [[one] for one in singles], config, pad))
        single_heads = [
            [sum(row[1 + layer * num_heads + head] for row in alone) / len(alone) for head in range(num_heads)]
            for layer in range(num_layers)
        ]
    found = gates(accuracy, scores, choice, chosen, controls, config.heads.num_random_sets, resampled)
    failed = [gate.sentence for gate in found if not gate.passed]

    outputs = SelectionHeadsOutputs(
        chosen=tuple(Head(layer=layer, head=head) for layer, head in choice.heads),
        num_layers=num_layers,
        num_heads=num_heads,
        probe_accuracy=accuracy,
        max_score=max(map(max, scores)),
        failed_gates=tuple(failed),
    )
    report = {
        "model": {
            "digest": folder_digest(Path(inputs.model)),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_parameters": model.num_parameters(),
            "planted": planted,
        },
        "mask": config.mask,
        "rule": choice.rule,
        "threshold": config.heads.threshold,
        "top_share": config.heads.top_share,
        "scores": scores,
        "chosen": choice.heads,
        "tied": choice.tied,
        "probes": _described(probes, readings),
        "control": {
            "plain": {"accuracy": plain.accuracy},
            "chosen": chosen._asdict(),
            "random": [control._asdict() for control in controls],
            "num_graded_probes": len(graded),
            "num_lookups": [min(lookups), max(lookups)],
        },
        "single_heads": single_heads,
        "resampled": {"chosen": resampled, "largest_score": max(map(max, again))},
        "gates": [gate._asdict() for gate in found],
    }
    write_atomically(context.folder / outputs.heads_file, json.dumps(report, indent=1, allow_nan=False))
    lines = [_line(probe, reading) for probe, reading in zip(probes, readings, strict=True)]
    write_atomically(context.folder / outputs.probes_file, "".join(lines))
    for gate in found:
        logger.info("%s: %s", "passed" if gate.passed else "FAILED", gate.sentence)
    if failed:
        message = f"the heads of the selector model fail {len(failed)} of {len(found)} gates: {'; '.join(failed)}"
        if config.gate == "stop":
            raise ValueError(f"{message}. {ADVICE[0].upper()}{ADVICE[1:]}")
        logger.warning("%s. selection.gate is warn: scores are made all the same, and prove nothing", message)
    return outputs, {
        "num_chosen_heads": float(len(choice.heads)),
        "probe_accuracy": accuracy,
        "masked_accuracy": chosen.accuracy,
        "largest_score": outputs.max_score,
        "num_failed_gates": float(len(failed)),
    }


def _check_context(model: PreTrainedModel, config: SelectionHeadsConfig) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.probes.max_tokens > longest:
        raise ValueError(
            f"selection.probes.max_tokens is {config.probes.max_tokens:,}, and the selector model reads {longest:,} "
            f"tokens at most: lower it to {longest:,} or less"
        )


class _Parts:
    """Results of some probes at a time, kept in `work`, and progress over all of them."""

    def __init__(
        self, config: SelectionHeadsConfig, inputs: SelectionHeadsInputs, context: StageContext, num_probes: int
    ) -> None:
        made_from = {"config": scientific(config), "model": folder_digest(Path(inputs.model)), "version": 2}
        self.folder = made_from_folder(context.work / "heads", canonical_json(made_from))
        self.context, self.num_probes, self.num_done = context, num_probes, 0

    def rows(self, name: str, probes: Sequence[Probe], compute: Callable[[Sequence[Probe]], list[Any]]) -> list[Any]:
        """`compute` of every probe, a batch at a time; what is in `work` is not computed again."""
        size = self.context.compute.per_device_eval_batch_size
        made: list[Any] = []
        for number, start in enumerate(range(0, len(probes), PART_PROBES)):
            part = probes[start : start + PART_PROBES]
            file = self.folder / f"{name}-{number}.json"
            rows = _read(file, len(part))
            if rows is None:
                rows = [row for first in range(0, len(part), size) for row in compute(part[first : first + size])]
                write_atomically(file, json.dumps(rows))
            made += rows
            self.num_done += len(part)
            self.context.report(min(self.num_done, self.num_probes), self.num_probes)
        return made

    def readings(
        self, name: str, probes: Sequence[Probe], read: Callable[[Sequence[Probe]], list[Reading]]
    ) -> list[Reading]:
        return [Reading(**row) for row in self.rows(name, probes, lambda part: [asdict(one) for one in read(part)])]


def _read(file: Path, num_rows: int) -> list[Any] | None:
    """A finished part; None where the file is missing or damaged."""
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return rows if isinstance(rows, list) and len(rows) == num_rows else None


def _right(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    sets: Sequence[Sequence[HeadPlace]],
    config: SelectionHeadsConfig,
    pad_token_id: int,
) -> list[list[bool]]:
    """For each probe whether the model does it: as it is, and without each of the sets."""
    return _each_pass(
        model, probes, sets, config, pad_token_id,
        lambda hidden, probe: bool(choices(model, hidden, probe).all()),
    )  # fmt: skip


def _losses(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    sets: Sequence[Sequence[HeadPlace]],
    config: SelectionHeadsConfig,
    pad_token_id: int,
) -> list[list[float]]:
    """For each probe its mean loss over all tokens: as the model is, and without each of the sets."""
    import torch

    def text_loss(hidden: torch.Tensor, probe: Probe) -> float:
        ids = torch.tensor(probe.input_ids[1:], device=hidden.device)
        return float(token_losses(model, hidden[: len(ids)], ids).mean())

    return _each_pass(model, probes, sets, config, pad_token_id, text_loss)


def _each_pass(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    sets: Sequence[Sequence[HeadPlace]],
    config: SelectionHeadsConfig,
    pad_token_id: int,
    measure: Callable[[torch.Tensor, Probe], Any],
) -> list[list[Any]]:
    """(num_probes, 1 + num_sets)"""
    import torch

    batch = batch_of(probes, pad_token_id, model.device)
    rows: list[list[Any]] = [[] for _ in probes]
    with torch.no_grad():
        for hidden in masked_passes(model, sets, config.mask, batch):
            for number, probe in enumerate(probes):
                rows[number].append(measure(hidden[number], probe))
    return rows


def _described(probes: Sequence[Probe], readings: Sequence[Reading]) -> dict[str, Any]:
    """What the probes are, and how the model does: over all, and by the third of the object where the pair stands."""
    lengths, pairs = [len(probe.input_ids) for probe in probes], [probe.num_pairs for probe in probes]
    thirds: list[list[bool]] = [[], [], []]
    for probe, reading in zip(probes, readings, strict=True):
        thirds[3 * probe.position // probe.num_pairs].append(reading.is_right)
    chosen = [token for reading in readings for token in reading.chosen]
    return {
        "num_probes": len(probes),
        "num_tokens": [min(lengths), max(lengths)],
        "num_pairs": [min(pairs), max(pairs)],
        "accuracy": sum(reading.is_right for reading in readings) / len(readings),
        "token_accuracy": sum(chosen) / len(chosen),
        "num_counted": sum(reading.counts for reading in readings),
        "accuracy_by_third": [sum(third) / len(third) if third else None for third in thirds],
    }


def _line(probe: Probe, reading: Reading) -> str:
    own = {name: value for name, value in asdict(probe).items() if name != "input_ids"}
    own |= {"num_tokens": len(probe.input_ids), "is_right": reading.is_right, "chosen": reading.chosen}
    return json.dumps(own, ensure_ascii=False) + "\n"


def gate_failures(config: SelectionHeadsConfig, outputs: SelectionHeadsOutputs, metrics: Any) -> list[str]:
    """A stored artifact that was made with gate `warn` still fails with `stop`."""
    return list(outputs.failed_gates) if config.gate == "stop" else []


def _most_flops(config: SelectionHeadsConfig, num_rows: int | None) -> float:
    """Two readings of probes, and both controls without a mask, without the chosen heads and without random sets."""
    num_passes = 2 + 2 * (2 + config.heads.num_random_sets)
    return 2.0 * num_passes * config.probes.num_probes * config.probes.max_tokens


selection_heads = Stage(
    "selection_heads", 1, SelectionHeadsConfig, SelectionHeadsInputs, SelectionHeadsOutputs, find_heads, gate_failures,
    block="selector", eval_batch=True, most_flops=_most_flops,
)  # fmt: skip
