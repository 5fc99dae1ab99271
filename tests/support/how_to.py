"""The host that the how-to pages speak of: the package, three networks with equal addresses, a guest in each."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, find_fault, script_of
from support.guest import Guest
from support.lab import until
from support.packaged_daemon import PackagedDaemon, machine_with_dependencies
from support.packages import archive_of, build_packages
from support.systemd_daemon import journal_of_failures, named
from support.systemd_machine import Machine

PAGES: Final = REPOSITORY / "docs/how-to"
HOME: Final = "/srv/operator"
"""Where the operator works: with the package that runs in `old`, and the version after it in `new`."""
ARCHIVES: Final = "/srv/archives"
"""Debian's packages that a remedy installs: a machine has no network."""
META_DATA: Final = "/openstack/latest/meta_data.json"
"""What every guest may read at any time."""

_FOLLOWING: Final = "99.0"
_SENT: Final = "/srv/sent"
_GUESTS: Final = {"web-1": "blue", "db-1": "red", "vm-1": "cloud"}
"""The network of each instance; Nova has the documents of the last."""
_MACS: Final = {name: f"fa:16:3e:00:00:{last:02}" for last, name in enumerate(_GUESTS, 1)}
# Long ago: the boot of each is over.
_CREATED: Final = 1_700_000_000

_SECRET: Final = "before"
_NOVA_SETTINGS: Final = """\
nova:
  endpoint_sets:
    default:
      secret_file: /etc/imdsproxy/nova.secret
      endpoints:
      - url: "http://127.0.0.1:8771"
      - url: "http://127.0.0.1:8772"
"""
_NOVA_UNIT: Final = "nova-api-metadata@"
_NOVA: Final = """\
import hashlib, hmac, http.server, json, os, re, sys
number = sys.argv[1]
conf = open(f"/srv/nova-{number}/nova.conf").read()
secret = re.search("^metadata_proxy_shared_secret = (.*)$", conf, re.MULTILINE)[1].encode()
class Nova(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        instance = self.headers.get("X-Instance-ID", "")
        signature = hmac.new(secret, instance.encode(), hashlib.sha256).hexdigest()
        right = signature == self.headers.get("X-Instance-ID-Signature")
        body = json.dumps({"name": instance}).encode() if right else b""
        busy = os.path.exists("/srv/nova-busy")
        self.send_response(200 if self.path == "/" else 429 if busy else 200 if right else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(f"877{number}")), Nova).serve_forever()
"""
"""A stand-in for Nova's metadata API: it knows every instance, and who may ask; overloaded where a file says so."""

_ELSEWHERE: Final = re.compile(r"# (in the guest(?: [\w-]+)?|on nova-[12]|on the new host)\n")


def page_blocks(name: str, heading: str | None = None) -> list[Block]:
    """The command blocks of a page, or below one of its headings, as the host's shell runs them."""
    return [block for _, block in _blocks_by_host(name, heading)]


def _blocks_by_host(name: str, heading: str | None = None) -> list[tuple[str, Block]]:
    """The same, each with whose shell that is: the `old` or the `new` host's."""
    page = PAGES / name
    title = page.read_text().partition("\n")[0]
    return [_placed(block) for block in blocks_of(page, heading or title)]


def _placed(block: Block) -> tuple[str, Block]:
    places = list(_ELSEWHERE.finditer(block.script))
    if not places:
        return "old", block
    (place,) = places
    assert place.start() == 0, f"line {block.line}: there must be prose before {place[0]}"
    words = place[1].split()
    shell, before = "unshare --mount bash -euo pipefail", ""
    match words:
        case ["on", "the", "new", "host"]:
            return "new", block
        case ["in", "the", "guest", *named_guest]:
            network = _GUESTS["".join(named_guest) or "web-1"]
            shell = f"nsenter --net=/run/netns/guest-{network} bash -euo pipefail"
        case _:
            number = words[1].removeprefix("nova-")
            unit = f"{_NOVA_UNIT}{number}"
            before = (
                f"mount --bind /srv/nova-{number} /etc/nova\n"
                f'systemctl() {{ command systemctl "${{@/nova-api-metadata/{unit}}}"; }}\n'
            )
    script = f"{shell} <<'ELSEWHERE'\n{before}{block.script}\nELSEWHERE"
    return "old", replace(block, script=script)


