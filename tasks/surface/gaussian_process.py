"""A second look at an optimum that assumes no parabola: a Gaussian process over log2(learning rate). Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Lengths over which a score changes, in octaves, and noise variance over signal variance: the most likely pair counts.
LENGTHS = np.array([0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NOISE_RATIOS = np.array([1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0])
_STEP = 1 / 32  # octaves


def gp_optimum(u: Floats, y: Floats) -> float:
    """Where the mean of the process is highest, between the lowest and the highest rate.

    Squared exponential kernel; length and noise by marginal likelihood (Rasmussen and Williams, 2006, equation 5.8,
    with the signal's variance integrated out at its maximum). The mean of the process far from the data is that of `y`.

    Args:
        u: log2 learning rates, (num_points,); repeats are repeats.
        y: scores without their seed's level, (num_points,).

    Raises:
        ValueError: fewer than three rates.
    """
    if len(np.unique(u)) < 3:
        raise ValueError(f"a process needs three learning rates, {len(np.unique(u))} were given; add rates")
    centred = y - y.mean()
    grid = np.arange(u.min(), u.max() + _STEP / 2, _STEP)
    best, means = -np.inf, np.zeros_like(grid)
    for length in LENGTHS:
        kernel = np.exp(-0.5 * ((u[:, None] - u[None]) / length) ** 2)
        for ratio in NOISE_RATIOS:
            root = np.linalg.cholesky(kernel + ratio * np.eye(len(u)))
            half = np.linalg.solve(root, centred)
            # -2 log likelihood without constants, at the most likely variance half @ half / n.
            likelihood = -len(u) * np.log(max(float(half @ half), 1e-300)) - 2 * np.log(np.diag(root)).sum()
            if likelihood > best:
                best = likelihood
                across = np.exp(-0.5 * ((grid[:, None] - u[None]) / length) ** 2)
                means = across @ np.linalg.solve(root.T, half)
    return float(grid[int(np.argmax(means))])
