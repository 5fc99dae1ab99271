"""`script/docs` makes a site of the documents: whole, without a broken link, and no page needs another machine."""

import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import pytest

from support.demonstration import REPOSITORY
from support.pages import PAGES

pytestmark = pytest.mark.slow

_BUILD_S: Final = 280
_LOADS: Final = {"script": "src", "img": "src", "source": "srcset", "iframe": "src", "link": "href"}
"""The attribute by which an element has the browser fetch something."""
_ELSEWHERE: Final = re.compile(r"^(?:https?:)?//")


class Page(HTMLParser):
    """What a page of the site refers to.

    Attributes:
        anchors: What can be linked to.
        links: What a reader can follow.
        loads: What the browser fetches by itself.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif values.get(_LOADS.get(tag, "")):
            self.loads.append(values[_LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    command = [str(REPOSITORY / "script/docs"), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_S)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_document_is_a_page_of_the_site(site: Path) -> None:
    expected = [page.relative_to(REPOSITORY).with_suffix(".html") for page in PAGES]
    assert [page for page in expected if not (site / page).is_file()] == []


def test_every_link_of_the_site_leads_to_a_page_and_an_anchor_of_it(
    pages: dict[Path, Page],
) -> None:
    assert list(broken(pages)) == []


def broken(pages: dict[Path, Page]) -> Iterator[tuple[str, str]]:
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and anchor not in pages[target].anchors):
                yield path.name, link


def test_no_page_or_style_has_the_browser_fetch_anything_from_another_machine(
    site: Path, pages: dict[Path, Page]
) -> None:
    loaded = {load for page in pages.values() for load in page.loads}
    for style in site.rglob("*.css"):
        loaded |= set(re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", style.read_text()))
    assert len(loaded) > len(pages) / 10
    assert [one for one in loaded if _ELSEWHERE.match(one)] == []


def test_the_site_is_light_or_dark_as_the_reader_prefers(site: Path) -> None:
    styles = "".join(style.read_text() for style in site.rglob("*.css"))
    assert "prefers-color-scheme:dark" in styles.replace(": ", ":")
