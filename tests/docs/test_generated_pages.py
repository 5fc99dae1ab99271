"""Pages, manual pages and completions are what the code makes of them now, and the pages can be shown."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imdsproxy.cli.docgen import MANUALS, PAGES
from imdsproxy.cli.main import SHELLS, render_completion

REPOSITORY = Path(__file__).parents[2]
REFERENCE, MAN = REPOSITORY / "docs/reference", REPOSITORY / "packaging/man"


@pytest.mark.parametrize(
    ("path", "render"),
    [
        *((REFERENCE / name, render) for name, render in PAGES.items()),
        *((MAN / name, render) for name, render in MANUALS.items()),
        *(
            (
                REPOSITORY / f"packaging/completion/imdsproxy.{shell}",
                lambda shell=shell: render_completion(shell),
            )
            for shell in SHELLS
        ),
    ],
    ids=lambda one: one.name if isinstance(one, Path) else "",
)
def test_a_generated_file_says_what_the_code_says(path: Path, render: Callable[[], str]) -> None:
    written = path.read_text(encoding="utf-8")
    assert written == render(), "run `python -m imdsproxy.cli.docgen`"


def test_there_are_no_other_pages() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(PAGES)
    assert {path.name for path in MAN.iterdir()} == set(MANUALS)


@pytest.mark.parametrize("name", MANUALS)
def test_a_manual_page_can_be_shown(name: str) -> None:
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(MAN / name)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stderr == ""
    assert "SEE ALSO" in shown.stdout


def test_nothing_in_a_text_is_a_command_of_roff() -> None:
    for render in MANUALS.values():
        for line in render().splitlines():
            assert not line.startswith("'")
            if line.startswith("."):
                assert line.split()[0] in {
                    *(".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".BR", ".br"),
                    '.\\"',
                }
