"""The how-to pages, each followed to the letter on one host, which each leaves as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.guest import Load
from support.how_to import META_DATA, Host, open_host, open_new_host
from support.systemd_daemon import named

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
        "back-up.md",
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
