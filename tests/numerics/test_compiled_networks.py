"""`extract.compile`: the same numbers, but for rounding.

Compiling even the tiny networks takes more than a minute of processor time, so this runs where it is asked for:
`EXTRACT_COMPILE=1 pytest tests/numerics/test_compiled_networks.py`.
"""

import os
import shutil

import numpy as np
import pytest

from pipeline.settings.config import resolve
from stages.extract.frozen_pair import ExtractionJob, FrozenPair
from stages.frozen.identity import settle_precision

RELATIVE = 1e-5
FRAMES = 5


@pytest.mark.skipif("EXTRACT_COMPILE" not in os.environ, reason="EXTRACT_COMPILE=1 runs it; takes minutes")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_networks_give_the_same_features_and_targets():
    config = resolve(preset="tiny", overrides=["extract.batch_size=4"]).config
    plain, compiled = (
        FrozenPair(
            ExtractionJob(
                config.encoder,
                config.teacher,
                settle_precision(config.extract).model_copy(update={"compile": switch}),
                "",
            )
        )
        for switch in (False, True)
    )
    numbers = np.random.default_rng(0)
    views = [numbers.integers(0, 256, (FRAMES, *size, 3), dtype=np.uint8) for size in plain.sizes_px]
    for expected, found in zip(plain.encode(*views), compiled.encode(*views), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < RELATIVE * np.abs(expected).max()
    assert compiled.encode(*views)[0].shape[0] == FRAMES
