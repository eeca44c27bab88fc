"""Decoding one request in this process: the reader that was asked for, then one resize per view."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from stages.decode.frames import DecodedVideo, DecodeError, FrameRequest


def resize_rgb(rgb: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Resize one picture [h, w, 3] uint8 to [height, width, 3] uint8 by antialiased bicubic interpolation.

    Computed on uint8, whose result saturates at 0 and 255. Within two grey levels of Pillow's BICUBIC, except that
    Pillow 13 resizes the rows of tall pictures first and then differs by more. The aspect ratio is not kept; a picture
    of the wanted size is returned as it is.
    """
    assert rgb.dtype == np.uint8, rgb.dtype
    assert rgb.ndim == 3, rgb.shape
    if rgb.shape[:2] == size_px:
        return rgb
    picture = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w], channels last in memory
    resized = F.interpolate(picture, size=size_px, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


# Receives rows of the request that one frame fills, its timestamp, and one [height, width, 3] uint8 picture per view.
ViewStore = Callable[[slice, float, list[np.ndarray]], None]


def decode_into(request: FrameRequest, store: ViewStore) -> str | None:
    """Send the views of every frame asked for to `store`; a row may be sent twice, the last one counts.

    Only one native frame is held at a time. Returns the remark of `DecodedVideo`. Raises `DecodeError`, and
    `UserError` where the decoder is not installed.
    """

    def resize_and_store(rows: slice, shown_s: float, rgb: np.ndarray) -> None:
        store(rows, shown_s, [resize_rgb(rgb, size_px) for size_px in request.sizes_px])

    try:
        if request.decoder == "pyav":
            from stages.decode.pyav_reader import read_with_pyav

            return read_with_pyav(request, resize_and_store)
        if request.decoder == "decord":
            from stages.decode.decord_reader import read_with_decord

            read_with_decord(request, resize_and_store)
        else:
            from stages.decode.torchcodec_reader import read_with_torchcodec

            read_with_torchcodec(request, resize_and_store)
    except (MemoryError, RuntimeError) as error:
        # torch reports a lack of memory by a RuntimeError.
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise DecodeError("memory", f"the memory limit was reached ({error or 'allocation failed'})") from error
    return None


def decode(request: FrameRequest) -> DecodedVideo:
    """Decode in this process, where a damaged file may hang or crash it; `DecodeChild` is the safe way.

    Not for several threads at once: how much FFmpeg reports is set for the whole process. Raises as `decode_into`.
    """
    video = DecodedVideo.empty_for(request)

    def store(rows: slice, shown_s: float, pictures: list[np.ndarray]) -> None:
        video.shown_s[rows] = shown_s
        for view, picture in zip(video.views, pictures, strict=True):
            view[rows] = picture

    return replace(video, remark=decode_into(request, store))
