"""A real browser for tests: Chromium without a window, spoken to over a pipe (its DevTools protocol, no library)."""

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_LIMIT_S = 60.0
# Its own housekeeping would go to the network otherwise; what a page asks for is not held back by any of these.
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--hide-scrollbars", "--force-color-profile=srgb"),
)


def find_browser():
    """Path of an installed Chromium, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one Chromium; `events` are all messages that the page caused, in order."""

    def __init__(self, program, profile: Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The protocol's numbers are fixed: 3 is read by the browser, 4 is written by it.
        redirect = 'exec "$0" "$@" 3<&"$READ_FD" 4>&"$WRITE_FD"'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", redirect, program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write),
            env={**os.environ, "READ_FD": str(to_read), "WRITE_FD": str(to_write)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self.events, self._session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method, **parameters):
        """Send one command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, *, width: int, height: int = 900, theme: str = "light"):
        """Show a local file in a window of this width in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression):
        """Value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path | None = None, *, whole: bool = False):
        """PNG bytes of the window, or of the `whole` page; also written to `path`."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(picture)
        return picture

    def requests(self):
        """Addresses of everything that the page asked for, itself included."""
        return [one["params"]["request"]["url"] for one in self.events if one["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        """Everything in the console, and every uncaught error."""
        names = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [one["params"] for one in self.events if one["method"] in names]

    def _wait_for(self, method):
        while not any(one.get("method") == method for one in self.events):
            self.events.append(self._receive())

    def _receive(self):
        until = time.monotonic() + _LIMIT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                assert selector.select(max(0.0, until - time.monotonic())), "the browser does not answer"
                chunk = os.read(self._read, 1 << 20)
                assert chunk, "the browser ended"
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)
