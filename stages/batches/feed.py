"""Batches read ahead of training by worker processes, in the order asked for, however many workers there are.

A worker reads windows out of the cache and copies them once, to their places in a batch in memory which it
shares with the training process; where there is a GPU, a thread of that process copies the batch into page-locked
memory. The workers live as long as the iterator: give it the batches of all epochs.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from model.diff_lmm import Clips
from stages.batches.windows import Batch, Drawn, Window, WindowDataset
from stages.networks.tokens import Tokenizers
from stages.signals import left_to_this_process

# A window is one buffer of many megabytes. glibc returns such a buffer to the system when it is freed and then pays for
# its pages again with the next; workers keep them instead.
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


class Collate:
    """Windows -> `Batch`: stack, tokenize. A class, so that worker processes can be given it."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.tokenizers = tokenizers

    def __call__(self, windows: Sequence[Window]) -> Batch:
        prompts = [self.tokenizers.fitted(window.sample.question, window.sample.prompt) for window in windows]
        answers = [window.sample.answer for window in windows]
        features, targets, scales = (
            self._stacked([part for window in windows if (part := getattr(window, name)) is not None])
            for name in ("features", "targets", "scales")
        )
        assert features is not None
        clips = Clips(features, targets, self.tokenizers.question(prompts), self.tokenizers.training(prompts, answers))
        return Batch(tuple(window.sample for window in windows), clips, scales)

    @staticmethod
    def _stacked(parts: list[Tensor]) -> Tensor | None:
        # In a worker, torch stacks them in shared memory, where they would be copied to in any case.
        return default_collate(parts) if parts else None


def feed(
    dataset: WindowDataset,
    batches: Iterable[Sequence[int] | Sequence[Drawn]],
    tokenizers: Tokenizers,
    *,
    workers: int,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Read the named batches in order.

    Args:
        batches: which of them, batch by batch; taken from as needed.
        workers: processes that read ahead; 0 reads in this one, when asked.
        prefetch: batches that each of them reads ahead.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable will do; torch's annotation asks for integers
        collate_fn=Collate(tokenizers),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Forked workers may hang on locks that other threads held; cache readers open their files themselves.
        multiprocessing_context="spawn" if workers else None,
    )
    with _as_workers_need_it():
        return iter(loader)


@contextmanager
def _as_workers_need_it() -> Iterator[None]:
    """What processes that are started in the block inherit: how memory is kept, and signals that they ignore."""
    added = {name: value for name, value in _KEEP_BUFFERS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        # One that died of a signal meant for all would be taken for a fault.
        with left_to_this_process():
            yield
    finally:
        for name in added:
            del os.environ[name]
