"""One training of a run at a time, and no trace of one that never began."""

import subprocess
import sys

import pytest

from stages.errors import UserError
from stages.train.run_lock import RUN_LOCK, training

HOLD = "\n".join(
    [
        "import sys",
        "from pathlib import Path",
        "from stages.train.run_lock import training",
        "with training(Path(sys.argv[1])): ",
    ]
)


def test_another_process_is_named_and_what_it_has_stays(tmp_path):
    run = tmp_path / "runs" / "mine"
    command = [sys.executable, "-c", HOLD + "print('held', flush=True); sys.stdin.read()", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process \({holder.pid} on .*\) is training this run"), training(run):
            raise AssertionError("two at once")
        assert (run / RUN_LOCK).exists()
        holder.communicate("")
    with training(run):
        pass


def test_a_training_that_is_refused_before_it_has_begun_leaves_no_folder(tmp_path):
    run = tmp_path / "mine"
    with pytest.raises(UserError, match="wrong"), training(run):
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_stays_with_its_lock(tmp_path):
    with training(tmp_path / "mine"):
        (tmp_path / "mine" / "config.yaml").write_text("{}")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.yaml", RUN_LOCK]


def test_a_killed_holder_holds_nothing(tmp_path):
    run = tmp_path / "mine"
    command = [sys.executable, "-c", HOLD + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", str(run)]
    assert subprocess.run(command, check=False).returncode == -9
    assert (run / RUN_LOCK).exists()
    with training(run):
        pass
    assert not run.exists()
