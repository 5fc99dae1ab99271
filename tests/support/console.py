"""`imdsproxy console` in a process of its own, and Debian's Chromium that looks at it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from playwright.sync_api import ConsoleMessage, Page, Request, expect, sync_playwright

from support.patience import patience

CHROMIUM: Final = "/usr/bin/chromium"
_AXE: Final = Path(__file__).with_name("axe") / "axe.min.js"
_WITHIN_S: Final = 20.0
_SERIOUS: Final = frozenset({"serious", "critical"})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a program that asks as it likes; of equal headers the last counts."""

    status: int
    headers: Mapping[str, str]
    text: str


@dataclass(frozen=True, slots=True)
class RunningConsole:
    """A console that runs; `link` opens its session once."""

    link: str
    process: subprocess.Popen[bytes]

    @property
    def host(self) -> str:
        """With its port."""
        return urlsplit(self.link).netloc

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    @property
    def root(self) -> str:
        """Where its pages begin."""
        return self.origin + urlsplit(self.link).path.removesuffix("/open")

    def ask(
        self,
        target: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        form: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request as any program may send it.

        Args:
            target: An address of this console.
            headers: Those that it has; `host` among them where it is another one.
            method: Its method.
            form: Its body.
        """
        parts = urlsplit(target)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection = http.client.HTTPConnection(self.host, timeout=_WITHIN_S * patience())
        with contextlib.closing(connection):
            body = None if form is None else urlencode(form)
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read().decode())


@contextlib.contextmanager
def run_console(socket: Path, *options: str) -> Iterator[RunningConsole]:
    """A console for the daemon behind an admin socket."""
    words = (sys.executable, "-m", "imdsproxy", "--socket", str(socket), "--json", "console")
    process = subprocess.Popen((*words, *options), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        printed = b""
        while not printed.endswith(b"}\n"):
            line = process.stdout.readline()
            assert line, "the console ended"
            printed += line
        yield RunningConsole(json.loads(printed)["link"], process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_WITHIN_S * patience())
        process.stdout.close()


@dataclass
class Looker:
    """An operator's browser.

    Attributes:
        complaints: What the browser reports of pages: errors of scripts, what the content policy refused.
        requests: The address of each request that a page made.
    """

    console: RunningConsole
    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", self._note_request)

    def _note(self, message: ConsoleMessage) -> None:
        # A form that is not accepted is answered 422, which Chromium reports as an error.
        if message.type == "error" and "422" not in message.text:
            self.complaints.append(message.text)

    def _note_request(self, request: Request) -> None:
        self.requests.append(request.url)

    def open(self, path: str) -> Page:
        """A page of the console."""
        self.page.goto(self.console.root + path)
        return self.page

    def took_s(self) -> float:
        """How long the browser took from asking for the page to having all of it."""
        found: float = self.page.evaluate(
            "performance.getEntriesByType('navigation')[0].duration / 1000"
        )
        return found

    def judge(self, scheme: str) -> list[str]:
        """What axe-core finds serious in the page: in light everything, in dark the colours."""
        self.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(_AXE.read_text())
        only = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
        found: Mapping[str, Any] = self.page.evaluate("only => axe.run(document, only)", only)
        return [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html']}"
            for one in found["violations"]
            if one["impact"] in _SERIOUS
        ]


@contextlib.contextmanager
def open_looker(console: RunningConsole) -> Iterator[Looker]:
    """Debian's Chromium with the console's session, at the first page."""
    with sync_playwright() as driver:
        environment: dict[str, str | float | bool] = {**os.environ, "LANG": "C.UTF-8"}
        browser = driver.chromium.launch(executable_path=CHROMIUM, env=environment)
        with contextlib.closing(browser):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(10_000 * patience())
            expect.set_options(timeout=10_000 * patience())
            looker = Looker(console, page)
            page.goto(console.link)
            page.wait_for_url(f"{console.root}/networks")
            yield looker
