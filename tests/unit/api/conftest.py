"""A served admin API for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.admin_server import INSTANCE, NETWORK, AdminServer, admin_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    """One that has network blue, and web-1 in it."""
    with admin_server(tmp_path) as served:
        served.client.request("POST", "/v1/networks", body=NETWORK)
        served.client.request("POST", "/v1/instances", body=INSTANCE)
        yield served
