"""Which namespaces are networks, and how the source reports them as they come and go.

Names are symbolic links to a namespace that is there anyway; those of real mounts are in
`tests/integration/test_host_watch.py`.
"""

import os
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.config.sources import NeutronNamespacesSettings
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.entities import NamespaceListener, Network, NetworkId, Scope
from imdsproxy.sources.neutron_namespaces.records import parse_proxy, router_network
from imdsproxy.sources.neutron_namespaces.source import DhcpProxies, NeutronNamespacesSource
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
    assert router_network(name) is None


def test_a_routers_namespace_is_a_network_that_is_redirected() -> None:
    name = f"qrouter-{_ID}"
    listener = NamespaceListener(name, redirected=True)
    expected = Network(NetworkId(_ID), listener, scope=Scope.ROUTER)
    assert router_network(name) == expected


async def test_namespaces_are_prepared_before_their_networks_are_reported(tmp_path: Path) -> None:
    directory, prepared = tmp_path / "netns", list[str]()
    settings = NeutronNamespacesSettings(routers=True)

    async def prepare(some: Collection[NamespaceRef]) -> None:
        prepared.extend(ref.name.removeprefix("qrouter-") for ref in some)

    source = NeutronNamespacesSource(settings, NamespaceDirectory(directory), prepare)
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


def _proxy(what: str = "Network", *, bind: str = "169.254.169.254:80", pid_file: str = "/p") -> str:
    """What an agent writes for its HAProxy."""
    return (
        f"global\n    pidfile     {pid_file}\n    daemon\n\nlisten listener\n    bind {bind}\n    \n"
        f"    server metadata /s\n\n    http-request del-header X-Neutron-Router-ID\n"
        f"    http-request set-header X-Neutron-{what}-ID {_ID}\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(_proxy("Router", bind="0.0.0.0:9697"), id="the L3 agent's"),
        pytest.param(_proxy("Router", bind=":::9697"), id="of both families"),
        pytest.param(_proxy().replace(_ID, "x"), id="no id"),
        pytest.param(_proxy()[:20], id="half written"),
        pytest.param("", id="empty"),
    ],
)
def test_other_proxies_than_the_dhcp_agents_make_no_network(text: str) -> None:
    assert parse_proxy(text) is None


async def test_networks_are_those_for_which_the_agent_has_a_proxy(tmp_path: Path) -> None:
    directory, names = tmp_path / "netns", [str(uuid.uuid4()) for _ in range(3)]
    directory.mkdir()
    for name in names:
        (directory / f"qdhcp-{name}").symlink_to(_NAMESPACE)
    settings = NeutronNamespacesSettings(dhcp=True, state_path=tmp_path)
    async with running(NeutronNamespacesSource(settings, NamespaceDirectory(directory))) as heard:
        await heard.until(lambda one: one.inventory.in_sync)
        assert not heard.inventory.networks
        # The agent makes it with its first proxy.
        (tmp_path / "ns-metadata-proxy").mkdir()
        for name in names[:2]:
            file = tmp_path / "ns-metadata-proxy" / f"{name}.conf"
            file.write_text(_proxy().replace(_ID, name))
        await heard.until(lambda one: _networks(one) == set(names[:2]))
        (directory / f"qdhcp-{names[0]}").unlink()
        await heard.until(lambda one: _networks(one) == {names[1]})


async def test_a_proxy_whose_agent_starts_again_counts_on_until_it_stays_away(
    tmp_path: Path,
) -> None:
    now, file = 0.0, tmp_path / f"{_ID}.conf"
    proxies = DhcpProxies(tmp_path, NamespaceDirectory(tmp_path), lambda: now)
    file.write_text(_proxy())
    assert await proxies.read()
    assert set(proxies.networks) == {f"qdhcp-{_ID}"}
    file.unlink()
    assert not await proxies.read()
    now = 59.0
    file.write_text(_proxy())
    assert not await proxies.read()
    file.unlink()
    assert not await proxies.read()
    now = 119.5
    assert await proxies.read()
    assert not proxies.networks


async def test_a_network_that_leads_from_a_router_to_metadata_has_the_routers_id(
    tmp_path: Path,
) -> None:
    names, pid_file = tmp_path / "netns", tmp_path / "pid"
    names.mkdir()
    (names / f"qdhcp-{uuid.UUID(int=1)}").symlink_to(_NAMESPACE)
    (tmp_path / f"{_ID}.conf").write_text(_proxy("Router", pid_file=str(pid_file)))
    proxies = DhcpProxies(tmp_path, NamespaceDirectory(names))
    # Only the process shows the namespace; it starts later.
    assert not await proxies.read()
    pid_file.write_text(f"{os.getpid()}\n")
    assert await proxies.read()
    (network,) = proxies.networks.values()
    assert (network.id, network.scope) == (_ID, Scope.ROUTER)
    assert network.listener == NamespaceListener(f"qdhcp-{uuid.UUID(int=1)}")


def _networks(heard: Heard) -> set[str]:
    return set(map(str, heard.inventory.networks))
