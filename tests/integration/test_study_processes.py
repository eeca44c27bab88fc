"""A study whose trainings were to have several processes each: refused in one line, before anything is done."""

import pytest

from tests.in_this_process import in_this_process

SAID = (
    "error: train.processes: the trainings of a study have one process each; got 2; allowed: 1. "
    "Use several GPUs with --parallel, which runs as many trainings at once"
)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    return in_this_process(monkeypatch, capfd)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_processes_for_each_training_are_refused_in_one_line(call, tmp_path, more):
    out, said = call("ablate", "--preset", "tiny", "--study", "lambda", "--set", "train.processes=2", *more, status=2)
    assert (out, said.strip()) == ("", SAID)
    assert not list(tmp_path.iterdir())


def test_the_training_commands_option_is_unknown_here(call):
    _, said = call("ablate", "--preset", "tiny", "--study", "lambda", "--workers", "2", status=2)
    assert "No such option: --workers" in said
