"""The how-to pages, each followed to the letter on one host, which each leaves as it was."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import ds_identify
from support.document_blocks import missing_lines
from support.ds_identify import DMI_OF_SMBIOS, identify
from support.guest import Load
from support.how_to import META_DATA, Host, open_host, open_new_host
from support.lab import until
from support.systemd_daemon import named
from support.troubles import PRELUDE, TROUBLES, Line, lines_of_the_page

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

# 20 a second: within the limits of a guest.
_PAUSE_S: Final = 0.05


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with open_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """All of it runs, and does so again afterwards, as before."""
    before = shared.state()
    yield shared
    assert shared.state() == before
    shared.wait_served()


@pytest.mark.parametrize(
    "page",
    [
        "audit-log.md",
        "back-up.md",
        "debug-a-guest.md",
        "import-many-records.md",
        "operating.md",
        "require-tokens.md",
        "rotate-a-secret.md",
        "seal-user-data.md",
        "support-bundle.md",
    ],
)
def test_a_page_does_what_it_says_and_no_other_guest_loses_a_request(host: Host, page: str) -> None:
    others = [host.guest("db-1"), host.guest("vm-1")]
    with Load(others, META_DATA, named, keep_alive=False, pause_s=_PAUSE_S) as load:
        load.wait_answers(5)
        assert host.follow(page) == ""
        load.wait_answers(5)
    assert load.report.lost == []


@pytest.mark.parametrize("page", ["upgrade.md"])
def test_a_page_does_what_it_says(host: Host, page: str) -> None:
    assert host.follow(page) == ""


def test_a_host_is_moved_to_another_as_the_page_says(host: Host, tmp_path: Path) -> None:
    with open_new_host(tmp_path, host) as new:
        assert host.follow("move-a-host.md", new) == ""


_LINES: Final = tuple(lines_of_the_page())
_NOT_ASKED: Final = "cloud-init ends with DataSourceNone, and asked for nothing"


@pytest.fixture(scope="module")
def troubled(shared: Host) -> Iterator[Host]:
    """As `host`, looked at once for all lines."""
    before = shared.state()
    yield shared
    assert shared.state() == before


def test_every_line_of_the_page_is_caused() -> None:
    assert {line.seen for line in _LINES} == {*TROUBLES, _NOT_ASKED}


@pytest.mark.parametrize(
    "line",
    [line for line in _LINES if line.seen != _NOT_ASKED],
    ids=lambda line: re.sub(r"[^\w]+", "-", line.seen),
)
def test_the_command_shows_why_and_the_remedy_helps(troubled: Host, line: Line) -> None:
    trouble = TROUBLES[line.seen]

    def run(script: str) -> str:
        command = ("bash", "-euo", "pipefail", "-c", f"{PRELUDE}{script}")
        return troubled.daemon.machine.run(*command)

    def is_seen() -> bool:
        return run(trouble.symptom) == trouble.prints

    def is_explained() -> bool:
        # `explain` and `check` end with another status than 0 where something is wrong.
        return not missing_lines(line.shows, run(f"{line.command} 2>&1 || true"))

    run(trouble.cause)
    until(is_seen, what=f"what is seen: {trouble.symptom}")
    until(is_explained, what=f"{line.command} showing {line.shows.printed}")
    run(trouble.by_hand)
    for command in line.remedy:
        run(command)
    until(lambda: not is_seen(), what=f"the end of it: {trouble.symptom}")
    run(trouble.undo)
    troubled.wait_served()


def test_the_lines_of_the_snippet_have_cloud_init_ask(troubled: Host, tmp_path: Path) -> None:
    (line,) = (one for one in _LINES if one.seen == _NOT_ASKED)
    assert identify(ds_identify.Machine(), tmp_path / "before") == []
    printed = troubled.daemon.machine.run("sh", "-c", line.command)
    assert missing_lines(line.shows, printed) == []
    (smbios,) = re.findall(r"^-smbios '?type=1,(.*?)'?$", printed, re.MULTILINE)
    fields = dict(field.split("=", 1) for field in smbios.split(","))
    dmi = {DMI_OF_SMBIOS[1, name]: value for name, value in fields.items()}
    assert "OpenStack" in identify(ds_identify.Machine(dmi), tmp_path / "after")
