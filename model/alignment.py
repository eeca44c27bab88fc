"""Distilling the diffusion teacher into the Q-Former: Eq. 4-7 and 9 of the paper, each a function, and their networks.

What the paper leaves open is a switch of `AlignmentConfig`; docs/method.md lists them with the reasons.
Letters as in `model/__init__.py`, and here N is however many tokens are to be pooled: the Q queries, or all of them.

With L_i = -cos as written, the gate's gradient -cos is negative as soon as a level agrees with the teacher, so a free
gate drifts to 1: "adaptive" is then partly a larger lambda. `AlignmentReport` carries what is needed to see it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AlignmentConfig, GateInput, HeadKind, LossForm, Reduction, TargetForm

# A weight above this share of the largest that the weighting allows counts as saturated in the report.
SATURATED = 0.99
# Width of both hidden layers of REPA's projector (REPA:models/sit.py:16-23).
REPA_WIDTH = 2048
_OfGate = Callable[[nn.Module, Tensor, Tensor, GateInput], Tensor]
# L_i of a level that is orthogonal to y*.
_LOSS_AT_RIGHT_ANGLES: dict[LossForm, float] = {"negative_cosine": 0.0, "one_minus_cosine": 1.0}


def prepared_target(targets: Tensor, target_mean: Tensor, form: TargetForm) -> Tensor:
    """The y* of Eq. 4 and 6 from the teacher's vectors; [..., D] and their running mean [D] -> [..., D] float32."""
    match form:
        case "raw":
            return targets.float()
        case "centred":
            return targets.float() - target_mean
        case "layer_norm":
            return F.layer_norm(targets.float(), targets.shape[-1:])


def alignment_loss(projected: Tensor, target: Tensor, form: LossForm) -> Tensor:
    """Eq. 4 and, level by level, Eq. 5: L_i = -cos(h_phi_i(h_i), y*), or 1 - cos; [..., D] twice -> [...] float32."""
    return _LOSS_AT_RIGHT_ANGLES[form] - F.cosine_similarity(projected.float(), target.float(), dim=-1)


def gate_score(gate: nn.Module, projected: Tensor, target: Tensor, form: GateInput) -> Tensor:
    """g_psi of h_phi_i(h_i) + y*, or of what `form` makes of the two; [..., D] twice -> [...] float32."""
    projected, target = torch.broadcast_tensors(projected.float(), target.float())
    match form:
        case "sum":
            read = projected + target
        case "concat":
            read = torch.cat([projected, target], dim=-1)
        case "normalised_sum":
            read = F.normalize(projected, dim=-1) + F.normalize(target, dim=-1)
    scores: Tensor = gate(read)
    return scores.float().squeeze(-1)


def adaptive_weight(gate: nn.Module, projected: Tensor, target: Tensor, form: GateInput) -> Tensor:
    """Eq. 6: w_i = sigmoid(g_psi(h_phi_i(h_i) + y*)), each level for itself; [..., D] twice -> [...] float32."""
    return torch.sigmoid(gate_score(gate, projected, target, form))


def competing_weights(scores: Tensor) -> Tensor:
    """In place of Eq. 6: w_i = U softmax_i(g_psi(...)), on the mean over the levels 1; [..., U] -> [..., U]."""
    return scores.shape[-1] * torch.softmax(scores, dim=-1)


def distillation_loss(
    losses: Tensor,
    weights: Tensor,
    valid: Tensor | None = None,
    *,
    level_reduction: Reduction,
    frame_reduction: Reduction,
) -> Tensor:
    """Eq. 7: L_kd = sum_i w_i L_i over the levels, or their mean; then over frames; then the mean over clips.

    Both are [B, T, N, U], with N = 1 where tokens were pooled before; tokens are averaged, those of `valid` [B, N].
    """
    per_level = mean_over_tokens(weights * losses, valid)  # [B, T, U]
    per_frame = _reduce(per_level, level_reduction, dim=2)  # [B, T]
    return _reduce(per_frame, frame_reduction, dim=1).mean()


def total_loss(answer_loss: Tensor, kd_loss: Tensor, kd_weight: float) -> Tensor:
    """Eq. 9: L = L_ce + lambda L_kd."""
    return answer_loss + kd_weight * kd_loss


