"""What a start needs not compile, because its record is on disk as it was compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from imdsproxy.app.compiled_files import CompiledIndex, IndexedFiles
from imdsproxy.core.compiled import CompiledRecord, compiled_path, network_mark
from imdsproxy.core.model import (
    Dialect,
    Instance,
    InstanceId,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    SshKey,
    Subnet,
)
from imdsproxy.core.packed import PackedInstances
from imdsproxy.serving.store import DiskFiles, PasswordStore

_A, _B = InstanceId("a"), InstanceId("b")
_RECORD = CompiledRecord("0123456789abcdef", b"content\n")


def _files(directory: Path) -> IndexedFiles:
    passwords = PasswordStore(directory / "passwords")
    files = DiskFiles(directory / "documents", passwords, None)
    return IndexedFiles(files, CompiledIndex(directory / "compiled.sqlite"))


def _after_a_restart(directory: Path, of: bytes = b"1") -> Mapping[InstanceId, str]:
    files = _files(directory)
    found = files.unchanged({_A: of})
    files.settle()
    return found


@pytest.fixture
def written(tmp_path: Path) -> Path:
    files = _files(tmp_path)
    files.apply(_A, _RECORD, b"1")
    files.settle()
    return tmp_path


def test_a_record_that_was_compiled_of_the_same_is_known_after_a_restart(written: Path) -> None:
    assert _after_a_restart(written) == {_A: _RECORD.revision}


def test_a_record_that_was_compiled_of_something_else_is_not_known(written: Path) -> None:
    assert _after_a_restart(written, b"2") == {}


def test_a_record_that_is_gone_is_not_known(written: Path) -> None:
    (written / "documents" / compiled_path(_A)).unlink()
    assert _after_a_restart(written) == {}


def test_a_record_that_was_cut_short_is_not_known(written: Path) -> None:
    (written / "documents" / compiled_path(_A)).write_bytes(b"")
    assert _after_a_restart(written) == {}


def test_a_record_that_another_program_replaced_by_one_of_its_length_is_not_known(
    written: Path,
) -> None:
    path = written / "documents" / compiled_path(_A)
    other = path.with_name("other")
    other.write_bytes(b"CONTENT\n")
    other.rename(path)
    assert _after_a_restart(written) == {}


def test_what_was_written_last_counts(written: Path) -> None:
    files = _files(written)
    files.apply(_A, CompiledRecord("fedcba9876543210", b"another\n"), b"2")
    assert files.unchanged({_A: b"1"}) == {}
    assert files.unchanged({_A: b"2"}) == {_A: "fedcba9876543210"}
    # Were it killed before that was stored: the file is not the one of the row.
    assert _after_a_restart(written) == {}
    files.settle()
    assert _after_a_restart(written, b"2") == {_A: "fedcba9876543210"}


def test_a_removed_record_is_not_known(written: Path) -> None:
    files = _files(written)
    files.remove(_A)
    assert files.unchanged({_A: b"1"}) == {}
    files.settle()
    files.apply(_B, _RECORD, b"1")
    assert files.unchanged({_A: b"1", _B: b"1"}) == {_B: _RECORD.revision}
    files.settle()


@pytest.mark.parametrize("content", [b"not a database" * 100, b""])
def test_a_damaged_index_is_made_again(written: Path, content: bytes) -> None:
    (written / "compiled.sqlite").write_bytes(content)
    files = _files(written)
    assert files.unchanged({_A: b"1"}) == {}
    files.apply(_A, _RECORD, b"1")
    files.settle()
    if not _after_a_restart(written):
        # The start before has only removed what was damaged.
        files = _files(written)
        files.apply(_A, _RECORD, b"1")
        files.settle()
    assert _after_a_restart(written) == {_A: _RECORD.revision}


_INSTANCE = Instance(
    _A,
    "name",
    "host",
    "project",
    (Port(NetworkId("red"), MacAddress("fa:16:3e:00:00:05"), (IPv4Address("10.0.0.5"),), "p"),),
    (SshKey("key", "ssh-ed25519 AAAA"),),
    (("role", "api"),),
    b"user",
    b"vendor",
    "zone",
    "kind",
    created_at=5,
)


@pytest.mark.parametrize(
    "changed",
    [
        replace(_INSTANCE, name="other"),
        replace(_INSTANCE, hostname="other"),
        replace(_INSTANCE, project=None),
        replace(_INSTANCE, ports=()),
        replace(_INSTANCE, ports=(replace(_INSTANCE.ports[0], mac=None),)),
        replace(_INSTANCE, ports=(replace(_INSTANCE.ports[0], addresses=()),)),
        replace(_INSTANCE, ssh_keys=(SshKey("other", "ssh-ed25519 AAAA"),)),
        replace(_INSTANCE, tags=()),
        replace(_INSTANCE, user_data=None),
        replace(_INSTANCE, user_data=b"User"),
        replace(_INSTANCE, vendor_data=None),
        replace(_INSTANCE, user_data=None, vendor_data=b"user"),
        replace(_INSTANCE, user_data=b"vendor", vendor_data=b"user"),
        replace(_INSTANCE, availability_zone=None),
        replace(_INSTANCE, instance_type=None),
        replace(_INSTANCE, dialects=frozenset({Dialect.EC2})),
    ],
)
def test_whatever_a_record_says_tells_it_apart(changed: Instance) -> None:
    first, second = PackedInstances({_A: _INSTANCE}), PackedInstances({_A: changed})
    assert first.digest(_A, b"") != second.digest(_A, b"")
    assert first.digest(_A, b"") == PackedInstances({_A: _INSTANCE}).digest(_A, b"")
    assert first.digest(_A, b"") != first.digest(_A, b"salt")


def test_whatever_documents_say_of_a_network_tells_it_apart() -> None:
    subnet = Subnet(IPv4Network("10.0.0.0/24"))
    network = Network(NetworkId("red"), NamespaceListener("red"), subnets=(subnet,), mtu=1500)
    router = replace(subnet, gateway=IPv4Address("10.0.0.1"))
    dns = replace(subnet, dns=(IPv4Address("10.0.0.2"),))
    others = [
        replace(network, mtu=None),
        replace(network, subnets=()),
        replace(network, subnets=(router,)),
        replace(network, subnets=(dns,)),
    ]
    marks = {network_mark(one) for one in (network, *others)}
    assert len(marks) == 1 + len(others)
    assert network_mark(replace(network, name="other")) == network_mark(network)
