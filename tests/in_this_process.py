"""Commands run in the test's own process, through the entry point that the shell calls."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main


def in_this_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """A function that runs `pipeline` with these arguments and returns what it printed on stdout and stderr."""

    def call(*arguments: object, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert (ended.value.code or 0) == status, said.err
        return said.out, said.err

    return call


def lines_of(path: Path) -> list[Any]:
    """What each line of a JSON Lines file says."""
    return [json.loads(line) for line in path.read_text().splitlines()]
