"""Named parts of a training step: in a profiler's trace always, on a clock when somebody has set one up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from torch.profiler import record_function

Item = TypeVar("Item")

QFORMER, ALIGNMENT, LANGUAGE, BACKWARD, OPTIMIZER = "Q-Former", "alignment", "LLM", "backward", "optimizer"


@dataclass
class Clock:
    """Seconds that each span took in all.

    Args:
        synchronise: waits until the device has done what was asked of it, so that a span is charged with its own work.
    """

    synchronise: Callable[[], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the spans that are entered within the block."""
        token = _CLOCK.set(self)
        try:
            yield
        finally:
            _CLOCK.reset(token)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's time to a span's."""
        self.synchronise()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronise()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Call the block by a name; without profiler and clock this costs next to nothing."""
    clock = _CLOCK.get()
    with record_function(name):
        if clock is None:
            yield
        else:
            with clock.measure(name):
                yield


def spanned(name: str, items: Iterator[Item]) -> Iterator[Item]:
    """The items, the making of each in a span."""
    while True:
        with span(name):
            item = next(items, None)
        if item is None:
            return
        yield item
