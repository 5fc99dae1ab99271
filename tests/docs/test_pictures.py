"""The pictures in the documents are what `script/picture.py` makes, and say the same in words."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from support.demonstration import REPOSITORY
from support.pages import PAGES

_PLACE: Final = REPOSITORY / "docs/images"
_TEXTS: Final = sorted((REPOSITORY / "script/pictures").glob("*.txt"))
_NAMES: Final = tuple(f"{text.stem}-{name}.svg" for text in _TEXTS for name in ("dark", "light"))
_SVG: Final = "{http://www.w3.org/2000/svg}"


def test_the_pictures_are_what_the_script_makes(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "script/picture.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(_NAMES)
    stale = [
        name for name in _NAMES if (tmp_path / name).read_text() != (_PLACE / name).read_text()
    ]
    assert not stale, "run `script/picture.py`"


@pytest.mark.parametrize("name", _NAMES)
def test_a_screen_reader_has_the_picture_in_words_and_no_text_leaves_the_picture(name: str) -> None:
    root = ET.fromstring((_PLACE / name).read_text())  # noqa: S314 - our own picture
    assert root.get("role") == "img"
    for element in ("title", "desc"):
        assert len(root.findtext(f"{_SVG}{element}") or "") > 20
    width = float((root.get("viewBox") or "").split()[2])
    texts = root.findall(f"{_SVG}text")
    assert len(texts) > 10
    for text in texts:
        # No letter of these fonts is wider than 0.65 of their size.
        length = len(text.text or "") * float(text.get("font-size", "0")) * 0.65
        half = length / 2 if text.get("text-anchor") == "middle" else length
        assert float(text.get("x", "0")) + half < width


def test_pages_show_each_picture_in_the_colours_that_the_reader_prefers() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    for text in _TEXTS:
        dark = (
            rf'<source media="\(prefers-color-scheme: dark\)" srcset="[^"]*{text.stem}-dark\.svg">'
        )
        assert re.search(rf'{dark}\s*<img src="[^"]*images/{text.stem}-light\.svg"', shown), text
