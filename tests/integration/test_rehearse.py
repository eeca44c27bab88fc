"""`pipeline rehearse`: stages in processes of their own, what they took, what is printed where one does not fit."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.commands.rehearse import failure_of
from pipeline.commands.rehearse_stage import STAGES, Cost
from pipeline.runs.rehearsal import dress, needed
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.free_memory import free_memory, limit_memory
from stages.wording import GIB

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DOCS = ROOT / "docs" / "training.md"


def rehearse(tmp_path, *options, data_bytes=None):
    """The command with a folder for temporary files of its own, which has to be empty at the end."""
    (tmp_path / "tmp").mkdir()

    def limit():
        if data_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))

    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "rehearse", *options],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert list(tmp_path.rglob("*")) == [tmp_path / "tmp"]
    assert "Traceback" not in done.stderr
    return done


def test_the_tiny_preset_passes_and_every_stage_reports_seconds_and_peak(tmp_path):
    done = rehearse(tmp_path, "--preset", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"]
    assert list(told["stages"]) == sorted(STAGES)
    for cost in told["stages"].values():
        assert cost["seconds"] > 0
        assert 0.1 * GIB < cost["peak_bytes"] < cost["free_bytes"]
    work = [told["stages"][stage]["work"] for stage in STAGES]
    assert work == ["8 frames, encoder and teacher", "1 step, 1 clip of 8 frames", "1 answer, 5 beams"]
    assert "every stage fits" in done.stderr


def test_a_stage_that_does_not_fit_is_named_with_how_much_and_what_would_do(tmp_path):
    """The true vision tower takes 3.7 GiB; the limit is the process's own."""
    done = rehearse(tmp_path, "--preset", "small", "--language-layers", "1", data_bytes=int(1.5 * GIB))
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: stage extract: does not fit into the memory: it held ")
    assert "of 1.50 GiB that were free" in line
    assert "extract.precision=bfloat16" in line


def test_a_checkpoint_whose_shapes_nobody_knows_is_refused(tmp_path):
    done = rehearse(tmp_path, "--preset", "tiny", "--set", "language.source=nobody/nothing")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: checkpoint: neither on this machine nor a published")


def test_an_unknown_task_is_refused_by_name(tmp_path):
    done = rehearse(tmp_path, "--preset", "tiny", "--task", "scenes")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("Did you mean 'scene'?")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The 7B preset, dressed on the CPU for LVU's clips; no weight is made."""
    folder = tmp_path_factory.mktemp("full")
    config = resolve(preset="diff-lmm-7b", overrides=["train.precision=float32"]).config
    return dress(config, folder, language_layers=None)


def test_a_training_step_that_does_not_fit_is_told_with_its_need_and_the_settings_that_fit(full):
    """Of 24 GB, bfloat16 is enough; of 19, it takes shorter chunks of frames, too."""
    assert needed(full, "train") > 30 * 10**9

    def hint(free):
        refused = failure_of("train", Cost(fits=False, peak_bytes=10 * GIB, free_bytes=free), full)
        assert refused.exit_code == 1
        assert str(refused).startswith("stage train: does not fit into the memory: it held 10.00 GiB of ")
        return str(refused).partition("With ")[2]

    assert hint(24 * 10**9).startswith("--set train.precision=bfloat16 a training step needs about 18.")
    assert hint(19 * 10**9).startswith(
        "--set train.precision=bfloat16 --set train.frames_per_chunk=10 a training step needs about 17."
    )


def test_a_step_of_the_small_preset_leaves_room_on_a_12_gb_gpu_as_the_docs_say(tmp_path):
    preset = resolve(preset="small", overrides=["train.precision=bfloat16", "train.batch_size=1"]).config
    taken = needed(dress(preset, tmp_path, language_layers=None), "train")
    assert taken < 10 * 10**9
    assert f"one clip of LVU at once takes {taken / 10**9:.1f} GB" in " ".join(DOCS.read_text(encoding="utf-8").split())


def test_the_clip_is_as_long_as_the_data_sets(full):
    (sample,) = locations.manifest_of(full).samples
    times_s = sample.frame_times_s()
    assert (len(times_s), len(set(times_s))) == (100, 10)
    assert sample.prompt_text == "what is the relationship of the movie?"


def test_the_free_memory_is_what_limits_leave():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert 2**27 < free_memory(CPU) < 2**45
    pid = os.fork()
    if pid == 0:
        limit_memory(2**33)
        limit_memory(2**34)  # never more than before
        os._exit(0 if free_memory(CPU) <= 2**33 == resource.getrlimit(resource.RLIMIT_DATA)[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_peak_does_not_count_the_process_again_for_a_child_that_it_started():
    code = (
        "import subprocess\n"
        "from stages.free_memory import peak_memory\n"
        "held = bytes(range(256)) * 2**20\n"
        "before = peak_memory()\n"
        "subprocess.run(['true'], check=True)\n"
        "assert len(held) < before\n"
        "assert peak_memory() < before + len(held) // 4, (peak_memory(), before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
