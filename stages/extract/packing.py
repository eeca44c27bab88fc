"""The frozen networks of Stage 1's worker: frames of several videos request a pass, and every pass has one shape."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from stages.errors import UserError
from stages.extract.frozen_pair import FrozenPair, joined

_LOG = logging.getLogger(__name__)


# How long frames that do not fill a pass wait for those of videos that are still being decoded.
_LINGER_S = 0.5


# Called with the number of frames that have just been through both networks.
OnEncoded = Callable[[int], None]


@dataclass(eq=False)
class _Request:
    """One video's frames on their way through the networks; `given` rows are in a pass already."""

    views: tuple[np.ndarray, np.ndarray]
    since_s: float
    given: int = 0
    parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    on_encoded: OnEncoded | None = None
    error: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> int:
        return len(self.views[0]) - self.given


class FramePacker:
    """Joins the frames of several videos into full passes, so that short clips do not leave the networks idle.

    A pass starts when it is full, when no announced video is still to come, or when its first frame has waited long
    enough.

    Args:
        networks: served by one thread of this object.
    """

    def __init__(self, networks: FrozenPair) -> None:
        self._networks = networks
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._announced = 0
        self._closed = False
        self._busy_s, self._idle_s = 0.0, 0.0
        self._thread = threading.Thread(target=self._serve, name="networks", daemon=True)
        self._thread.start()

    @contextmanager
    def announce(self) -> Iterator[None]:
        """While this block runs another video's frames may come soon."""
        with self._changed:
            self._announced += 1
        try:
            yield
        finally:
            with self._changed:
                self._announced -= 1
                self._changed.notify()

    def encode(
        self, encoder_view: np.ndarray, teacher_view: np.ndarray, on_encoded: OnEncoded | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Wait until the frames have been through both networks; see `FrozenPair.encode`.

        `on_encoded` is called after each pass, on the networks' thread.
        """
        request = _Request((encoder_view, teacher_view), time.monotonic(), on_encoded=on_encoded)
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        request.ready.wait()
        if request.error is not None:
            raise UserError(f"the frozen networks failed: {request.error}") from request.error
        return joined(request.parts)

    def take_times(self) -> tuple[float, float]:
        """Seconds in which the networks computed and in which they had nothing to do, since the last call."""
        with self._changed:
            taken = self._busy_s, self._idle_s
            self._busy_s, self._idle_s = 0.0, 0.0
        return taken

    def close(self) -> None:
        """Serve what has come and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            waited_from = time.perf_counter()
            with self._changed:
                while not self._is_worth_a_pass():
                    if self._closed:
                        return
                    self._changed.wait(self._linger_s())
                pieces = self._take()
            started = time.perf_counter()
            self._run(pieces)
            with self._changed:
                self._idle_s += started - waited_from
                self._busy_s += time.perf_counter() - started
            for request, _ in pieces:
                if request.error is not None or not request.left:
                    request.ready.set()

    def _is_worth_a_pass(self) -> bool:
        if not self._waiting:
            return False
        if self._closed or not self._announced or self._linger_s() == 0:
            return True
        return sum(request.left for request in self._waiting) >= self._networks.batch_frames

    def _linger_s(self) -> float | None:
        """How long the first frame that waits may wait on; None where none does."""
        if not self._waiting:
            return None
        return max(0.0, self._waiting[0].since_s + _LINGER_S - time.monotonic())

    def _take(self) -> list[tuple[_Request, slice]]:
        """The rows of the next pass, in the order in which their videos came."""
        pieces: list[tuple[_Request, slice]] = []
        room = self._networks.batch_frames
        while self._waiting and room:
            request = self._waiting[0]
            rows = slice(request.given, request.given + min(room, request.left))
            pieces.append((request, rows))
            request.given, request.since_s = rows.stop, time.monotonic()
            room -= rows.stop - rows.start
            if not request.left:
                self._waiting.popleft()
        return pieces

    def _run(self, pieces: list[tuple[_Request, slice]]) -> None:
        try:
            views = [np.concatenate([request.views[view][rows] for request, rows in pieces]) for view in (0, 1)]
            features, targets = self._networks.encode(*views)
        except Exception as error:  # noqa: BLE001 - whatever it is, each video's thread must hear of it
            with self._changed:
                for request, _ in pieces:
                    request.error = error
                    if request.left:
                        self._waiting.remove(request)
            return
        start = 0
        for request, rows in pieces:
            stop = start + rows.stop - rows.start
            request.parts.append((features[start:stop], targets[start:stop]))
            if request.on_encoded is not None:
                request.on_encoded(stop - start)
            start = stop
