"""Padding and the company of other clips change nothing."""

import pytest
import torch
from tiny_qformer import (
    M,
    build_qformer,
    difference_in_levels,
    gradient_misses,
    gradients_of,
    loss_on,
    random_features,
    random_text,
)
from tolerances import FLOAT32_HIDDEN

from model.qformer.parts import TextTokens

T = 2 * M + 1
LENGTHS = (6, 2)


@pytest.fixture(scope="module")
def model():
    return build_qformer()


def levels_and_gradients(model, features, text):
    levels = model(features, text).levels
    return levels, gradients_of(model, loss_on(levels, range(T)))


def test_longer_padding_of_the_text_changes_neither_results_nor_gradients(model):
    features = random_features(2, T)
    text = random_text(*LENGTHS)
    padding = torch.full((2, 5), 7)  # any token: what stands there must not matter
    longer = TextTokens(
        torch.cat([text.ids, padding], dim=1), torch.cat([text.mask, torch.zeros(2, 5, dtype=torch.bool)], dim=1)
    )
    levels, gradients = levels_and_gradients(model, features, text)
    padded_levels, padded_gradients = levels_and_gradients(model, features, longer)
    assert difference_in_levels(padded_levels, levels) <= FLOAT32_HIDDEN
    assert gradient_misses(padded_gradients, gradients) == {}


def test_what_stands_on_padding_does_not_matter(model):
    text = random_text(*LENGTHS)
    other = TextTokens(torch.where(text.mask, text.ids, 11), text.mask)
    features = random_features(2, T)
    with torch.no_grad():
        assert difference_in_levels(model(features, other).levels, model(features, text).levels) <= FLOAT32_HIDDEN


def test_a_batch_of_two_clips_equals_two_batches_of_one(model):
    features, text = random_features(2, T), random_text(*LENGTHS)
    levels = model(features, text).levels
    gradients = gradients_of(model, loss_on(levels, range(T)))
    alone, loss = [], torch.zeros(())
    for clip, length in enumerate(LENGTHS):
        only = TextTokens(text.ids[clip : clip + 1, :length], text.mask[clip : clip + 1, :length])
        alone.append(model(features[clip : clip + 1], only).levels)
        # The loss weighs clip 0 and clip 1 differently: keep each clip's place in the batch.
        placed = [torch.cat([torch.zeros_like(level)] * clip + [level]) for level in alone[-1]]
        loss = loss + loss_on(placed, range(T))
    joined = [torch.cat(pair) for pair in zip(*alone, strict=True)]
    assert difference_in_levels(levels, joined) <= FLOAT32_HIDDEN
    assert gradient_misses(gradients, gradients_of(model, loss)) == {}
