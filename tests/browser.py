"""A headless Chromium spoken to through its own pipe: pages are looked at as a reader sees them, at any width, dark or in print."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One process with one page. Ended by `close`."""

    def __init__(self, home: Path) -> None:
        assert CHROMIUM
        (ours, theirs), (back, answers) = os.pipe(), os.pipe()

        def placed() -> None:  # Chromium reads from 3 and writes to 4
            copies = os.dup(ours), os.dup(answers)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        self.process = subprocess.Popen(
            ["nice", "-n", "10", CHROMIUM, *FLAGS, f"--user-data-dir={home}", "about:blank"],
            preexec_fn=placed, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(ours)
        os.close(answers)
        self._to, self._from = os.fdopen(theirs, "wb", buffering=0), os.fdopen(back, "rb")
        self._number, self.messages = 0, list[str]()
        page = next(t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **asked: Any) -> dict[str, Any]:
        """An answer of the page."""
        return self._ask(method, self._session, **asked)

    def _ask(self, method: str, session: str = "", **asked: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": asked} | ({"sessionId": session} if session else {})
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found["error"]
                return dict(found["result"])

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser ended"
            text += byte
        found: dict[str, Any] = json.loads(text)
        if found.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(found["params"]))
        return found

    def open(self, path: Path, width: int = 1400, *, dark: bool = False, medium: str = "screen") -> None:
        """Show a file at this width; `messages` then holds what the page complained of."""
        self.messages.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        feature = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=medium, features=feature)
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def look(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, height: int = 3000) -> None:
        """A PNG of the page's first `height` pixels."""
        size = {"x": 0, "y": 0, "width": self.look("innerWidth"), "height": height, "scale": 1}
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", clip=size, captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        """End the process and wait for it."""
        self._ask("Browser.close")
        self.process.wait(20)
        self._to.close()
        self._from.close()
