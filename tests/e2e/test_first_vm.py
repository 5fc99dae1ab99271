"""The first tutorial, followed to the letter on a blank Debian 13: from the package to a machine that starts.

`script/test-images` boots the guest too.
"""

from pathlib import Path

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of
from support.vm.newcomer import LOGS, follow, page_blocks

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_newcomer_gets_from_the_package_to_a_machine_that_starts_and_back_as_the_tutorial_says(
    tmp_path: Path,
) -> None:
    assert follow(tmp_path).fault == "", f"all that it printed: {LOGS}"


def test_the_first_page_has_the_five_commands_of_the_tutorial() -> None:
    heading = "## From nothing to a booted cloud image"
    (block,) = blocks_of(REPOSITORY / "README.md", heading)
    commands = _commands(block.script)
    tutorial = "\n".join(one.script for one in page_blocks())
    assert len(commands) == 5
    assert set(commands) - set(_commands(tutorial)) == set()


def _commands(script: str) -> list[str]:
    """Each with its words separated by one blank, whether it is on one line or on several."""
    return [" ".join(line.split()) for line in script.replace("\\\n", " ").splitlines()]
