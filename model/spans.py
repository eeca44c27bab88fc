"""Names of the parts of a training step, under which a profiler's trace shows them."""

from collections.abc import Iterator
from typing import TypeVar

from torch.profiler import record_function

Item = TypeVar("Item")

QFORMER, ALIGNMENT, LANGUAGE, BACKWARD, OPTIMIZER = "Q-Former", "alignment", "LLM", "backward", "optimizer"


def spanned(name: str, items: Iterator[Item]) -> Iterator[Item]:
    """The items, the making of each under a name."""
    while True:
        with record_function(name):
            item = next(items, None)
        if item is None:
            return
        yield item
