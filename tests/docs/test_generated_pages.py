"""Pages, manual pages and completions are what the code makes of them now, and the pages can be shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from imdsproxy.errors import KINDS, ImdsproxyError

REPOSITORY = Path(__file__).parents[2]
MADE = (
    (REPOSITORY / "docs/reference", "reference"),
    (REPOSITORY / "packaging/man", "packaging/man"),
    (REPOSITORY / "packaging/completion", "packaging/completion"),
    (REPOSITORY / "packaging/schema", "packaging/schema"),
)
MANUALS = sorted(path.name for path in (REPOSITORY / "packaging/man").iterdir())
ROFF = {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".BR", ".br", '.\\"'}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything as the code makes it."""
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, str(REPOSITORY / "script/docgen.py"), "reference", "packaging"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder


@pytest.mark.parametrize(("folder", "again"), MADE, ids=lambda one: str(one).rpartition("/")[2])
def test_generated_files_say_what_the_code_says(made: Path, folder: Path, again: str) -> None:
    written, expected = (
        {path.name: path.read_text(encoding="utf-8") for path in place.iterdir()}
        for place in (folder, made / again)
    )
    # Pages of the reference that people write have no such line.
    if again == "reference":
        written = {name: text for name, text in written.items() if text.startswith("<!-- Made by")}
    assert written.keys() == expected.keys()
    stale = [name for name in expected if written[name] != expected[name]]
    assert not stale, "run `script/docgen.py`"


def test_every_exit_status_of_an_error_is_documented(made: Path) -> None:
    documented = re.findall(
        r"^\| (\d+) \| ", (made / "reference/cli.md").read_text("utf-8"), re.MULTILINE
    )
    assert {str(kind.exit_status) for kind in KINDS} <= set(documented)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_every_error_code_has_a_remedy_of_its_own_in_the_reference(
    made: Path, kind: type[ImdsproxyError]
) -> None:
    assert "remedy" in vars(kind)
    if kind is not ImdsproxyError:
        page = (made / "reference/errors.md").read_text("utf-8")
        (row,) = re.findall(rf"^\| `{kind.code}` \|.* \| ([^|]+) \|$", page, re.MULTILINE)
        assert row == kind.remedy
        assert len(row) > 20


@pytest.mark.parametrize("name", MANUALS)
def test_a_manual_page_can_be_shown(name: str) -> None:
    page = REPOSITORY / "packaging/man" / name
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(page)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stderr == ""
    assert "SEE ALSO" in shown.stdout
    for line in page.read_text(encoding="utf-8").splitlines():
        # Nothing in a text is a command.
        assert not line.startswith("'")
        assert not line.startswith(".") or line.split()[0] in ROFF
