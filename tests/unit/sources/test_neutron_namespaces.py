"""Which namespaces are networks, and how the source reports them as they come and go.

Names are symbolic links to a namespace that is there anyway; those of real mounts are in
`tests/integration/test_host_watch.py`.
"""

import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NamespaceListener, Network, NetworkId, Scope
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.sources.neutron_namespaces.records import network_of
from imdsproxy.sources.neutron_namespaces.source import NeutronNamespacesSource
from imdsproxy.sources.settings import NeutronNamespacesSettings
from support.source_runs import Heard, running

_ID: Final = "3f0d8a52-6a1e-4d0f-8a0e-0b9a5c1d2e3f"
_NAMESPACE: Final = "/proc/self/ns/net"


@pytest.mark.parametrize(
    "name",
    [
        f"snat-{_ID}",
        f"fip-{_ID}",
        f"qrouter-{_ID[:-1]}",
        "qrouter-",
        f"xqrouter-{_ID}",
        _ID,
        "imds-1",
    ],
)
def test_other_namespaces_are_no_networks(name: str) -> None:
    assert network_of(name, routers=True) is None


def test_a_routers_namespace_is_a_network_that_is_redirected() -> None:
    name = f"qrouter-{_ID}"
    listener = NamespaceListener(name, redirected=True)
    expected = Network(NetworkId(_ID), listener, scope=Scope.ROUTER)
    assert network_of(name, routers=True) == expected
    assert network_of(name, routers=False) is None


async def test_namespaces_are_prepared_before_their_networks_are_reported(tmp_path: Path) -> None:
    directory, prepared = tmp_path / "netns", list[str]()
    settings = NeutronNamespacesSettings(routers=True)
    source = NeutronNamespacesSource(settings, NamespaceDirectory(directory))

    async def prepare(some: Collection[NamespaceRef]) -> None:
        prepared.extend(ref.name.removeprefix("qrouter-") for ref in some)

    source.prepare = prepare
    names = [str(uuid.uuid4()) for _ in range(3)]
    async with running(source) as heard:
        # The directory need not exist.
        await heard.until(lambda one: one.inventory.in_sync)
        assert not heard.inventory.networks
        directory.mkdir()
        for name in names:
            (directory / f"qrouter-{name}").symlink_to(_NAMESPACE)
        await heard.until(lambda one: _networks(one) == set(names))
        assert set(prepared) == set(names)
        (directory / f"qrouter-{names[0]}").unlink()
        await heard.until(lambda one: _networks(one) == set(names[1:]))
    # The next one knows all of them from its first report.
    async with running(NeutronNamespacesSource(settings, source.directory)) as heard:
        await heard.until(lambda one: one.inventory.in_sync)
        assert _networks(heard) == set(names[1:])


def _networks(heard: Heard) -> set[str]:
    return set(map(str, heard.inventory.networks))
