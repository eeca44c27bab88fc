"""The one resize between a native frame and what a network sees."""

import numpy as np
import torch
import torch.nn.functional as F


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
