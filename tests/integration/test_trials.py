"""Trials on a real Ray: processes are used again, and one that dies takes nobody else with it."""

import os
import signal
from pathlib import Path

import pytest

from stages.cluster.connect import cluster
from stages.cluster.shares import Share
from stages.studies.trials import run_trials


@pytest.mark.slow
def test_trials_share_processes_and_none_is_hurt_by_anothers_end(tmp_path):
    # Inside the test: the processes cannot import this file.
    def note_process(folder):
        if folder.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if folder.name == "raises":
            raise ValueError("of the trial")
        folder.write_text(str(os.getpid()), encoding="utf-8")
        return "was no good" if folder.name == "fails" else None

    names = ["first", "dies", "second", "raises", "third", "fails", "fourth"]
    started, ended = [], {}
    with cluster(None):
        run_trials(
            {name: tmp_path / name for name in names},
            note_process,
            Share(parallel=2, cpus=0.5, gpus=0.0),
            on_start=started.append,
            on_end=lambda name, reason, seconds: ended.update({name: (reason, seconds > 0)}),
        )
    assert started == names
    assert ended.keys() == set(names)
    assert {name for name, (reason, _) in ended.items() if reason is None} == {"first", "second", "third", "fourth"}
    assert ended["dies"] == ("its process died: it was killed, or ran out of memory", True)
    assert ended["raises"] == ("its process could not do it: ValueError: of the trial", True)
    assert ended["fails"] == ("was no good", True)
    processes = {Path(path).read_text() for path in tmp_path.iterdir()}
    assert len(processes) <= 4, "two places, and two processes that went"
