"""Distilling the diffusion teacher into the Q-Former: Eq. 4-7 and 9 of the paper, each a function, and their networks.

Two places of the paper leave room, and are settled as FACTS.md E.1-E.8 says: h is the mean over the query tokens, and
the gate reads the sum of the projected h and y*, both of width D.

With L_i = -cos as written, the gate's gradient -cos is negative as soon as a level agrees with the teacher, so a free
gate drifts to 1: "adaptive" is then partly a larger lambda. `AlignmentReport` carries what is needed to see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AlignmentConfig

# A weight above this counts as saturated in the report.
SATURATED = 0.99


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Eq. 4 and, level by level, Eq. 5: L_i = -cos(h_phi_i(h_i), y*); [..., D] and [..., D] -> [...] float32."""
    return -F.cosine_similarity(projected.float(), target.float(), dim=-1)


def adaptive_weight(gate: nn.Module, projected: Tensor, target: Tensor) -> Tensor:
    """Eq. 6: w_i = sigmoid(g_psi(h_phi_i(h_i) + y*)); [..., D] -> [...]."""
    return torch.sigmoid(gate(projected + target.to(projected.dtype)).float()).squeeze(-1)


def distillation_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """Eq. 7: L_kd = sum_i w_i L_i over the levels, averaged over clips and frames; both [B, T, U] -> scalar."""
    return (weights * losses).sum(dim=-1).mean()


def total_loss(answer_loss: Tensor, kd_loss: Tensor, kd_weight: float) -> Tensor:
    """Eq. 9: L = L_ce + lambda L_kd."""
    return answer_loss + kd_weight * kd_loss


@dataclass(frozen=True)
class AlignmentReport:
    """What one batch's distillation looked like; all detached.

    Attributes:
        levels: the aligned levels u, in order.
        cosine: [U] mean cosine between each projected level and y*.
        weight: [U] mean weight of each level.
        saturated: share of weights above 0.99.
    """

    levels: tuple[int, ...]
    cosine: Tensor
    weight: Tensor
    saturated: Tensor


class Alignment(nn.Module):
    """The heads h_phi_i and the gate g_psi; used in training only.

    Args:
        config: aligned levels and weighting.
        hidden_width: H of the Q-Former.
        target_width: D of the teacher.
        num_levels: levels the Q-Former has, 13 for 12 layers.

    Raises:
        ValueError: a level is asked for that the Q-Former does not have.
    """

    def __init__(self, config: AlignmentConfig, *, hidden_width: int, target_width: int, num_levels: int) -> None:
        super().__init__()
        if not config.levels:
            raise ValueError("alignment.levels is empty; set alignment.kd_weight=0 to train without distillation")
        if max(config.levels) > num_levels:
            raise ValueError(f"alignment.levels {config.levels}: this Q-Former has levels 1...{num_levels}")
        self.config = config
        self.target_width = target_width
        self.heads = nn.ModuleList(_mlp(hidden_width, target_width, target_width) for _ in config.levels)
        self.gate = _mlp(target_width, config.gate_width, 1) if config.weighting == "adaptive" else None

    def forward(self, levels: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, AlignmentReport]:
        """All of the Q-Former's levels, each [B, T, Q, H], and y* [B, T, D] -> L_kd and what it was made of."""
        pooled = (levels[level - 1].mean(dim=2) for level in self.config.levels)  # each [B, T, H]
        projected = torch.stack([head(h) for head, h in zip(self.heads, pooled, strict=True)], dim=2)  # [B, T, U, D]
        target = targets.detach()[:, :, None].expand_as(projected)
        losses = alignment_loss(projected, target)  # [B, T, U]
        weights = self._weights(projected, target)
        report = AlignmentReport(
            levels=self.config.levels,
            cosine=-losses.detach().mean(dim=(0, 1)),
            weight=weights.detach().mean(dim=(0, 1)),
            saturated=(weights.detach() > SATURATED).float().mean(),
        )
        return distillation_loss(losses, weights), report

    def _weights(self, projected: Tensor, target: Tensor) -> Tensor:
        if self.gate is not None:
            return adaptive_weight(self.gate, projected, target)
        constant = {"average": 1 / len(self.config.levels), "half": 0.5, "one": 1.0}[self.config.weighting]
        return torch.full(projected.shape[:-1], constant, device=projected.device)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a GELU between, the default of FACTS.md E.4 and E.5."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
