"""Headless Chromium, driven through a pipe by its own protocol: no driver, no port, no package.

On Debian it is installed if it is missing and the tests run as root; elsewhere `find_chromium` says why there is none.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "--no-install-recommends", "chromium"])
APT_LOCK = "/tmp/tests-apt.lock"
"""tests/cluster/start_slurm.sh, which another worker may run, installs under the same lock: apt does not wait."""
TIMEOUT_S = 120.0


def find_chromium() -> tuple[str | None, str]:
    """The browser's program, and why there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in INSTALL:
            done = subprocess.run(
                ["flock", APT_LOCK, *command], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            if done.returncode:
                return None, f"{' '.join(command)} failed: {done.stderr.strip()[-200:]}"
        found = shutil.which("chromium")
    return found, "" if found else "no Chromium here, and none can be installed (that needs root on Debian)"


class Browser:
    """One browser with one tab."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory()
        read_by_browser, self._out = os.pipe()
        self._in, written_by_browser = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip
        moves = f"exec {_quoted(program)} {' '.join(map(_quoted, flags))} 3<&{read_by_browser} 4>&{written_by_browser}"
        self._process = subprocess.Popen(
            ["bash", "-c", moves], pass_fds=(read_by_browser, written_by_browser), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(read_by_browser)
        os.close(written_by_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        """What the tab has said since the page was opened."""
        tabs = self.call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        """The next message; those that are events are kept."""
        ends = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, ends - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, address: str, width: int = 1280, *, dark: bool = False) -> None:
        """Load a page in a window of this width, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._navigate("about:blank")  # so that what the page before still does is over, and said
        self.evaluate("0")
        self._navigate(address)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _navigate(self, address: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression on the page is true."""
        ends = time.monotonic() + TIMEOUT_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < ends, f"{condition} did not come true"
            time.sleep(0.05)

    def faults(self) -> list[str]:
        """What went wrong on the page since it was opened: exceptions, errors and warnings on the console, requests."""
        self.evaluate("0")  # what was said before has been read then
        found = []
        for event in self.events:
            kind, said = event["method"], event.get("params", {})
            is_loud = kind == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert")
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed") or is_loud:
                found.append(json.dumps(said)[:500])
        return found

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))

    def close(self) -> None:
        os.close(self._out)  # the browser ends when its pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._in)
        self._profile.cleanup()


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
