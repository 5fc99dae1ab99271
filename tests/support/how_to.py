"""The host that the how-to pages speak of: the package, two networks with equal addresses, a guest in each."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, find_fault, script_of
from support.packaged_daemon import PackagedDaemon, machine_with_dependencies
from support.packages import build_packages
from support.systemd_daemon import journal_of_failures, wait_served

PAGES: Final = REPOSITORY / "docs/how-to"
HOME: Final = "/srv/operator"
"""Where the operator works: with the package that runs in `old`, and the version after it in `new`."""

FOLLOWING: Final = "99.0"

_IN_GUEST: Final = "# in the guest\n"
_NETWORKS: Final = {"blue": "web-1", "red": "db-1"}
_MACS: Final = {"blue": "fa:16:3e:00:00:01", "red": "fa:16:3e:00:00:02"}
# Long ago: its boot is over.
_CREATED: Final = 1_700_000_000


def page_blocks(name: str) -> list[Block]:
    """All command blocks of a page, as the host's shell runs them."""
    page = PAGES / name
    title = page.read_text().partition("\n")[0]
    return [_placed(block) for block in blocks_of(page, title)]


def _placed(block: Block) -> Block:
    if _IN_GUEST not in block.script:
        return block
    assert block.script.rindex(_IN_GUEST) == 0, (
        f"line {block.line}: prose is needed before what a guest does"
    )
    script = f"""nsenter --net=/run/netns/guest-blue bash -euo pipefail <<'THE_GUEST'
{block.script}
THE_GUEST"""
    return replace(block, script=script)


@dataclass(slots=True)
class Host:
    """A host in operation."""

    daemon: PackagedDaemon

    def follow(self, name: str) -> str:
        """Run all of a page in one shell; how it did not go as the page says."""
        blocks = page_blocks(name)
        self.daemon.machine.write("/tmp/page", script_of(blocks))  # noqa: S108 - of the machine
        command = f"cd {HOME} && exec timeout 300 bash -euo pipefail /tmp/page"
        status, output = self.daemon.machine.attempt("sh", "-c", command, within_s=310)
        return find_fault(blocks, status, output)

    def state(self) -> Mapping[str, Any]:
        """What a page leaves as it was."""
        machine = self.daemon.machine
        records = {
            kind: [one["record"] for one in self.daemon.admin.get(f"/v1/{kind}")]
            for kind in ("networks", "instances")
        }
        files = machine.run(
            "sh", "-c", f"cd / && find etc/imdsproxy -type f | sort | xargs sha256sum; ls -A {HOME}"
        )
        return {
            "records": records,
            "files": files,
            "namespaces": sorted(machine.run("ip", "netns", "list").splitlines()),
            "units": self.daemon.active(),
            "version": machine.run("dpkg-query", "--show", "imdsproxy"),
            "ready": self.daemon.status()["readiness"],
        }


def records() -> dict[str, list[dict[str, object]]]:
    """What is configured on the host."""
    networks: list[dict[str, object]] = [
        {
            "id": network,
            "listener": {"namespace": f"net-{network}"},
            "subnets": [{"cidr": "10.0.0.0/24"}],
        }
        for network in _NETWORKS
    ]
    instances: list[dict[str, object]] = [
        {
            "id": name,
            "name": name,
            "created_at": _CREATED,
            "ports": [{"network": network, "mac": _MACS[network], "addresses": ["10.0.0.11"]}],
            "user_data": f"#!/bin/sh\necho {name}\n",
        }
        for network, name in _NETWORKS.items()
    ]
    return {"networks": networks, "instances": instances}


@contextlib.contextmanager
def open_host(work: Path) -> Iterator[Host]:
    """Boot it, with the package installed and all guests served."""
    packages = build_packages()
    with machine_with_dependencies(work, packages) as machine:
        daemon = PackagedDaemon(machine)
        host = Host(daemon)
        with journal_of_failures(daemon):
            for place, built in (("old", packages), ("new", build_packages(FOLLOWING))):
                machine.run("install", "-D", "-m", "644", "-t", f"{HOME}/{place}", str(built.deb))
            daemon.guests = tuple(
                replace(daemon.plug_in_one(network, _MACS[network]), name=instance)
                for network, instance in _NETWORKS.items()
            )
            daemon.replace(packages)
            daemon.wait_active()
            daemon.admin.request("POST", "/v1/records", body=records())
            wait_served(*daemon.guests)
            yield host
