"""The optional decoders: what is told where one is missing or does not load, and what only they need."""

import subprocess
import sys

import numpy as np
import pytest

from stages.decode import FrameRequest
from stages.decode.checked_files import native_messages
from stages.errors import UserError
from tests.video_files import write_video

WITHOUT = """
import sys
{prepare}
from pathlib import Path
import numpy as np
from stages.decode import FrameRequest
from stages.decode.reader import decode
for decoder in ("pyav", {decoder!r}):
    decode(FrameRequest(Path({path!r}), np.zeros(1), ((8, 8),), decoder, 0.1))
    print(decoder, "works")
"""


def run_without(path, decoder, prepare, **environment):
    program = WITHOUT.format(path=str(path), decoder=decoder, prepare=prepare)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **environment)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", options={"g": "24"}, count=24)


@pytest.mark.parametrize(
    ("decoder", "hint"), [("decord", "Use decoder pyav"), ("torchcodec", "Run pip install 'diff-lmm[torchcodec]'")]
)
def test_without_the_package_the_user_is_told_and_pyav_still_works(video, decoder, hint):
    # What the import system does for a package that is not there.
    run = run_without(video, decoder, f"sys.modules[{decoder!r}] = None")
    assert run.stdout == "pyav works\n"
    assert f"UserError: {decoder} is not installed" in run.stderr
    assert hint in run.stderr


def test_a_torchcodec_that_does_not_load_says_so_in_one_line(video, tmp_path):
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nMore')\n")
    run = run_without(video, "torchcodec", f"sys.path.insert(0, {str(tmp_path)!r})")
    assert run.stdout == "pyav works\n"
    last = run.stderr.strip().splitlines()[-1]
    assert "torchcodec is installed but does not load (Could not load libtorchcodec.)" in last
    assert "FFmpeg's shared libraries" in last


def test_only_torchcodec_decodes_on_a_gpu(video):
    with pytest.raises(UserError, match="only torchcodec decodes on a GPU"):
        FrameRequest(video, np.zeros(1), ((8, 8),), "pyav", 0.1, "cuda")


def test_what_a_native_library_prints_is_kept_while_the_block_runs_only(capfd):
    with native_messages() as said:
        assert said() == ""
        subprocess.run(["/bin/sh", "-c", "echo two; echo lines >&2; echo more >&2"], check=True)
        assert said() == "lines more"
    subprocess.run(["/bin/sh", "-c", "echo after >&2"], check=True)
    assert capfd.readouterr().err == "after\n"
