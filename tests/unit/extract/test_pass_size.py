"""How many frames share a pass: by trial where memory is asked, without chance on a CPU."""

import subprocess
import sys
import textwrap

import pytest

from stages.config import ExtractConfig
from stages.extract.pass_size import CPU_FRAMES, gpu_pass, largest_pass, set_pass

MIB = 2**20


@pytest.mark.parametrize(
    ("room", "most", "found"), [(0, 64, 0), (1, 64, 1), (3, 64, 2), (64, 64, 64), (10**9, 64, 64), (10**9, 100, 64)]
)
def test_the_largest_pass_is_the_last_that_fits(room, most, found):
    assert largest_pass(lambda frames: frames <= room, most=most) == found


def test_what_does_not_fit_is_tried_once_and_nothing_larger_after_it():
    tried = []

    def fits(frames):
        tried.append(frames)
        return frames < 8

    assert largest_pass(fits, most=256) == 4
    assert tried == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.6}, 4),  # eight frames take twice as long as four
        ({1: 1.0, 2: 1.2, 4: 2.3, 8: 2.4}, 2),  # four are cheaper by four percent, which is not worth it
        ({1: 1.0, 2: 1.2, 4: None}, 2),  # four do not fit
        ({1: None}, 0),
    ],
)
def test_on_a_gpu_more_frames_must_fit_and_pay(seconds, found):
    assert gpu_pass(seconds.__getitem__) == found


def test_a_number_that_is_set_is_taken_and_is_a_power_of_two_on_a_cpu():
    assert [set_pass(ExtractConfig(batch_size=size), on_gpu=False) for size in (1, 3, 48)] == [1, 2, 32]
    assert set_pass(ExtractConfig(batch_size=48), on_gpu=True) == 48
    assert set_pass(ExtractConfig(), on_gpu=True) is None
    assert set_pass(ExtractConfig(), on_gpu=False) == CPU_FRAMES


SMALL_MACHINE = """
    import resource
    import sys
    import numpy as np
    from pathlib import Path
    from pipeline.settings.config import resolve
    from stages.frozen.identity import settle_precision
    from stages.extract.frozen_pair import ExtractionJob, FrozenPair
    from stages.extract.pass_size import largest_pass
    config = resolve(preset="tiny").config
    pair = FrozenPair(ExtractionJob(config.encoder, config.teacher, settle_precision(config.extract), ""))
    frames = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    views = [np.zeros((frames, *size, 3), dtype=np.uint8) for size in pair.sizes_px]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))
    if len(sys.argv) == 2:
        print(largest_pass(pair.try_empty, most=4096))
    else:
        pair.batch_frames = frames
        pair.encode(*views)
        print(pair.batch_frames)
"""


def on_a_small_machine(*arguments):
    program = [sys.executable, "-c", textwrap.dedent(SMALL_MACHINE), *map(str, arguments)]
    return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def test_real_networks_under_a_real_limit_get_the_largest_pass_that_fits():
    found = on_a_small_machine(256 * MIB)
    assert 1 < found < 4096
    # In a process of its own: the trial that failed may have left free memory in pieces.
    assert on_a_small_machine(320 * MIB, found) == found, "the pass that was found did not fit"
    assert on_a_small_machine(256 * MIB, 8 * found) <= 2 * found, "a pass that does not fit is halved"
