"""The resize: within a fraction of a grey level of Pillow's bicubic, and never past black or white."""

import numpy as np
import pytest
from PIL import Image

from stages.decode.reader import resize_rgb

MEAN_TOLERANCE = 0.05  # grey levels of 255, mean over the picture
LARGEST_TOLERANCE = 1  # grey levels, any pixel: the two round differently


def white_noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def natural_noise(height, width):
    """Noise whose amplitude falls as 1 / frequency, as in photographs."""
    spectrum = np.fft.rfft2(np.random.default_rng(1).standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    picture = np.fft.irfft2(spectrum / frequency, s=(height, width)).transpose(1, 2, 0)
    return np.clip(128 + 50 * picture / picture.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("picture_of", [white_noise, natural_noise])
@pytest.mark.parametrize(
    ("native_px", "size_px"),
    [((360, 640), (224, 224)), ((361, 641), (256, 256)), ((1080, 1920), (224, 224)), ((120, 160), (224, 224))],
)
def test_agrees_with_pillow(picture_of, native_px, size_px):
    picture = picture_of(*native_px)
    expected = np.asarray(Image.fromarray(picture).resize(size_px[::-1], Image.Resampling.BICUBIC))
    difference = np.abs(resize_rgb(picture, size_px).astype(int) - expected)
    assert difference.mean() < MEAN_TOLERANCE
    assert difference.max() <= LARGEST_TOLERANCE


def test_the_tolerance_tells_another_filter_apart():
    picture = natural_noise(360, 640)
    bilinear = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.abs(resize_rgb(picture, (224, 224)).astype(int) - bilinear).mean() > 5 * MEAN_TOLERANCE


def test_overshoot_at_an_edge_stays_within_the_range():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, 32:] = 255
    row = resize_rgb(picture, (224, 224))[100, :, 0].astype(int)
    assert row[:90].max() == 0
    assert row[-90:].min() == 255
    assert (np.diff(row) >= 0).all()


def test_a_picture_of_the_wanted_size_is_left_alone():
    picture = white_noise(50, 70)
    assert resize_rgb(picture, (50, 70)) is picture
