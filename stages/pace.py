"""How fast a count grows, whether it comes one by one or in bursts."""

import time
from collections import deque

_OVER_S = 60.0
# What comes within so short a time has come at once.
_BURST_S = 0.1


class Pace:
    """Units per second over the last minute, or since the first look where that is less.

    A burst is spread over the time since what came before it, so that the answers of one batch, which come together,
    do not look like a thousand a second.

    Args:
        done: the count at the first look, which is now; None: the first `look` is it.
    """

    def __init__(self, done: int | None = None) -> None:
        self._looks: deque[tuple[float, int]] = deque()
        if done is not None:
            self.look(done)

    def look(self, done: int) -> None:
        now_s = time.monotonic()
        if len(self._looks) > 1 and now_s - self._looks[-1][0] < _BURST_S:
            now_s, _ = self._looks.pop()
        self._looks.append((now_s, done))
        while len(self._looks) > 2 and self._looks[1][0] < now_s - _OVER_S:
            self._looks.popleft()

    @property
    def per_s(self) -> float | None:
        """The rate; None where nothing has come yet."""
        if len(self._looks) < 2:
            return None
        (since_s, before), (until_s, done) = self._looks[0], self._looks[-1]
        return (done - before) / (until_s - since_s) if done > before else None
