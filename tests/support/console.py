"""`imdsproxy console` in a process of its own, and Debian's Chromium that looks at it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

from support.patience import patience

CHROMIUM: Final = "/usr/bin/chromium"
_WITHIN_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class RunningConsole:
    """A console that runs; `link` opens its session once."""

    link: str
    process: subprocess.Popen[bytes]

    @property
    def origin(self) -> str:
        parts = urlsplit(self.link)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def root(self) -> str:
        """Where its pages begin."""
        return self.origin + urlsplit(self.link).path.removesuffix("/open")

    def ask(
        self, path: str, *, method: str = "GET", body: str = "", **headers: str
    ) -> tuple[HTTPResponse, str]:
        """One request as any program may send it; `path` is the whole of it."""
        connection = HTTPConnection(urlsplit(self.link).netloc, timeout=_WITHIN_S * patience())
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body.encode() or None, names)
            answer = connection.getresponse()
            return answer, answer.read().decode()


@contextlib.contextmanager
def run_console(socket: Path) -> Iterator[RunningConsole]:
    """A console for the daemon behind an admin socket."""
    words = (sys.executable, "-m", "imdsproxy", "--socket", str(socket), "--json", "console")
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        said = b""
        while not said.endswith(b"}\n"):
            line = process.stdout.readline()
            assert line, "the console ended"
            said += line
        yield RunningConsole(json.loads(said)["link"], process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_WITHIN_S * patience())
        process.stdout.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, driven by Playwright."""
    with sync_playwright() as driver:
        # What it says of the machine that it runs on is no business of the tests.
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, env={**os.environ, "LANG": "C.UTF-8"}
        )
        with contextlib.closing(browser):
            yield browser


def open_page(browser: Browser, console: RunningConsole) -> Page:
    """The first page, by the link; what the browser complains about fails the test at the end."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(10_000 * patience())
    page.goto(console.link)
    page.wait_for_url(f"{console.root}/networks")
    return page
