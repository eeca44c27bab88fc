"""What the clip form keeps for the backward pass: nothing of unwanted frames, one chunk's worth at a time."""

import gc

import pytest
import torch
from tiny_qformer import (
    build_qformer,
    frame_loop,
    gradient_misses,
    gradients_of,
    loss_on,
    random_features,
    random_text,
)

from stages.networks.memory_law import kept_numbers

SLOTS = 4
# What the law leaves out, as a share: the statistics of the norms, the embeddings, the page numbers.
LAW_LEAVES_OUT = 0.1


class _Kept:
    """A tensor that autograd holds for the backward pass; counts itself as long as it lives."""

    now = largest = 0

    def __init__(self, tensor):
        self.tensor = tensor
        _Kept.now += tensor.nbytes
        _Kept.largest = max(_Kept.largest, _Kept.now)

    def __del__(self):
        _Kept.now -= self.tensor.nbytes


def most_bytes_kept(step):
    """The most bytes that autograd holds at one time during `step()`."""
    gc.collect()
    _Kept.now = _Kept.largest = 0
    with torch.autograd.graph.saved_tensors_hooks(_Kept, lambda kept: kept.tensor):
        step()
    return _Kept.largest


def go_back_chunk_by_chunk(model, num_frames, frames_per_chunk):
    for chunk in model.chunks(random_features(2, num_frames), random_text(5, 2), frames_per_chunk=frames_per_chunk):
        loss_on(chunk.levels, chunk.frames).backward()


def bytes_saved(model, num_frames, **options):
    """Bytes that autograd is asked to save on the way, whether or not they are dropped again."""
    saved = []

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    features, text = random_features(2, num_frames), random_text(5, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(features, text, **options)
    return sum(saved)


def test_frames_that_are_not_wanted_build_no_graph():
    model = build_qformer(SLOTS)
    assert bytes_saved(model, 8, wanted_frames=[7]) == bytes_saved(model, 32, wanted_frames=[31]) > 0
    assert bytes_saved(model, 16) > 1.5 * bytes_saved(model, 8)


def test_the_loss_on_the_last_frame_has_the_frame_loops_gradient():
    model = build_qformer(SLOTS)
    features, text = random_features(2, 8), random_text(5, 2)
    levels, _ = frame_loop(model, features, text)
    expected = gradients_of(model, loss_on([level[:, -1:] for level in levels], [7]))
    actual = gradients_of(model, loss_on(model(features, text, wanted_frames=[7]).levels, [7]))
    assert gradient_misses(actual, expected) == {}


def test_going_back_chunk_by_chunk_keeps_one_chunk_whatever_the_length_of_the_clip():
    model = build_qformer(SLOTS)
    short, long = (most_bytes_kept(lambda T=T: go_back_chunk_by_chunk(model, T, SLOTS)) for T in (3 * SLOTS, 9 * SLOTS))
    assert 0 < long == short
    at_once = most_bytes_kept(lambda: go_back_chunk_by_chunk(model, 9 * SLOTS, 9 * SLOTS))
    assert at_once > 4 * long


def test_going_back_chunk_by_chunk_gives_the_same_gradients():
    model, num_frames = build_qformer(SLOTS), 3 * SLOTS + 1
    levels = model(random_features(2, num_frames), random_text(5, 2)).levels
    expected = gradients_of(model, loss_on(levels, range(num_frames)))
    model.zero_grad(set_to_none=True)
    go_back_chunk_by_chunk(model, num_frames, 3)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradient_misses(actual, expected) == {}


@pytest.mark.parametrize("frames_per_chunk", [3, 2 * SLOTS])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_chunk_keeps_what_the_law_says(batch, frames_per_chunk):
    model = build_qformer(SLOTS)
    features = random_features(batch, SLOTS + 1 + frames_per_chunk)
    text = random_text(*[5] * batch)
    chunks = model.chunks(
        features[:, SLOTS + 1 :],
        text,
        memory=model(features[:, : SLOTS + 1], text).memory,
        frames_per_chunk=frames_per_chunk,
    )
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunk = next(chunks)
    assert len(chunk.frames) == frames_per_chunk
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), text.ids)}
    measured = sum(size for place, (_, size) in kept.items() if place not in given)
    law = kept_numbers(model, batch=batch, frames=frames_per_chunk, patches=features.shape[2], words=5)
    assert abs(measured - law) <= LAW_LEAVES_OUT * law
