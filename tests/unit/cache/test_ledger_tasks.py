"""One video in two tasks: what one task's extraction did is not lost by what another's failed to add."""

import numpy as np

from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint

FIRST, BOTH = np.array([0.0, 1.0]), np.array([0.0, 1.0, 2.0])


def test_a_failure_to_add_frames_leaves_the_first_task_done(tmp_path):
    cache = FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float16"}))
    features, targets = np.ones((2, 3, 4), np.float16), np.ones((2, 5), np.float32)
    with cache.ledger.writer() as ledger:
        record = cache.write_video("v", times_s=FIRST, features=features, targets=targets)
        ledger.done("v", checksum=record.checksum, attempts=1)
    with cache.ledger.writer() as ledger:
        ledger.failed("v", reason="timeout: too slow", attempts=1)
    assert cache.ledger.status({"v": FIRST}).done == {"v"}
    assert set(cache.ledger.status({"v": BOTH}).failed) == {"v"}
