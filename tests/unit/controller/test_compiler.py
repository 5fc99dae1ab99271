"""What a start needs not compile, because its record is on disk as it was compiled."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.controller.compiler import CompiledIndex, Compiling, RecordCompiler
from imdsproxy.documents.compiled import compile_instance, compiled_path, network_mark
from imdsproxy.documents.store import PasswordStore
from imdsproxy.model.entities import (
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
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation
from imdsproxy.model.packed import PackedInstances
from support.record_files import LoggedFiles

_A, _B = InstanceId("a"), InstanceId("b")

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

_OTHER = replace(_INSTANCE, hostname="other")
_WRITTEN = ["write a"]


def _start(directory: Path, instance: Instance = _INSTANCE) -> RecordCompiler:
    """A compiler of a controller that starts, once it has seen its only instance."""
    inventory = Inventory()
    inventory.observe(Observation("file", full=True, instances={instance.id: instance}))
    files = LoggedFiles(directory / "documents", PasswordStore(directory / "passwords"), None)
    compiler = RecordCompiler(inventory, files, CompiledIndex(directory / "compiled.sqlite"))
    compiler.compile([instance.id], Compiling({instance.id}), starting=True)
    return compiler


def _log(compiler: RecordCompiler) -> list[str]:
    assert isinstance(compiler.files, LoggedFiles)
    return compiler.files.log


def _after_a_restart(directory: Path, instance: Instance = _INSTANCE) -> list[str]:
    compiler = _start(directory, instance)
    compiler.index.close()
    return _log(compiler)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    assert _after_a_restart(tmp_path) == _WRITTEN
    return tmp_path


def test_a_record_that_was_compiled_of_just_the_same_is_known_after_a_restart(
    written: Path,
) -> None:
    compiler = _start(written)
    assert _log(compiler) == []
    assert compiler.revisions == {_A: compile_instance(_INSTANCE, {}).revision}
    compiler.index.close()
    assert _after_a_restart(written, _OTHER) == _WRITTEN


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().swapcase())
    other.rename(path)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b""), _replace])
def test_a_record_that_is_not_the_file_that_was_written_is_not_known(
    written: Path, change: Callable[[Path], object]
) -> None:
    change(written / "documents" / compiled_path(_A))
    assert _after_a_restart(written) == _WRITTEN


def test_what_a_killed_controller_has_not_stored_is_compiled_again(written: Path) -> None:
    killed = _start(written, _OTHER)
    assert _log(killed) == _WRITTEN
    # The file is not the one of the row any more.
    assert _after_a_restart(written) == _WRITTEN
    killed.index.close()


def test_a_removed_record_is_not_known(written: Path) -> None:
    compiler = _start(written, _OTHER)
    # What is not stored yet is known too.
    assert compiler.index.find([_A, _B]).keys() == {_A}
    compiler.remove(_A)
    for _ in range(2):
        assert compiler.index.find([_A, _B]) == {}
        compiler.index.close()
    assert not (written / "documents" / compiled_path(_A)).exists()


@pytest.mark.parametrize("content", [b"not a database" * 100, b""])
def test_a_damaged_index_is_made_again(written: Path, content: bytes) -> None:
    (written / "compiled.sqlite").write_bytes(content)
    assert _after_a_restart(written) == _WRITTEN
    # The first start may only have removed what was damaged.
    _after_a_restart(written)
    assert _after_a_restart(written) == []


def test_whatever_a_record_says_tells_it_apart() -> None:
    changes: list[dict[str, Any]] = [
        *({name: None} for name in ("project", "user_data", "vendor_data", "instance_type")),
        {"name": "other"},
        {"hostname": "other"},
        {"ports": ()},
        {"ports": (replace(_INSTANCE.ports[0], mac=None),)},
        {"ports": (replace(_INSTANCE.ports[0], addresses=()),)},
        {"ssh_keys": (SshKey("other", "ssh-ed25519 AAAA"),)},
        {"tags": ()},
        {"user_data": b"User"},
        {"user_data": None, "vendor_data": b"user"},
        {"user_data": b"vendor", "vendor_data": b"user"},
        {"availability_zone": None},
        {"dialects": frozenset({Dialect.EC2})},
    ]
    found = [_INSTANCE, *(replace(_INSTANCE, **one) for one in changes)]
    digests = {PackedInstances({_A: one}).digest(_A, b"") for one in found}
    assert len(digests) == len(found)
    same = PackedInstances({_A: replace(_INSTANCE)})
    assert same.digest(_A, b"") in digests
    assert same.digest(_A, b"salt") not in digests


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
