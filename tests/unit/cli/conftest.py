from collections.abc import Iterator
from pathlib import Path

import pytest

from support.admin_server import admin_server
from support.cli import Cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """A daemon without records."""
    with admin_server(tmp_path) as server:
        yield Cli(server)


@pytest.fixture
def filled(cli: Cli) -> Cli:
    """A daemon with the network blue, and in it the instance web-1 at 10.0.0.5."""
    assert cli("network", "add", "blue", "--namespace", "blue").status == 0
    added = cli("instance", "add", "web-1", "--network", "blue", "--address", "10.0.0.5")
    assert added.status == 0
    return cli
