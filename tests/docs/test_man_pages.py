from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imdsproxy.cli.docgen import MANUALS
from imdsproxy.cli.main import SHELLS, render_completion

PACKAGING = Path(__file__).parents[2] / "packaging"
PAGES = PACKAGING / "man"


@pytest.mark.parametrize("name", MANUALS)
def test_a_manual_page_says_what_the_code_says(name: str) -> None:
    written = (PAGES / name).read_text(encoding="utf-8")

    assert written == MANUALS[name](), "run `python -m imdsproxy.cli.docgen`"


def test_there_are_no_other_manual_pages() -> None:
    assert {path.name for path in PAGES.iterdir()} == set(MANUALS)


@pytest.mark.parametrize("name", MANUALS)
def test_a_manual_page_can_be_shown(name: str) -> None:
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(PAGES / name)]
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


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_is_the_one_that_the_program_gives(shell: str) -> None:
    written = (PACKAGING / "completion" / f"imdsproxy.{shell}").read_text(encoding="utf-8")

    assert written == render_completion(shell), "run `python -m imdsproxy.cli.docgen`"
