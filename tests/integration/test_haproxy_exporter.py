"""HAProxy's exporter says as much at many networks as at one."""

from __future__ import annotations

import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.model import Bind, DataplaneSpec
from imdsproxy.core.model import NetworkId
from support.haproxy_alone import paths_below, run_haproxy

pytestmark = pytest.mark.root


@contextmanager
def _haproxy(networks: int) -> Iterator[str]:
    """HAProxy with that many networks on loopback addresses; where its figures are."""
    # Nothing else has these addresses, so no port of theirs can be lost to another test.
    binds = tuple(
        Bind(NetworkId(f"net-{number}"), IPv4Address("127.9.0.1") + number, 80)
        for number in range(networks)
    )
    listen = "127.9.255.1:9466"
    # Pytest's own directories may be too long for the path of a socket.
    with tempfile.TemporaryDirectory(prefix="imdst-") as name:
        spec = DataplaneSpec(binds, paths_below(Path(name)), exporter=listen)
        with run_haproxy(spec, Path(name)):
            yield f"http://{listen}/metrics"


def _series(url: str) -> list[str]:
    deadline = time.monotonic() + 10
    while True:
        try:
            # A guest of the exporter cannot widen what it says.
            with urllib.request.urlopen(f"{url}?scope=listener", timeout=5) as answer:  # noqa: S310 - ours
                text = answer.read().decode()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            continue
        return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_number_of_series_does_not_grow_with_the_networks() -> None:
    with _haproxy(1) as url:
        few = _series(url)
    with _haproxy(300) as url:
        many = _series(url)
    assert any(line.startswith("haproxy_frontend_http_requests_total") for line in few)
    assert len(many) == len(few)
    assert not [line for line in many if re.search(r"haproxy_listener_|net-\d", line)]
