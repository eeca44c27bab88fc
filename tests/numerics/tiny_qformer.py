"""A small Q-Former with random weights that all matter, its plain frame loop, and comparisons of its two forms."""

from functools import cache

import torch
from tolerances import FLOAT32_GRADIENT, FLOAT32_HIDDEN, FLOAT32_KEY_BIAS, largest_difference, relative_difference
from transformers import InstructBlipQFormerConfig

from model.config import QFormerConfig
from model.qformer.parts import QFormerMemory, TextTokens
from model.qformer.qformer import MemoryQFormer

LEVELS = 13
PATCHES, VISUAL_WIDTH, QUERIES, HIDDEN = 3, 8, 3, 16
VOCABULARY, PADDING_ID = 40, 0
M = 3


def build_qformer(memory_slots=M, max_frames=120):
    """Twelve layers in eval mode; biases, queries and the temporal table are nonzero and attention is sharp."""
    torch.manual_seed(0)
    shape = InstructBlipQFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LEVELS - 1,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        encoder_hidden_size=VISUAL_WIDTH,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PADDING_ID,
    )
    model = MemoryQFormer(shape, QUERIES, QFormerConfig(memory_slots=memory_slots, max_frames=max_frames))
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model):
    """Give every parameter values that change the output."""
    for name, parameter in model.named_parameters():
        if name.lower().endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        elif name.endswith(("query.weight", "key.weight")):
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith(("dense.weight", "value.weight")):
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(std=0.3)


def random_features(batch, num_frames, seed=9):
    """Visual features of a clip.

    On this seed no merge is decided by rounding: features changed by 5e-7 of themselves give the same levels. Where a
    merge is, two forms may rightly differ from there on.
    """
    return torch.randn(
        batch, num_frames, PATCHES, VISUAL_WIDTH, generator=torch.Generator().manual_seed(seed)
    )  # [B, T, P, C]


def random_text(*lengths, padded_to=0):
    """One question of each length, padded on the right."""
    longest = max(*lengths, padded_to)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return TextTokens(torch.where(mask, ids, PADDING_ID), mask)


def frame_loop(model, features, text, step=None):
    """The plain form: `step` over the clip's frames -> 13 levels [B, T, Q, H] and the memory."""
    step = step or model.step
    memory = model.empty_memory(features.shape[0], features.shape[2], text.ids.shape[1])
    frames = []
    for index in range(features.shape[1]):
        out = step(memory, features[:, index], text)
        frames.append(out.levels)
        memory = out.memory
    return tuple(torch.cat(parts, dim=1) for parts in zip(*frames, strict=True)), memory


@cache
def _coefficients(level, frame, clip):
    return torch.randn(QUERIES, HIDDEN, generator=torch.Generator().manual_seed(1000 * level + 10 * frame + clip))


def loss_on(levels, frames):
    """A loss that weighs every number of every level differently; `levels` hold just `frames`, in order."""
    total = torch.zeros(())
    for number, level in enumerate(levels):
        for position, frame in enumerate(frames):
            for clip in range(level.shape[0]):
                total = total + (level[clip, position].float() * _coefficients(number, frame, clip)).sum()
    return total


def gradients_of(model, loss):
    """Every parameter's gradient by name; None where the loss does not reach."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def difference_in_levels(actual, expected):
    assert len(actual) == len(expected) == LEVELS
    return max(largest_difference(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


def difference_in_memory(actual: QFormerMemory, expected: QFormerMemory):
    """Largest difference between slots; infinite where banks hold other frames.

    Up to the second layer, inputs can be equal for every frame (queries and text have seen no frame yet): there any
    merge gives the same slots and rounding chooses, so only the visual bank and deeper layers must agree in counts.
    """
    if actual.frames_seen != expected.frames_seen or not torch.equal(actual.visual.counts, expected.visual.counts):
        return float("inf")
    worst = largest_difference(actual.visual.slots, expected.visual.slots)
    for layer, (mine, theirs) in enumerate(zip(actual.layers, expected.layers, strict=True)):
        if layer > 1 and not torch.equal(mine.counts, theirs.counts):
            return float("inf")
        worst = max(worst, largest_difference(mine.slots, theirs.slots))
    return worst


def gradient_misses(actual, expected):
    """Parameters whose gradients differ by more than the float32 tolerance, with by how much it is missed."""
    misses = {}
    for name, theirs in expected.items():
        mine = actual[name]
        if mine is None or theirs is None:
            excess = 0.0 if mine is theirs else float("inf")
        elif name.endswith("key.bias"):
            scale = expected[name.replace("bias", "weight")].abs().max().item()
            largest = max(mine.abs().max().item(), theirs.abs().max().item())
            excess = largest / (FLOAT32_KEY_BIAS * scale) if scale else largest
        else:
            excess = relative_difference(mine, theirs) / FLOAT32_GRADIENT
        if excess > 1:
            misses[name] = excess
    return misses


def assert_same_results(actual, expected):
    """Levels, memories and gradients of two runs, each a triple, agree in float32."""
    assert difference_in_levels(actual[0], expected[0]) <= FLOAT32_HIDDEN
    assert difference_in_memory(actual[1], expected[1]) <= FLOAT32_HIDDEN
    assert gradient_misses(actual[2], expected[2]) == {}
