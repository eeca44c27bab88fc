"""Plausible mistakes in the memory miss the tolerances by far: the comparison of the two forms would notice them."""

import pytest
import torch
from tiny_qformer import (
    M,
    build_qformer,
    difference_in_levels,
    difference_in_memory,
    frame_loop,
    gradient_misses,
    gradients_of,
    loss_on,
    random_features,
    random_text,
)
from tolerances import FLOAT32_HIDDEN, WRONG_BY

import model.qformer.memory
import model.qformer.qformer

T = 3 * M
KEEP_LAST = list(range(T - M, T))


def forget_counts(monkeypatch):
    """Merge two slots to their plain mean, however many frames each stands for."""
    monkeypatch.setattr(model.qformer.memory, "weighted_mean", lambda left, _, right, __: (left + right) / 2)


def remember_one_frame_late(monkeypatch):
    """Append the previous frame's input to every bank, nothing at the first frame."""
    append, waiting, calls = model.qformer.memory.append, {}, 0

    def late(bank, frame, max_slots):
        nonlocal calls
        which = calls % NUM_BANKS
        calls += 1
        previous, waiting[which] = waiting.get(which), frame
        return bank if previous is None else append(bank, previous, max_slots)

    monkeypatch.setattr(model.qformer.qformer, "append", late)


def forget_the_merged_slot(monkeypatch):
    """Drop the older of the two most similar slots instead of merging them."""
    monkeypatch.setattr(model.qformer.memory, "weighted_mean", lambda _, __, right, ___: right)


def merge_the_oldest_pair(monkeypatch):
    """Ignore what the slots hold."""
    monkeypatch.setattr(model.qformer.memory, "alikeness", lambda left, _: torch.zeros(left.shape[:-1]))


NUM_BANKS = 13  # twelve layers and the visual bank, appended to in the same order at every frame


@pytest.mark.parametrize(
    "mistake", [forget_counts, remember_one_frame_late, forget_the_merged_slot, merge_the_oldest_pair]
)
def test_a_mistake_in_the_memory_shows(mistake, monkeypatch):
    qformer = build_qformer()
    features, text = random_features(1, T), random_text(5)
    out = qformer(features, text)
    gradients = gradients_of(qformer, loss_on(out.levels, range(T)))
    with monkeypatch.context() as patch:
        mistake(patch)
        levels, memory = frame_loop(qformer, features, text)
        wrong_gradients = gradients_of(qformer, loss_on(levels, range(T)))
    assert difference_in_levels(out.levels, levels) > WRONG_BY * FLOAT32_HIDDEN
    assert difference_in_memory(out.memory, memory) > WRONG_BY * FLOAT32_HIDDEN
    assert max(gradient_misses(gradients, wrong_gradients).values()) > WRONG_BY


def test_an_attached_memory_shows_in_the_gradients(monkeypatch):
    """With banks that carry gradient the levels are the same and the gradients are not."""
    qformer = build_qformer()
    features, text = random_features(1, T), random_text(5)
    out = qformer(features, text)
    gradients = gradients_of(qformer, loss_on(out.levels, range(T)))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
        levels, _ = frame_loop(qformer, features, text)
        attached = gradients_of(qformer, loss_on(levels, range(T)))
    assert difference_in_levels(out.levels, levels) <= FLOAT32_HIDDEN
    assert max(gradient_misses(gradients, attached).values()) > WRONG_BY