@dataclass(slots=True)
class Host:
    """A host in operation."""

    daemon: PackagedDaemon

    def guest(self, name: str) -> Guest:
        """The guest that is this instance."""
        (found,) = (one for one in self.daemon.guests if one.name == name)
        return found

    def follow(self, name: str, new: Machine | None = None) -> str:
        """Run all of a page, what follows on one host in one shell; how it did not go as the page says.

        Args:
            new: The page's new host.
        """
        machines = {"old": self.daemon.machine, "new": new}
        for host, placed in groupby(_blocks_by_host(name), key=itemgetter(0)):
            machine = machines[host]
            assert machine is not None
            blocks = [block for _, block in placed]
            machine.write("/tmp/page", script_of(blocks))  # noqa: S108 - of the machine
            command = f"cd {HOME} && exec timeout 300 bash -euo pipefail /tmp/page"
            status, output = machine.attempt("sh", "-c", command, within_s=310)
            if fault := find_fault(blocks, status, output):
                return fault
            if new is not None:
                self._carry(new)
        return ""

    def _carry(self, new: Machine) -> None:
        """What `scp` has sent arrives."""
        for path in (self.daemon.machine.root / _SENT.lstrip("/")).iterdir():
            shutil.move(path, new.root / HOME.lstrip("/"))

    def state(self) -> Mapping[str, Any]:
        """What a page leaves as it was."""
        machine = self.daemon.machine
        listing = f"""
            find {HOME} /etc/imdsproxy | sort
            find /etc/imdsproxy -type f -not -name nova.secret | sort | xargs sha256sum
            ip netns list | cut -d " " -f 1 | sort
            systemctl is-enabled imdsproxy
            dpkg-query --show imdsproxy
        """
        records = {
            kind: [one["record"] for one in self.daemon.admin.get(f"/v1/{kind}")]
            for kind in ("networks", "instances")
        }
        return {
            "records": records,
            "host": machine.run("sh", "-c", listing).splitlines(),
            "units": self.daemon.active(),
            "ready": self.daemon.status()["readiness"],
        }

    def wait_served(self) -> None:
        """Until every guest gets its own document."""
        until(lambda: all(map(_is_served, self.daemon.guests)), what="documents for every guest")


def _is_served(guest: Guest) -> bool:
    return guest.is_served(META_DATA, named, timeout_s=1)


def records() -> dict[str, list[dict[str, object]]]:
    """What is configured on the host."""
    networks: list[dict[str, object]] = [
        {
            "id": network,
            "listener": {"namespace": f"net-{network}"},
            "subnets": [{"cidr": "10.0.0.0/24"}],
        }
        for network in _GUESTS.values()
    ]
    instances: list[dict[str, object]] = [
        {
            "id": name,
            "name": name,
            "created_at": _CREATED,
            "ports": [{"network": network, "mac": _MACS[name], "addresses": ["10.0.0.11"]}],
            **(
                {"upstream": "nova", "project": "shop"}
                if network == "cloud"
                else {"user_data": f"#!/bin/sh\necho {name}\n"}
            ),
        }
        for name, network in _GUESTS.items()
    ]
    return {"networks": networks, "instances": instances}


@contextlib.contextmanager
def open_new_host(work: Path, old: Host) -> Iterator[Machine]:
    """Boot another, with the package at hand, and with the old one's networks and guests as they will be there."""
    old.daemon.machine.write("/usr/local/bin/scp", f"#!/bin/sh\ncp -- $1 {_SENT}\n")
    old.daemon.machine.run("chmod", "755", "/usr/local/bin/scp")
    old.daemon.machine.run("mkdir", "-p", _SENT)
    packages = build_packages()
    with machine_with_dependencies(work, packages) as machine:
        machine.run("install", "-D", "-m", "644", "-t", HOME, str(packages.deb))
        daemon = PackagedDaemon(machine)
        _run_novas(daemon)
        for name, network in _GUESTS.items():
            daemon.plug_in_one(network, _MACS[name])
        with journal_of_failures(daemon):
            yield machine


@contextlib.contextmanager
def open_host(work: Path) -> Iterator[Host]:
    """Boot it, with the package installed and all guests served."""
    packages = build_packages()
    with machine_with_dependencies(work, packages) as machine:
        daemon = PackagedDaemon(machine)
        host = Host(daemon)
        with journal_of_failures(daemon):
            for place, built in (("old", packages), ("new", build_packages(_FOLLOWING))):
                machine.run("install", "-D", "-m", "644", "-t", f"{HOME}/{place}", str(built.deb))
            _run_novas(daemon)
            daemon.guests = tuple(
                replace(daemon.plug_in_one(network, _MACS[name]), name=name)
                for name, network in _GUESTS.items()
            )
            machine.run("mkdir", "-p", "/etc/imdsproxy/records")
            machine.write("/etc/imdsproxy/nova.secret", f"{_SECRET}\n")
            machine.run("chmod", "600", "/etc/imdsproxy/nova.secret")
            machine.write("/etc/imdsproxy/conf.d/nova.yaml", _NOVA_SETTINGS)
            files = "sources: {file: {enabled: true}}\n"
            machine.write("/etc/imdsproxy/conf.d/records.yaml", files)
            archive = archive_of("haproxy")
            machine.run("install", "-D", "-m", "644", "-t", ARCHIVES, str(archive))
            daemon.replace(packages)
            daemon.wait_active()
            daemon.admin.request("POST", "/v1/records", body=records())
            host.wait_served()
            yield host


def _run_novas(daemon: PackagedDaemon) -> None:
    machine = daemon.machine
    machine.write("/srv/nova.py", _NOVA)
    unit = "[Service]\nExecStart=/usr/bin/python3 /srv/nova.py %i\n"
    machine.write(f"/etc/systemd/system/{_NOVA_UNIT}.service", unit)
    machine.run("mkdir", "-p", "/etc/nova")
    for number in (1, 2):
        conf = f"[neutron]\nmetadata_proxy_shared_secret = {_SECRET}\n"
        machine.write(f"/srv/nova-{number}/nova.conf", conf)
        machine.run("systemctl", "start", f"{_NOVA_UNIT}{number}")
