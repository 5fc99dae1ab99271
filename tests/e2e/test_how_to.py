"""The how-to pages, each followed to the letter on one host, which each leaves as it was."""

from collections.abc import Iterator
from typing import Final

import pytest

from support.how_to import Host, open_host
from support.systemd_daemon import wait_served

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_FOLLOWED: Final = ("back-up.md", "seal-user-data.md", "upgrade.md")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with open_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.mark.parametrize("page", _FOLLOWED)
def test_a_page_does_what_it_says_and_leaves_the_host_as_it_was(host: Host, page: str) -> None:
    before = host.state()
    assert host.follow(page) == ""
    assert host.state() == before
    wait_served(*host.daemon.guests)
