"""The losses of DPO by name, as functions of log-probability ratios. Pure torch; formulas in docs/stages/dpo.md.

Of a pair, c and r are the log-ratios of the chosen and the rejected completion, log pi - log pi_ref, summed over the
tokens that count; n_c and n_r are the numbers of those tokens. m = c - r is the margin, sigma the logistic function.
All tensors are (batch,); every loss gives (batch,), one loss a pair, without a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from smoltulu.schemas.training import PreferenceLoss


@dataclass(frozen=True)
class LogRatios:
    """Of each pair the summed log-ratios and the numbers of tokens they are sums over; all (batch,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    num_chosen: torch.Tensor
    num_rejected: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """m = c - r."""
        return self.chosen - self.rejected

    @property
    def normalised_margins(self) -> torch.Tensor:
        """c / n_c - r / n_r."""
        return self.chosen / self.num_chosen - self.rejected / self.num_rejected


def to_reference(batch: Mapping[str, torch.Tensor], chosen: torch.Tensor, rejected: torch.Tensor) -> LogRatios:
    """Log-probabilities of the first pairs of a batch against the reference's."""
    num_pairs = len(chosen)
    return LogRatios(
        chosen - batch["reference_chosen"][:num_pairs],
        rejected - batch["reference_rejected"][:num_pairs],
        batch["num_chosen"][:num_pairs],
        batch["num_rejected"][:num_pairs],
    )


def preference_loss(
    loss_type: PreferenceLoss, ratios: LogRatios, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Loss of each pair, (batch,). `label_smoothing` only where the loss has one: the settings see to that."""
    if loss_type in _SMOOTHED:
        return _SMOOTHED[loss_type](ratios, beta, label_smoothing)
    return _PLAIN[loss_type](ratios, beta)


def sigmoid_norm(ratios: LogRatios, beta: float) -> torch.Tensor:
    """-log sigma(beta (c / n_c - r / n_r)). Length-normalised DPO: Tulu 3, arXiv 2411.15124 section 5 (dpo_norm)."""
    return -logsigmoid(beta * ratios.normalised_margins)


def sigmoid(ratios: LogRatios, beta: float) -> torch.Tensor:
    """-log sigma(beta m). DPO, arXiv 2305.18290 eq. 7."""
    return -logsigmoid(beta * ratios.margins)


def hinge(ratios: LogRatios, beta: float) -> torch.Tensor:
    """max(0, 1 - beta m). SLiC, arXiv 2305.10425, on DPO's rewards (RSO, arXiv 2309.06657)."""
    return torch.relu(1 - beta * ratios.margins)


def ipo(ratios: LogRatios, beta: float) -> torch.Tensor:
    """(c / n_c - r / n_r - 1 / (2 beta))^2. IPO, arXiv 2310.12036 eq. 17, beta its tau.

    The averages over tokens are TRL's, agreed with the authors; the paper writes sums.
    """
    return (ratios.normalised_margins - 1 / (2 * beta)) ** 2


def nca_pair(ratios: LogRatios, beta: float) -> torch.Tensor:
    """-log sigma(beta c) - (log sigma(-beta c) + log sigma(-beta r)) / 2. NCA for pairs, arXiv 2402.05369."""
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(ratios: LogRatios, beta: float) -> torch.Tensor:
    """1 - sigma(beta c) + sigma(beta r). APO-zero, arXiv 2408.06266 eq. 7: chosen up, rejected down."""
    return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down(ratios: LogRatios, beta: float) -> torch.Tensor:
    """sigma(beta c) + 1 - sigma(beta m). APO-down, arXiv 2408.06266 eq. 8: both down, rejected further."""
    return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * ratios.margins)


def sppo_hard(ratios: LogRatios, beta: float) -> torch.Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. SPPO, arXiv 2405.00675 eq. 4.7, win rates 1 and 0, eta = 1/beta."""
    return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2


def robust(ratios: LogRatios, beta: float, label_smoothing: float) -> torch.Tensor:
    """-((1 - e) log sigma(beta m) - e log sigma(-beta m)) / (1 - 2 e). Robust DPO, arXiv 2403.00409.

    e = label_smoothing is the share of flipped pairs; without it the loss is DPO's.
    """
    right, flipped = logsigmoid(beta * ratios.margins), logsigmoid(-beta * ratios.margins)
    return -((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(ratios: LogRatios, beta: float, label_smoothing: float) -> torch.Tensor:
    """KL of (sigma(beta m), sigma(-beta m)) from (1 - e, e), e = label_smoothing. EXO, arXiv 2402.00856 eq. 16."""
    right, wrong = beta * ratios.margins, -beta * ratios.margins
    return torch.sigmoid(right) * (logsigmoid(right) - math.log1p(-label_smoothing)) + torch.sigmoid(wrong) * (
        logsigmoid(wrong) - math.log(label_smoothing)
    )


# By the names in `PreferenceLoss`.
_PLAIN: dict[str, Callable[[LogRatios, float], torch.Tensor]] = {
    loss.__name__: loss for loss in (sigmoid_norm, sigmoid, hinge, ipo, nca_pair, apo_zero, apo_down, sppo_hard)
}
_SMOOTHED: dict[str, Callable[[LogRatios, float, float], torch.Tensor]] = {"robust": robust, "exo_pair": exo_pair}
