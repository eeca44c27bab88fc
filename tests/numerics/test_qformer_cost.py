"""What the clip form keeps for the backward pass: nothing of frames that are not wanted, less when it recomputes."""

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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

SLOTS = 4


class _Storages(TorchDispatchMode):
    """Remembers, without keeping them alive, the storages of every tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        del types
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[StorageWeakRef(storage).cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self):
        return sum(nbytes for reference, nbytes in self.seen.values() if not reference.expired())


def bytes_kept(model, num_frames, **options):
    """Bytes that a loss on the wanted frames keeps alive when everything else is gone, the inputs not counted."""
    features, text = random_features(2, num_frames), random_text(5, 2)
    with _Storages() as storages:
        loss = sum(level.square().sum() for level in model(features, text, **options).levels)
    assert loss.requires_grad
    return storages.bytes_alive() - features.untyped_storage().nbytes()


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


def test_recomputing_keeps_far_less():
    model = build_qformer(SLOTS)
    kept = bytes_kept(model, 16)
    recomputed = bytes_kept(model, 16, recompute=True)
    assert 0 < recomputed < kept / 3
