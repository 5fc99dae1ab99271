"""A served admin API for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.admin_server import AdminServer, admin_server

NETWORK = {"id": "blue", "listener": {"namespace": "blue"}}
INSTANCE = {
    "id": "web-1",
    "name": "web-1",
    "ports": [{"network": "blue", "mac": "52:54:00:12:34:56", "addresses": ["10.0.0.5"]}],
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    """One that has network blue, and web-1 in it."""
    with admin_server(tmp_path) as served:
        served.client.request("POST", "/v1/networks", body=NETWORK)
        served.client.request("POST", "/v1/instances", body=INSTANCE)
        yield served
