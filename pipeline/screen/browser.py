"""Showing a page to whoever sits before the screen."""

import os
import sys
import webbrowser
from pathlib import Path

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def show(page: Path) -> bool:
    """Open a page in the browser if somebody is there to see it; returns whether it was opened.

    Nothing opens where the program's messages go to a file, or on a Linux machine without a screen: a browser in the
    terminal would take that over.
    """
    if not sys.stderr.isatty() or (sys.platform == "linux" and not any(os.environ.get(name) for name in _DISPLAYS)):
        return False
    return webbrowser.open(page.resolve().as_uri())
