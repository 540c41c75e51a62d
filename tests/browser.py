"""Chromium without a window, driven by its own DevTools protocol: what a page shows, logs and asks for."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE_S = 60
_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio"),
    # of itself it asks its maker for updates, models and more
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)


class Tab:
    """A tab. events: what the browser said since the page was opened, by method."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number, self.events = socket, 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def run(self, code: str) -> Any:
        """Returns the value of JavaScript in the page; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str, width: int = 1600, dark: bool = False) -> None:
        """Opens a page and waits until its figures are drawn."""
        self.ask("Page.navigate", url="about:blank")  # what the page before still asks for is over
        self.size(width, dark)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.wait('document.readyState === "complete" && (document.documentElement.dataset.drawn || !window.draw)')

    def size(self, width: int, dark: bool = False) -> None:
        """Sets the width in pixels and the preferred colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def wait(self, condition: str) -> None:
        """Waits until JavaScript is true in the page."""
        end = time.monotonic() + _PATIENCE_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.complaints())
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Returns what the page wrote to the console, and its errors."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:2000] for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Returns the addresses that the page asked for."""
        sent = [
            event["params"]["request"]["url"] for event in self.events if event["method"].endswith(".requestWillBeSent")
        ]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def choose(self, field: str, path: Path) -> None:
        """Puts a file into a field for files, found by its selector."""
        field = self.ask("Runtime.evaluate", expression=f"document.querySelector('{field}')")["result"]["objectId"]
        self.ask("DOM.setFileInputFiles", objectId=field, files=[str(path)])

    def drop(self, place: str, path: Path) -> None:
        """Drops a file on what a selector finds."""
        x, y = self.run(
            f"(({{ x, y, width, height }}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector('{place}').getBoundingClientRect())"
        )
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.ask("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str, number: int) -> None:
        """Presses and lets go of a key. number: its code on Windows."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, **more)

    def picture(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        content = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(content))


@contextmanager
def browser() -> Iterator[Tab]:
    """Starts Chromium with one tab; it ends with the context."""
    from websockets.sync.client import connect

    assert PROGRAM is not None, "Chromium is missing: apt install chromium"
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = [*_ARGUMENTS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([PROGRAM, *arguments], **quiet)
        try:
            port = _port(process, Path(folder) / "DevToolsActivePort")
            with connect(f"ws://127.0.0.1:{port}{_tab(port)}", max_size=None, proxy=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _port(process: subprocess.Popen, file: Path) -> int:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        assert process.poll() is None, "the browser ended at once"
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("the browser does not open its port")


def _tab(port: int) -> str:
    """Returns the path of the first tab."""
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    connection.request("GET", "/json/list")
    (tab, *_) = [tab for tab in json.loads(connection.getresponse().read()) if tab["type"] == "page"]
    connection.close()
    return "/" + tab["webSocketDebuggerUrl"].split("/", 3)[3]
