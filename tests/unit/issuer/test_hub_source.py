"""Hubs as the source of tokens: the order in which a host asks them."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.hub.pki.files import FleetFiles, HubNames, init_fleet
from imdsproxy.issuer.holder import Wanted
from imdsproxy.issuer.hub_source import AUTHORITY_FILE, CERTIFICATE_FILE, HUBS_FILE, HubSource
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.subject import Subject

# Nothing listens there.
_HUBS = ["https://127.0.0.1:1", "https://127.0.0.1:2", "https://127.0.0.1:3"]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The directory of a host's certificate."""
    files, now, key = FleetFiles(tmp_path / "hub"), datetime.now(UTC), make_key()
    init_fleet(files, None, HubNames("hub", ("127.0.0.1",)), now)
    signed = files.load_authority().certify_host(key.public_key(), "a", now)
    (tmp_path / CERTIFICATE_FILE).write_bytes(render_certificate(signed) + render_key(key))
    (tmp_path / AUTHORITY_FILE).write_bytes(files.ca_certificate.read_bytes())
    (tmp_path / HUBS_FILE).write_text(json.dumps(_HUBS))
    return tmp_path


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
async def test_each_host_asks_hubs_in_an_order_of_its_own(
    host: Path, order: tuple[int, ...]
) -> None:
    places = [order.index(number) / 10 for number in range(3)]
    source = HubSource(host, lambda: 0.0, iter(places).__next__)
    subject = Subject(InstanceId("web"), NetworkId("red"), None)
    with pytest.raises(SourceUnavailable) as raised:
        await source.request([Wanted("id", subject, "vault")])
    found = [raised.value.message.index(_HUBS[number]) for number in order]
    assert found == sorted(found)
