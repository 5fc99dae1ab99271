"""The first tutorial, followed to the letter on a blank Debian 13: from the package to a stock image that booted."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of
from support.patience import patience
from support.vm.newcomer import LOGS, follow, page_blocks

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1800)]

_PROMISED_S: Final = 300.0


def test_a_newcomer_gets_from_the_package_to_a_booted_stock_image_as_the_tutorial_says(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    done = follow(tmp_path)
    assert done.fault == "", f"all that it printed: {LOGS}"
    record_property("timed", f"the first tutorial took {done.took_s:.0f} s, without KVM")
    assert done.took_s < _PROMISED_S * patience()


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
