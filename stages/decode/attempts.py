"""One video, one attempt for each decoder at most: what one could not bear is tried once more with the next."""

import time
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import numpy as np

from stages.decode.child import DecodeChild
from stages.decode.frames import DecodedVideo, DecodeError, DecoderName, FailureKind, FrameRequest
from stages.errors import UserError

# Ways of failing that may be the decoder's and not the file's. A damaged or missing file stays so for any decoder.
_WORTH_ANOTHER: frozenset[FailureKind] = frozenset({"timeout", "crash", "memory"})

_PACKAGES: dict[DecoderName, str] = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}


class Attempts:
    """Decodes a video, whole or part after part; after a timeout, a crash or a lack of memory with the next decoder.

    The next is each other one that is installed. All give equal bytes, or refuse the file; a GPU's bytes are its own,
    so there is no other for it.

    Args:
        deadline_s: for each decoder, all of its parts together.
    """

    def __init__(self, request: FrameRequest, deadline_s: float) -> None:
        self._request, self._deadline_s = request, deadline_s
        self._left_s = deadline_s
        usable: list[DecoderName] = [name for name in get_args(DecoderName) if find_spec(_PACKAGES[name])]
        self._others = [name for name in usable if name != request.decoder and request.device == "cpu"]
        self._kind: FailureKind | None = None
        self._reasons: list[str] = []

    def decode(self, child: DecodeChild, times_s: np.ndarray) -> DecodedVideo:
        """Decode the frames at some of the request's times, in a child that may be another one each time.

        Raises:
            DecodeError: of the first failed attempt's kind; its reason names all attempts.
            UserError: the decoder that was asked for is not installed.
        """
        while True:
            try:
                child.begin()  # the start of a new child is nobody's fault
                started = time.monotonic()
                decoded = child.decode(replace(self._request, times_s=times_s), max(self._left_s, 0.0))
            except DecodeError as error:
                self._note(error)
            except UserError as error:
                if self._kind is None:
                    raise
                self._reasons.append(f"with {self._request.decoder}, {error}")
            else:
                self._left_s -= time.monotonic() - started
                return decoded
            if not self._others:
                assert self._kind is not None
                raise DecodeError(self._kind, "; then, ".join(self._reasons))
            self._request = replace(self._request, decoder=self._others.pop(0))
            self._left_s = self._deadline_s

    def _note(self, error: DecodeError) -> None:
        if error.kind == "timeout" and self._left_s < self._deadline_s:
            error = DecodeError(error.kind, f"decoding took longer than {self._deadline_s:g} s in all its parts")
        if self._kind is not None:
            self._reasons.append(f"with {self._request.decoder}, {error.kind}: {error.reason}")
        elif error.kind in _WORTH_ANOTHER:
            self._kind = error.kind
            self._reasons.append(error.reason)
        else:
            raise error
