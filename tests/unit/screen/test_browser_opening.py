"""A page opens in the browser only where somebody can see it."""

import sys
import webbrowser

import pytest

from pipeline.screen.browser import show


@pytest.mark.parametrize(
    ("terminal", "display", "opened"), [(True, ":0", True), (False, ":0", False), (True, "", False)]
)
def test_a_page_opens_only_on_a_terminal_with_a_screen(tmp_path, monkeypatch, terminal, display, opened):
    seen = tmp_path / "seen"
    browser = tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # what was registered before would be asked first
    monkeypatch.setattr(webbrowser, "_browsers", {})
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    page = tmp_path / "report page.html"
    assert show(page) is opened
    assert seen.exists() is opened
    if opened:
        assert seen.read_text().strip() == page.as_uri()
