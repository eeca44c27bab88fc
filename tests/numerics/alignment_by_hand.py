"""L_kd once more: loops over clips, frames, levels and tokens, in float64, with nothing of torch."""

import math
from dataclasses import dataclass

import numpy as np

# Mistakes that `by_hand` makes on request; the tests' tolerances must tell each from the right form.
WRONG = (
    "softmax without U",
    "padding pooled",
    "level below",
    "gate without target",
    "mean weight times mean loss",
    "clips summed",
)


@dataclass
class ByHand:
    """`projected` and `weights` by (clip, frame, level, token); cosine and weight [U] averaged as in the report."""

    kd: float
    cosine: np.ndarray
    weight: np.ndarray
    saturated: float
    projected: dict
    weights: dict


def cosine(left, right):
    return sum(left * right) / math.sqrt(sum(left * left)) / math.sqrt(sum(right * right))


def gelu(value):
    return np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in value])


def silu(value):
    return value / (1 + np.exp(-value))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def network(parameters, name, value):
    """The linear layers called `name`.<place>., in order, with GELU between two of them and SiLU between three."""
    if f"{name}.weight" in parameters:
        return parameters[f"{name}.weight"] @ value + parameters[f"{name}.bias"]
    places = sorted(
        key.removesuffix(".weight") for key in parameters if key.startswith(name) and key.endswith("weight")
    )
    between = {2: gelu, 3: silu}[len(places)]
    for place in places:
        value = parameters[f"{place}.weight"] @ value + parameters[f"{place}.bias"]
        value = value if place == places[-1] else between(value)
    return value


def told_to_gate(form, projected, target):
    if form == "concat":
        return np.array([*projected, *target])
    if form == "normalised_sum":
        return projected / math.sqrt(sum(projected**2)) + target / math.sqrt(sum(target**2))
    return projected + target


def prepared(config, target, target_mean):
    if config.target == "centred":
        return target - target_mean
    if config.target == "layer_norm":
        mean = sum(target) / len(target)
        return (target - mean) / math.sqrt(sum((target - mean) ** 2) / len(target) + 1e-5)
    return target


def project(config, parameters, number, tokens):
    """What one level's tokens [N, H] are projected to: a list of one vector, or of N."""
    name = "heads.0" if config.shared_head else f"heads.{number}"
    if config.pooling == "before":
        return [network(parameters, name, sum(tokens) / len(tokens))]
    each = [network(parameters, name, token) for token in tokens]
    return [sum(each) / len(each)] if config.pooling == "after" else each


def weigh(config, scores, wrong):
    """Weights of one token's levels from the gates' scores."""
    if config.weighting == "adaptive":
        return [sigmoid(score) for score in scores]
    if config.weighting == "softmax":
        shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
        return shares if wrong == "softmax without U" else [len(scores) * share for share in shares]
    return [{"average": 1 / len(scores), "half": 0.5, "one": 1.0}[config.weighting]] * len(scores)


def by_hand(config, parameters, levels, targets, valid=None, target_mean=None, *, frozen=None, wrong=None):
    """L_kd and its report.

    Args:
        config: the switches.
        parameters: arrays by their name in the module.
        levels: arrays [B, T, N, H], all 13.
        targets: [B, T, D].
        valid: [B, N] bool or None.
        target_mean: [D], where targets are centred.
        frozen: the result at the point where the derivative is taken; what is detached keeps its value from there.
        wrong: one of WRONG.
    """
    assert wrong is None or wrong in WRONG
    clips, frames = targets.shape[:2]
    count, shift = len(config.levels), 1.0 if config.loss == "one_minus_cosine" else 0.0
    projected, weights, losses = {}, {}, {}
    total, sum_cosine, sum_weight, saturated = 0.0, np.zeros(count), np.zeros(count), 0.0
    for clip in range(clips):
        of_clip = 0.0
        kept = slice(None) if valid is None or wrong == "padding pooled" else np.flatnonzero(valid[clip])
        for frame in range(frames):
            target = prepared(config, targets[clip, frame], target_mean)
            for number, level in enumerate(config.levels):
                tokens = levels[level - (2 if wrong == "level below" else 1)][clip, frame][kept]
                for token, vector in enumerate(project(config, parameters, number, tokens)):
                    projected[clip, frame, number, token] = vector
                    losses[clip, frame, number, token] = shift - cosine(vector, target)
            num_tokens = token + 1
            for token in range(num_tokens):
                scores = []
                for number in range(count if config.weighting in ("adaptive", "softmax") else 0):
                    key = (clip, frame, number, token)
                    seen = (
                        frozen.projected[key] if frozen and config.gate_gradient == "input_detached" else projected[key]
                    )
                    other = 0 * target if wrong == "gate without target" else target
                    gate = "gates.0" if config.shared_gate else f"gates.{number}"
                    scores += network(parameters, gate, told_to_gate(config.gate_input, seen, other)).tolist()
                for number, weight in enumerate(weigh(config, scores or [0.0] * count, wrong)):
                    key = (clip, frame, number, token)
                    held = frozen and config.gate_gradient == "weight_detached"
                    weights[key] = frozen.weights[key] if held else weight
                    sum_cosine[number] += (shift - losses[key]) / num_tokens
                    sum_weight[number] += weights[key] / num_tokens
                    largest = count if config.weighting == "softmax" else 1
                    saturated += (weights[key] > 0.99 * largest) / num_tokens
            of_clip += over_levels(config, losses, weights, clip, frame, num_tokens, wrong)
        total += of_clip / (frames if config.frame_reduction == "mean" else 1)
    kd = total if wrong == "clips summed" else total / clips
    seen = clips * frames
    return ByHand(kd, sum_cosine / seen, sum_weight / seen, saturated / seen / count, projected, weights)


def over_levels(config, losses, weights, clip, frame, num_tokens, wrong):
    of_frame = 0.0
    for number in range(len(config.levels)):
        keys = [(clip, frame, number, token) for token in range(num_tokens)]
        if wrong == "mean weight times mean loss":
            of_frame += sum(weights[key] for key in keys) * sum(losses[key] for key in keys) / num_tokens**2
        else:
            of_frame += sum(weights[key] * losses[key] for key in keys) / num_tokens
    return of_frame / (len(config.levels) if config.level_reduction == "mean" else 1)
