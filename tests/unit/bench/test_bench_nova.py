from __future__ import annotations

import hashlib
import hmac
import json
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml

from bench.daemon import render_settings
from bench.front import render_agents_proxy
from bench.guest import Answer
from bench.neutron import answer_ports, neutron_settings, port_name
from bench.nova import identity, names_itself, nova_guest, nova_settings, render_stub
from imdsproxy.config.schema import Settings
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.nova import sign_instance
from imdsproxy.core.records import Refused, parse_instance
from imdsproxy.sources.neutron.ports import PortQuery, parse_ports, render_query


def test_the_stand_in_checks_the_signature_that_the_daemon_makes(tmp_path: Path) -> None:
    nova_settings(tmp_path, 8775)
    secret = (tmp_path / "nova.secret").read_bytes().strip()
    one = identity("imdsb-0")
    assert one.signature == sign_instance(secret, InstanceId(one.instance))
    assert one.signature == hmac.new(secret, one.instance.encode(), hashlib.sha256).hexdigest()


def test_the_secret_can_be_read_by_nobody_else(tmp_path: Path) -> None:
    nova_settings(tmp_path, 8775)
    assert (tmp_path / "nova.secret").stat().st_mode & 0o077 == 0


def test_the_settings_in_front_of_nova_are_valid(tmp_path: Path) -> None:
    overrides = {**nova_settings(tmp_path, 8775), **neutron_settings(9696)}
    text = render_settings(tmp_path, overrides)
    settings = Settings.model_validate(yaml.safe_load(text), strict=False)
    (endpoint,) = settings.nova.endpoint_sets["default"].endpoints
    assert str(endpoint.url) == "http://127.0.0.1:8775"
    assert settings.sources.neutron.endpoint == "http://127.0.0.1:9696"


def test_every_network_has_a_guest_of_its_own_that_nova_serves() -> None:
    records = [nova_guest(f"imdsb-{number}") for number in range(50)]
    assert len({record["id"] for record in records}) == 50
    assert not any(isinstance(parse_instance(record), Refused) for record in records)
    assert {record["upstream"] for record in records} == {"nova"}


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (200, json.dumps({"uuid": identity("a").instance}), True),
        (200, json.dumps({"uuid": identity("b").instance}), False),
        (503, json.dumps({"uuid": identity("a").instance}), False),
        (200, "<html>", False),
        (200, "[]", False),
    ],
)
def test_a_guest_is_answered_as_itself_or_it_does_not_count(
    status: int, body: str, *, right: bool
) -> None:
    assert names_itself("a", Answer(status, body.encode(), closes=True)) is right


def test_the_stand_in_answers_at_once_on_one_port_and_late_on_the_other() -> None:
    text = render_stub(1001, 1002)
    at_once, late = text.split("frontend slow\n")
    assert "bind 127.0.0.1:1001 " in at_once
    assert "inspect-delay" not in at_once
    assert "bind 127.0.0.1:1002 " in late
    assert "inspect-delay 20ms" in late
    assert text.count("status 403 unless") == 2


def test_the_proxy_of_neutrons_agents_names_its_network_and_appends_who_asks() -> None:
    text = render_agents_proxy("imdsb-0", 8090, Path("/x/metadata_proxy"))
    assert "bind 169.254.169.254:8090 namespace imdsb-0\n" in text
    assert "set-header X-Neutron-Network-ID imdsb-0\n" in text
    assert "option forwardfor\n" in text
    assert "server metadata /x/metadata_proxy\n" in text


def test_the_stand_in_for_neutron_knows_a_port_of_whatever_address_is_asked_for() -> None:
    query = PortQuery(networks=(NetworkId("imdsb-1"),), addresses=(ip_address("10.0.0.9"),))
    (port,) = parse_ports(answer_ports(render_query(query)))
    assert port.instance == identity(port_name("imdsb-1", "10.0.0.9")).instance
    assert port.serves
    assert port.has(ip_address("10.0.0.9"))
