"""A command is stopped by a signal, whatever it does at that moment; each here is a program of its own."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stages.process_tree import descendants
from stages.signals import AGAIN

BEGIN = """\
import os, signal, subprocess, sys, threading, time
from stages import signals as stop
def is_here():
    print("here", flush=True)
"""
SOON_S = 30.0


def started(program, folder, **more):
    """A program whose `command` prints "here" at the moment of interest."""
    code = BEGIN + textwrap.dedent(program) + "\nstop.run(command)\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, cwd=folder, **pipes, **more)
    assert process.stdout.readline() == "here\n", process.communicate()
    return process


def stopped(process, number=signal.SIGTERM):
    process.send_signal(number)
    _, said = process.communicate(timeout=SOON_S)
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 75, f"stopped by SIGTERM; {AGAIN}\n"), (signal.SIGINT, 130, f"interrupted; {AGAIN}\n")],
)
def test_it_cleans_up_prints_one_line_and_exits_with_the_code(number, code, line, tmp_path):
    program = """
        def command():
            try:
                is_here()
                time.sleep(60)
            finally:
                open("clean", "w").close()
    """
    assert stopped(started(program, tmp_path), number) == (code, line)
    assert (tmp_path / "clean").exists()


def test_the_line_says_how_far_the_work_was_whatever_the_interruption_became(tmp_path):
    program = """
        def command():
            with stop.interruption_note(lambda: "; 3 of 7 done"):
                try:
                    is_here()
                    time.sleep(60)
                except KeyboardInterrupt:
                    raise OSError("a library's answer") from None
    """
    assert stopped(started(program, tmp_path)) == (75, "stopped by SIGTERM; 3 of 7 done\n")


def test_a_module_is_imported_to_its_end_first(tmp_path):
    (tmp_path / "slow.py").write_text("is_here()\nimport time\ntime.sleep(0.5)\nopen('whole', 'w').close()\n")
    program = """
        import builtins
        def command():
            builtins.is_here = is_here
            sys.path.insert(0, os.getcwd())
            import slow
            time.sleep(60)
    """
    assert stopped(started(program, tmp_path)) == (75, f"stopped by SIGTERM; {AGAIN}\n")
    assert (tmp_path / "whole").exists()


def test_an_interruption_that_python_drops_comes_again(tmp_path):
    program = """
        class Dropping:
            def __del__(self):
                is_here()
                time.sleep(60)
        def command():
            Dropping()
            time.sleep(60)
    """
    assert stopped(started(program, tmp_path)) == (75, f"stopped by SIGTERM; {AGAIN}\n")


def test_what_does_not_end_is_ended(tmp_path):
    program = """
        stop._GRACE_S = 0.5
        def command():
            threading.Thread(target=time.sleep, args=(60,)).start()
            while True:
                try:
                    is_here()
                    time.sleep(60)
                except KeyboardInterrupt:
                    continue
    """
    assert stopped(started(program, tmp_path)) == (75, f"stopped by SIGTERM; {AGAIN}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel gives orphans to the command")
def test_no_process_is_left_not_even_one_that_has_left_its_parent(tmp_path):
    program = """
        def command():
            subprocess.run(["/bin/sh", "-c", "setsid sleep 60 & trap '' TERM; sleep 60 &"])
            is_here()
            time.sleep(60)
    """
    process = started(program, tmp_path)
    children = descendants(process.pid)
    assert len(children) == 2
    assert stopped(process) == (75, f"stopped by SIGTERM; {AGAIN}\n")
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_a_request_is_noted_and_a_second_one_changes_nothing(tmp_path):
    program = """
        def command():
            request = stop.StopRequest()
            with request.listening():
                is_here()
                while not request():
                    time.sleep(0.01)
            open("noted", "w").close()
            time.sleep(1.0)
            sys.stderr.write("saved\\n")
            raise stop.Stopped(request.exit_code)
    """
    process = started(program, tmp_path)
    process.terminate()
    until = time.monotonic() + SOON_S
    while not (tmp_path / "noted").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert stopped(process) == (75, "saved\n")


def test_a_second_ctrl_c_does_not_wait_for_what_noted_the_first(tmp_path):
    program = """
        def command():
            with stop.StopRequest().listening():
                is_here()
                while not stop.is_interrupted():
                    time.sleep(0.01)
                is_here()
                time.sleep(60)
    """
    process = started(program, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "here\n"
    assert stopped(process, signal.SIGINT) == (130, f"interrupted; {AGAIN}\n")


def test_ctrl_c_that_the_parent_has_switched_off_stays_so(tmp_path):
    program = """
        def command():
            is_here()
            time.sleep(0.5)
    """
    off = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert stopped(started(program, tmp_path, **off), signal.SIGINT) == (0, "")
