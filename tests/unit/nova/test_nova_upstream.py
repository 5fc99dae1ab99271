from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.model import NovaServer, NovaTls
from imdsproxy.core.model import InstanceId, IpAddress, NetworkId
from imdsproxy.core.nova import sign_instance
from imdsproxy.errors import ConfigUnreadable, SecretUnreadable
from imdsproxy.nova.settings import NovaSettings
from imdsproxy.nova.upstream import NovaUpstream


class Names:
    """A host's names, and whether anybody can say."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, ...]] = {}
        self.silent = False

    async def look_up(self, name: str) -> tuple[IpAddress, ...]:
        if self.silent:
            raise OSError("Temporary failure in name resolution")
        return tuple(map(ip_address, self.known.get(name, ())))


def _secret(directory: Path, name: str = "secret", text: str = "s3cret\n") -> str:
    file = directory / name
    file.write_text(text)
    file.chmod(0o600)
    return str(file)


def _settings(directory: Path, *urls: str, **fields: object) -> NovaSettings:
    endpoints = [{"url": url} for url in urls] or [{"url": "http://192.0.2.1"}]
    chosen = {"endpoints": endpoints, "secret_file": _secret(directory), **fields}
    return NovaSettings.model_validate({"endpoint_sets": {"default": chosen}})


def test_a_secret_is_read_without_the_blanks_around_it(tmp_path: Path) -> None:
    nova = NovaUpstream(tmp_path)
    assert nova.read(_settings(tmp_path, secret_file=_secret(tmp_path, text=" s3cret \n")))
    record = nova.routing.record(NetworkId("n"), InstanceId("i"), "p")
    assert record is not None
    assert record.signatures == (sign_instance(b"s3cret", InstanceId("i")),)


def test_an_empty_secret_is_refused_and_what_was_in_force_stays(tmp_path: Path) -> None:
    nova = NovaUpstream(tmp_path)
    nova.read(_settings(tmp_path))
    before = nova.routing
    with pytest.raises(SecretUnreadable, match="empty"):
        nova.read(_settings(tmp_path, next_secret_file=_secret(tmp_path, "next", " \n")))
    assert nova.routing == before


def test_only_what_changes_records_says_that_records_change(tmp_path: Path) -> None:
    nova = NovaUpstream(tmp_path)
    assert nova.read(_settings(tmp_path))
    assert not nova.read(_settings(tmp_path, "http://192.0.2.7"))
    assert nova.read(_settings(tmp_path, projects=["p"]))
    settings = _settings(tmp_path, projects=["p"])
    _secret(tmp_path, text="another")
    assert nova.read(settings)


async def test_addresses_are_servers_as_they_are_and_each_of_a_name_is_one(tmp_path: Path) -> None:
    names = Names()
    names.known["nova"] = ("192.0.2.9", "192.0.2.8", "2001:db8::8")
    nova = NovaUpstream(tmp_path, names.look_up)
    nova.read(_settings(tmp_path, "http://nova:80", "http://[2001:db8::1]"))
    assert await nova.resolve()
    (backend,) = nova.backends()
    assert backend.host == "nova:80"
    assert backend.tls is None
    assert backend.servers == (
        NovaServer(ip_address("192.0.2.8"), 80),
        NovaServer(ip_address("192.0.2.9"), 80),
        NovaServer(ip_address("2001:db8::8"), 80),
        NovaServer(ip_address("2001:db8::1"), 8775),
    )


async def test_a_name_that_cannot_be_looked_up_keeps_its_addresses(tmp_path: Path) -> None:
    names = Names()
    names.known["nova"] = ("192.0.2.9",)
    nova = NovaUpstream(tmp_path, names.look_up)
    nova.read(_settings(tmp_path, "http://nova"))
    assert await nova.resolve()
    names.silent = True
    assert not await nova.resolve()
    assert nova.backends()[0].servers == (NovaServer(ip_address("192.0.2.9"), 8775),)
    (problem,) = nova.problems
    assert problem.field == "nova.endpoint_sets.default.endpoints[0].url"
    names.silent = False
    names.known["nova"] = ("192.0.2.10",)
    assert await nova.resolve()
    assert nova.problems == ()


async def test_a_name_that_was_never_found_leaves_a_set_without_servers(tmp_path: Path) -> None:
    nova = NovaUpstream(tmp_path, Names().look_up)
    nova.read(_settings(tmp_path, "http://nova"))
    await nova.resolve()
    assert nova.backends()[0].servers == ()
    assert "no address" in nova.problems[0].reason


async def test_addresses_that_only_change_their_order_are_no_change(tmp_path: Path) -> None:
    names = Names()
    names.known["nova"] = ("192.0.2.9", "192.0.2.8")
    nova = NovaUpstream(tmp_path, names.look_up)
    nova.read(_settings(tmp_path, "http://nova"))
    await nova.resolve()
    names.known["nova"] = ("192.0.2.8", "192.0.2.9")
    assert not await nova.resolve()


def test_certificate_and_key_are_joined_for_haproxy_and_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "cert").write_bytes(b"CERT\n")
    (tmp_path / "key").write_bytes(b"KEY\n")
    (tmp_path / "key").chmod(0o600)
    nova = NovaUpstream(tmp_path / "run")
    (tmp_path / "run").mkdir()
    nova.read(
        _settings(
            tmp_path,
            "https://nova.example",
            client_cert_file=str(tmp_path / "cert"),
            client_key_file=str(tmp_path / "key"),
        )
    )
    (backend,) = nova.backends()
    joined = tmp_path / "run" / "nova-default.pem"
    assert backend.tls is not None
    assert replace(backend.tls, contents="") == NovaTls(
        "nova.example", "@system-ca", True, str(joined)
    )
    assert joined.read_bytes() == b"CERT\nKEY\n"
    assert joined.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["ca_file", "client_cert_file"])
def test_a_renewed_certificate_is_another_configuration_and_no_other_record(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "certificate"
    file.write_bytes(b"OLD")
    settings = _settings(tmp_path, "https://nova.example", **{name: str(file)})
    nova = NovaUpstream(tmp_path)
    nova.read(settings)
    before = nova.backends()
    assert not nova.read(settings)
    assert nova.backends() == before
    file.write_bytes(b"NEW")
    assert not nova.read(settings)
    assert nova.backends() != before


@pytest.mark.parametrize("name", ["ca_file", "client_cert_file"])
def test_a_file_that_is_missing_is_told_before_haproxy_sees_it(tmp_path: Path, name: str) -> None:
    settings = _settings(tmp_path, "https://nova.example", **{name: str(tmp_path / "none")})
    with pytest.raises(ConfigUnreadable) as caught:
        NovaUpstream(tmp_path).read(settings)
    assert caught.value.problems[0].field == f"nova.endpoint_sets.default.{name}"


def test_the_next_secret_is_the_second_slot(tmp_path: Path) -> None:
    settings = NovaSettings.model_validate(
        {
            "endpoint_sets": {
                "default": {
                    "endpoints": [
                        {"url": "http://192.0.2.1"},
                        {"url": "http://192.0.2.2", "secret": "next"},
                    ],
                    "secret_file": _secret(tmp_path),
                    "next_secret_file": _secret(tmp_path, "next", "following"),
                }
            }
        }
    )
    nova = NovaUpstream(tmp_path)
    nova.read(settings)
    assert [server.slot for server in nova.backends()[0].servers] == [0, 1]
    record = nova.routing.record(NetworkId("n"), InstanceId("i"), "p")
    assert record is not None
    assert record.signatures == (
        sign_instance(b"s3cret", InstanceId("i")),
        sign_instance(b"following", InstanceId("i")),
    )