def mean_over_tokens(values: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T, N, X] -> [B, T, X], over the tokens of `valid` [B, N] bool; each clip needs one, None takes all."""
    if valid is None:
        return values.mean(dim=2)
    chosen = valid[:, None, :, None]
    return values.masked_fill(~chosen, 0).sum(dim=2) / chosen.sum(dim=2)


@dataclass(frozen=True)
class AlignmentReport:
    """What one batch's distillation looked like, as means over clips, frames and tokens; all detached.

    Attributes:
        levels: the aligned levels u, in order.
        cosine: [U] cosine between each projected level and y*.
        weight: [U] weight of each level.
        saturated: share of weights above 0.99 of the largest possible, which is U for softmax and else 1.
        target_to_mean: cosine between the teacher's y*, centred or not, and its running mean; near 1, y* is the same
            for every frame. 0 before anything was observed.
    """

    levels: tuple[int, ...]
    cosine: Tensor
    weight: Tensor
    saturated: Tensor
    target_to_mean: Tensor

    @classmethod
    def mean(cls, reports: Sequence["AlignmentReport"], frames: Sequence[int]) -> "AlignmentReport":
        """The report of whole clips from those of their parts, which had so many frames each."""
        assert len({report.levels for report in reports}) == 1, "parts of one clip have the same levels"
        shares = [count / sum(frames) for count in frames]

        def over(parts: Iterable[Tensor]) -> Tensor:
            return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(dim=0)

        return cls(
            levels=reports[0].levels,
            cosine=over(report.cosine for report in reports),
            weight=over(report.weight for report in reports),
            saturated=over(report.saturated for report in reports),
            target_to_mean=over(report.target_to_mean for report in reports),
        )


class Alignment(nn.Module):
    """The heads h_phi_i, the gates g_psi and the running mean of y*; used in training only.

    Args:
        hidden_width: H of the Q-Former.
        target_width: D of the teacher.
        num_levels: levels the Q-Former has, 13 for 12 layers.

    Attributes:
        target_mean: [D] float32 buffer, mean of every y* observed so far.
        targets_seen: int64 scalar buffer, how many those were.

    Raises:
        ValueError: a level is asked for that the Q-Former does not have.
    """

    target_mean: Tensor
    targets_seen: Tensor

    def __init__(self, config: AlignmentConfig, *, hidden_width: int, target_width: int, num_levels: int) -> None:
        super().__init__()
        if not config.levels:
            raise ValueError("alignment.levels is empty; set alignment.kd_weight=0 to train without distillation")
        if max(config.levels) > num_levels:
            raise ValueError(f"alignment.levels {config.levels}: this Q-Former has levels 1...{num_levels}")
        self.config = config
        self.target_width = target_width
        self.num_levels = num_levels
        num_heads = 1 if config.shared_head else len(config.levels)
        self.heads = nn.ModuleList(_head(config.head, hidden_width, target_width) for _ in range(num_heads))
        self.gates = nn.ModuleList(
            _mlp(target_width * (2 if config.gate_input == "concat" else 1), config.gate_width, 1)
            for _ in range(_num_gates(config))
        )
        self.register_buffer("target_mean", torch.zeros(target_width, dtype=torch.float32))
        self.register_buffer("targets_seen", torch.zeros((), dtype=torch.int64))
        # Heads are named by their place, so a checkpoint stores which levels the places stand for.
        self.register_buffer("level_numbers", torch.tensor(config.levels))

    @torch.no_grad()
    def observe(self, targets: Tensor) -> None:
        """Take y* [B, T, D] into the running mean; once per training step, before the forward."""
        if seen := targets.shape[0] * targets.shape[1]:
            self.observe_mean(targets.float().mean(dim=(0, 1)), seen)

    def observe_mean(self, mean: Tensor, seen: int) -> None:
        """Like `observe`, of targets whose mean [D] is known, and their number."""
        self.targets_seen += seen
        self.target_mean += (mean - self.target_mean) * (seen / self.targets_seen)

    def part_of(self, frames: int, total: int) -> float:
        """What to multiply L_kd over `frames` of a clip's `total` distilled frames with, so that the parts add up."""
        return frames / total if self.config.frame_reduction == "mean" else 1.0

    def forward(
        self, levels: Sequence[Tensor], targets: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, AlignmentReport]:
        """L_kd of the given frames, and what it was made of; changes no state.

        All of it is float32, under autocast too: in bfloat16 the gradients of heads and gate would be some 0.7 % off.

        Args:
            levels: all of the Q-Former's levels, each [B, T, N, H], with the tokens that are to be pooled.
            targets: y* [B, T, D].
            valid: [B, N] bool, False on padding, whose values then reach nothing; None where there is none.

        Raises:
            ValueError: y* has another width than the heads, or is to be centred before any was observed.
        """
        self._require_fits(levels, targets)
        with torch.autocast(targets.device.type, enabled=False):
            return self._in_float32(levels, targets, valid)

    def _in_float32(
        self, levels: Sequence[Tensor], targets: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, AlignmentReport]:
        target = prepared_target(targets.detach(), self.target_mean, self.config.target)[:, :, None]  # [B, T, 1, D]
        projected = [
            self._project(_of_level(self.heads, number), levels[level - 1], valid)
            for number, level in enumerate(self.config.levels)
        ]  # each [B, T, N or 1, D]
        losses = torch.stack([alignment_loss(part, target, self.config.loss) for part in projected], dim=-1)
        weights = self._weights(projected, target)  # both [B, T, N or 1, U]
        left = valid if self.config.pooling == "loss" else None
        kd_loss = distillation_loss(
            losses,
            weights,
            left,
            level_reduction=self.config.level_reduction,
            frame_reduction=self.config.frame_reduction,
        )
        return kd_loss, self._report(losses.detach(), weights.detach(), left, targets.detach())

    def _require_fits(self, levels: Sequence[Tensor], targets: Tensor) -> None:
        assert targets.shape[1], "there is no mean over no frames"
        assert len(levels) == self.num_levels, "all of the Q-Former's levels are passed, not the aligned ones"
        if targets.shape[-1] != self.target_width:
            raise ValueError(f"y* has {targets.shape[-1]} entries; the alignment was built for {self.target_width}")
        if self.config.target == "centred" and not self.targets_seen:
            raise ValueError("alignment.target=centred needs targets to be observed before the first loss")

    def _project(self, head: nn.Module, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """h_phi_i(h_i) of one level, [B, T, N, H] -> [B, T, 1, D], or [B, T, N, D] where the loss pools."""
        hidden = hidden.float()
        if valid is not None:
            # Before the head, so that not even a NaN in the padding gets into a gradient.
            hidden = hidden.masked_fill(~valid[:, None, :, None], 0)
        if self.config.pooling == "before":
            hidden = mean_over_tokens(hidden, valid)[:, :, None]
        projected: Tensor = head(hidden)
        return mean_over_tokens(projected, valid)[:, :, None] if self.config.pooling == "after" else projected

    def _weights(self, projected: Sequence[Tensor], target: Tensor) -> Tensor:
        """w [B, T, N or 1, U] of projected levels, each [B, T, N or 1, D]."""
        config = self.config
        match config.weighting:
            case "average" | "half" | "one" as constant:
                value = {"average": 1 / len(config.levels), "half": 0.5, "one": 1.0}[constant]
                return torch.full((*projected[0].shape[:-1], len(projected)), value, device=target.device)
            case "adaptive":
                weights = self._by_gate(adaptive_weight, projected, target)
            case "softmax":
                weights = competing_weights(self._by_gate(gate_score, projected, target))
        return weights.detach() if config.gate_gradient == "weight_detached" else weights

    def _by_gate(self, value: _OfGate, projected: Sequence[Tensor], target: Tensor) -> Tensor:
        """`value` of each level and its gate, [B, T, N or 1, U]."""
        if self.config.gate_gradient == "input_detached":
            projected = [part.detach() for part in projected]
        gates = (_of_level(self.gates, number) for number in range(len(projected)))
        of_levels = [
            value(gate, part, target, self.config.gate_input) for gate, part in zip(gates, projected, strict=True)
        ]
        return torch.stack(of_levels, dim=-1)

    def _report(self, losses: Tensor, weights: Tensor, left: Tensor | None, targets: Tensor) -> AlignmentReport:
        largest = len(self.config.levels) if self.config.weighting == "softmax" else 1

        def by_level(values: Tensor) -> Tensor:
            return mean_over_tokens(values, left).mean(dim=(0, 1))

        return AlignmentReport(
            levels=self.config.levels,
            cosine=by_level(_LOSS_AT_RIGHT_ANGLES[self.config.loss] - losses),
            weight=by_level(weights),
            saturated=by_level((weights > SATURATED * largest).float()).mean(),
            target_to_mean=F.cosine_similarity(targets.float(), self.target_mean, dim=-1).mean(),
        )


def _reduce(values: Tensor, reduction: Reduction, dim: int) -> Tensor:
    return values.sum(dim=dim) if reduction == "sum" else values.mean(dim=dim)


def _of_level(modules: nn.ModuleList, number: int) -> nn.Module:
    """The level's own network, or the shared one."""
    return modules[number if len(modules) > 1 else 0]


def _num_gates(config: AlignmentConfig) -> int:
    if config.weighting not in ("adaptive", "softmax"):
        return 0
    return 1 if config.shared_gate else len(config.levels)


def _head(kind: HeadKind, hidden_width: int, target_width: int) -> nn.Module:
    """h_phi of Eq. 4 (docs/method.md)."""
    match kind:
        case "mlp":
            return _mlp(hidden_width, target_width, target_width)
        case "linear":
            return nn.Linear(hidden_width, target_width)
        case "repa":
            return nn.Sequential(
                nn.Linear(hidden_width, REPA_WIDTH),
                nn.SiLU(),
                nn.Linear(REPA_WIDTH, REPA_WIDTH),
                nn.SiLU(),
                nn.Linear(REPA_WIDTH, target_width),
            )


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a GELU between: the default of h_phi (Eq. 4) and of g_psi (Eq. 6)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
