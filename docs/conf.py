"""How Sphinx makes a site of the documents; `script/docs` runs it over the whole repository.

The documents stay Markdown that every viewer shows: what the menu has is read from the links of `_MENUS`.
"""

import re
from pathlib import PurePosixPath
from typing import Final

from sphinx.application import Sphinx

project = "imdsproxy"
author = "The imdsproxy authors"
project_copyright = author
html_title = "imdsproxy"
extensions = ["myst_parser"]
include_patterns = ["*.md", "docs/**.md"]
root_doc = "docs/index"
# Without these it looks through thousands of files.
exclude_patterns = [".*", "src", "tests", "build", "dist", "bench", "demo"]
myst_heading_anchors = 4
nitpicky = True
highlight_language = "bash"
html_theme = "furo"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

_MENUS: Final = frozenset({"docs/index", "docs/adr/README"})
_LINK: Final = re.compile(r"^(?:- |\| )\[[^]]*\]\(([^)#\s]+)\.md\)", re.MULTILINE)
"""A link with which an item of a list begins, or a row of a table."""


def add_menu(_app: Sphinx, name: str, content: list[str]) -> None:
    """Append a hidden `toctree` for each section of a page that lists pages."""
    if name not in _MENUS:
        return
    folder = PurePosixPath(name).parent
    lines = [content[0], ""]
    for section in re.split(r"^(?=## )", content[0], flags=re.MULTILINE):
        caption = [f":caption: {section.splitlines()[0][3:]}"] if section.startswith("## ") else []
        pages = [f"/{folder / page}" for page in _LINK.findall(section)]
        lines += ["```{toctree}", ":hidden:", *caption, *pages, "```", ""] if pages else []
    content[0] = "\n".join(lines)


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("source-read", add_menu)
