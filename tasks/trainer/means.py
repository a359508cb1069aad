"""Logged means over everything since the last log, whatever the micro-batches were."""

from __future__ import annotations

import math
from collections.abc import Collection, MutableMapping, Sequence


def weigh(
    metrics: MutableMapping[str, list[float]],
    weights: Sequence[float],
    means: Collection[str],
    lowest: str | None = None,
    highest: str | None = None,
) -> None:
    """Replace the values of the micro-batches by one: TRL logs their plain mean, in which short ones count for more.

    Args:
        metrics: name -> one value a micro-batch, as TRL collects them.
        weights: what each micro-batch is worth: its tokens, or its pairs.
        means: metrics that are means over these tokens or pairs.
        lowest, highest: metrics that are the extremes of a micro-batch.
    """
    total = math.fsum(weights)
    for name, values in metrics.items():
        if name in means:
            products = [value * weight for value, weight in zip(values, weights, strict=True)]
            metrics[name] = [math.fsum(products) / total if total else 0.0]
        elif name in (lowest, highest):
            extreme = min if name == lowest else max
            # NaN: of a micro-batch all of whose completions are masked out.
            metrics[name] = [extreme((value for value in values if not math.isnan(value)), default=math.nan)]
