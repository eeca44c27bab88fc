"""One video, at most two attempts: what a decoder could not bear is tried once more with the other one."""

from dataclasses import replace
from typing import get_args

from stages.decode.child import DecodeChild
from stages.decode.frames import DecodedVideo, DecodeError, DecoderName, FailureKind, FrameRequest
from stages.errors import UserError

# Ways of failing that may be the decoder's and not the file's. A damaged or missing file stays so for any decoder.
_WORTH_ANOTHER: frozenset[FailureKind] = frozenset({"timeout", "crash", "memory"})


def decode_or_retry(child: DecodeChild, request: FrameRequest, deadline_s: float) -> DecodedVideo:
    """Decode; after a timeout, a crash or a lack of memory once more, with the other decoder and a new child.

    Both decoders give equal bytes, or refuse the file. `deadline_s` counts for each attempt.

    Raises:
        DecodeError: of the first attempt's kind; its reason tells of both attempts.
        UserError: the decoder that was asked for is not installed.
    """
    try:
        return child.decode(request, deadline_s)
    except DecodeError as error:
        if error.kind not in _WORTH_ANOTHER:
            raise
        first = error
    other = _other(request.decoder)
    try:
        return child.decode(replace(request, decoder=other), deadline_s)
    except DecodeError as error:
        second = f"{error.kind}: {error.reason}"
    except UserError:
        second = "not installed"
    raise DecodeError(first.kind, f"{first.reason}; then, with {other}, {second}") from first


def _other(decoder: DecoderName) -> DecoderName:
    (other,) = (name for name in get_args(DecoderName) if name != decoder)
    return other
