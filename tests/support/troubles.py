"""What the tables of docs/how-to/troubleshoot.md speak of, caused for real on the host of the how-to pages.

Each trouble is shell. `web` and `vm` ask as the guests `web-1` and `vm-1` and print the status (000 for no answer),
`fails` prints `failed` where its command does not succeed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from support.document_blocks import Block, section
from support.how_to import ARCHIVES, PAGES

PAGE: Final = PAGES / "troubleshoot.md"
_TABLES: Final = ("## What a guest gets", "## What an operator sees")
_CELLS: Final = re.compile(r"(?<!\\)\|")
_CODE: Final = re.compile(r"`([^`]+)`")
_PROGRAMS: Final = frozenset(
    ["imdsproxy", "systemctl", "ip", "ls", "rm", "chmod", "install", "apt-get", "usermod", "ss"]
)

PRELUDE: Final = """
blue="nsenter --net=/run/netns/guest-blue"
status() { "$@" --silent --max-time 3 --output /dev/null --write-out '%{http_code}\\n' || true; }
web() { status $blue curl "http://169.254.169.254$1"; }
vm() { status nsenter --net=/run/netns/guest-cloud curl http://169.254.169.254/openstack/latest/meta_data.json; }
fails() { "$@" >/dev/null 2>&1 || echo failed; }
systemctl() { command systemctl "${@/nova-api-metadata/nova-api-metadata@1}"; }
meta=/latest/meta-data/
"""


@dataclass(frozen=True, slots=True)
class Trouble:
    """How a line of the page comes about.

    Attributes:
        cause: Makes it so.
        symptom: Prints what is seen.
        prints: What that is, in full.
        by_hand: What the remedy says in words, before its commands.
        undo: What is left of the cause when the remedy has helped.
    """

    cause: str
    symptom: str
    prints: str
    by_hand: str = ""
    undo: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the page.

    Attributes:
        seen: What a guest or an operator sees.
        command: What shows why.
        shows: What it prints.
        remedy: The commands that help.
    """

    seen: str
    command: str
    shows: Block
    remedy: tuple[str, ...]


def lines_of_the_page() -> Iterator[Line]:
    """Each line of its tables."""
    for heading in _TABLES:
        for row in section(PAGE, heading)[1]:
            if row.startswith("| ") and not row.startswith("| seen"):
                seen, command, shows, remedy = (cell.strip() for cell in _CELLS.split(row)[1:-1])
                block = Block(0, "", tuple(_CODE.findall(shows)))
                yield Line(seen, _commands(command)[0], block, _commands(remedy))


def _commands(cell: str) -> tuple[str, ...]:
    """The commands in a cell, as a shell takes them."""
    place = "$blue " if cell.startswith("in the guest") else ""
    code = _CODE.findall(cell)
    return tuple(f"{place}{one}" for one in code if one.split()[0] in _PROGRAMS)


_WEB_PORT: Final = "imdsproxy instance set web-1 --network blue --mac fa:16:3e:00:00:01"
_OLD_RECORD: Final = "/etc/imdsproxy/records/old.yaml"
_CLEAR: Final = "imdsproxy instance set web-1 --clear policy"
# apt may have cleaned up after itself.
_ARCHIVE: Final = f"cp {ARCHIVES}/*.deb /var/cache/apt/archives"
_START_AGAIN: Final = "systemctl restart imdsproxy"

TROUBLES: Final[Mapping[str, Trouble]] = {
    "404 for every path": Trouble(f"{_WEB_PORT} --address 10.0.0.12", "web $meta", "404"),
    "404 for all of `/openstack`, `/nocloud` or `/latest`": Trouble(
        "imdsproxy instance set web-1 --no-openstack", "web /openstack/latest/meta_data.json", "404"
    ),
    "403 for every path": Trouble(
        "imdsproxy instance set web-1 --no-endpoint", "web $meta", "403", undo=_CLEAR
    ),
    "403 for every path, since its NIC was replaced": Trouble(
        "ip -n guest-blue link set eth0 address fa:16:3e:00:00:77",
        "web $meta",
        "403",
        undo=f"ip -n guest-blue link set eth0 address fa:16:3e:00:00:01; {_WEB_PORT} --address 10.0.0.11",
    ),
    "403 for one path": Trouble(
        "imdsproxy instance set web-1 --path-rule /latest/user-data=deny",
        "web /latest/user-data",
        "403",
        undo=_CLEAR,
    ),
    "403 for user-data, some time after the boot": Trouble(
        "imdsproxy instance set db-1 --seal-user-data",
        "status nsenter --net=/run/netns/guest-red curl http://169.254.169.254/latest/user-data",
        "403",
        undo="imdsproxy instance set db-1 --clear policy",
    ),
    "403 for every guest of Nova": Trouble(
        "cp --preserve /etc/imdsproxy/nova.secret /root/secret; echo wrong >/etc/imdsproxy/nova.secret;"
        " imdsproxy reload",
        "vm",
        "403",
        by_hand="mv /root/secret /etc/imdsproxy/nova.secret",
    ),
    "401": Trouble(
        "imdsproxy instance set web-1 --tokens required", "web $meta", "401", undo=_CLEAR
    ),
    "a container behind the guest gets no token": Trouble(
        """
        imdsproxy instance set web-1 --hop-limit 1
        ip netns add box
        ip -n guest-blue link add box type veth peer name eth0 netns box
        ip -n guest-blue address add 192.0.2.1/24 dev box
        ip -n guest-blue link set box up
        ip -n box address add 192.0.2.2/24 dev eth0
        ip -n box link set eth0 up
        ip -n box route add default via 192.0.2.1
        $blue sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
        $blue nft 'table ip nat { chain post { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }'
        """,
        "status nsenter --net=/run/netns/box curl --request PUT"
        " --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token",
        "000",
        undo=f"ip -n guest-blue link delete box; ip netns delete box; $blue nft flush ruleset; {_CLEAR}",
    ),
    "429": Trouble("touch /srv/nova-busy", "vm", "429", by_hand="rm /srv/nova-busy"),
    "503 for some of many requests, after a second": Trouble(
        "imdsproxy instance set web-1 --requests-per-s 1 --burst 10",
        "$blue curl --silent --parallel --parallel-max 30 --output /dev/null"
        " --write-out '%{http_code}\\n' 'http://169.254.169.254/latest/?[1-30]' | sort -u | grep 503 || true",
        "503",
        undo=_CLEAR,
    ),
    "503 for one guest": Trouble(
        f"printf 'instances: [{{id: old-1, name: old-1, ports: [{{network: blue, addresses: [10.0.0.11]}}]}}]\\n'"
        f" >{_OLD_RECORD}",
        "web $meta",
        "503",
    ),
    "503 for guests that are new": Trouble(
        "systemctl stop imdsproxy; ip -n guest-blue address add 10.0.0.99/32 dev eth0",
        "status $blue curl --interface 10.0.0.99 http://169.254.169.254/",
        "503",
        undo="ip -n guest-blue address delete 10.0.0.99/32 dev eth0",
    ),
    "503 for every guest and all that it has not read before": Trouble(
        "chmod g-x /var/lib/imdsproxy; imdsproxy instance set web-1 --tag new=1 || true",
        "web $meta",
        "503",
        undo="imdsproxy instance set web-1 --clear tags || true",
    ),
    "503 for every guest of Nova": Trouble(
        "systemctl stop nova-api-metadata; command systemctl stop nova-api-metadata@2",
        "vm",
        "503",
        undo="command systemctl start nova-api-metadata@2",
    ),
    "connection refused": Trouble(
        "imdsproxy network set blue --namespace net-blau || true", "web $meta", "000"
    ),
    "no answer, for every guest of a network": Trouble(
        "ip -n net-blue address delete 169.254.169.254/32 dev eth0",
        "web $meta",
        "000",
        undo="ip -n net-blue route add 10.0.0.0/24 dev eth0",
    ),
    "no answer, and no route in the guest": Trouble(
        "ip -n guest-blue route delete 169.254.169.254/32 dev eth0", "web $meta", "000"
    ),
    "no answer, and another program has the port": Trouble(
        """
        imdsproxy network set blue --namespace net-blau || true
        systemd-run --quiet --unit=other --property=NetworkNamespacePath=/run/netns/net-blue \
            python3 -m http.server --bind 169.254.169.254 80
        until nsenter --net=/run/netns/net-blue ss -ltn | grep -q 169.254.169.254:80; do sleep 0.1; done
        imdsproxy network set blue --namespace net-blue || true
        """,
        "web $meta",
        "000",
        by_hand="systemctl stop other",
    ),
    "documents of another instance": Trouble(
        f"{_WEB_PORT} --address 10.0.0.12;"
        " imdsproxy instance add old-1 --name old-1 --network blue --address 10.0.0.11",
        "$blue curl --silent http://169.254.169.254/latest/meta-data/hostname; echo",
        "old-1",
    ),
    "cloud-init finds no OpenStack documents, though they are served": Trouble(
        "imdsproxy instance set web-1 --port network=blue,mac=fa:16:3e:00:00:01,address=10.0.0.11"
        " --port network=red,mac=fa:16:3e:00:00:55",
        "$blue curl --silent http://169.254.169.254/openstack/latest/network_data.json"
        " | grep -o fa:16:3e:00:00:55 | head -n 1 || true",
        "fa:16:3e:00:00:55",
    ),
    "imdsproxy does not start": Trouble(
        f"echo 'nonsense: 1' >/etc/imdsproxy/conf.d/broken.yaml; {_START_AGAIN} || true",
        "systemctl is-active imdsproxy || true",
        "failed",
        by_hand="rm /etc/imdsproxy/conf.d/broken.yaml",
    ),
    "it does not start: HAProxy is missing": Trouble(
        f"{_ARCHIVE}; rm /usr/sbin/haproxy", f"fails {_START_AGAIN}", "failed"
    ),
    "it does not start: HAProxy is too old": Trouble(
        f"""
        {_ARCHIVE}
        printf '#!/bin/sh\\necho "HAProxy version 2.6.12-1 2023/01/01 - https://haproxy.org/"\\n' >/root/old
        install /root/old /usr/sbin/haproxy
        rm /root/old
        """,
        f"fails {_START_AGAIN}",
        "failed",
    ),
    "it does not start: its port is taken": Trouble(
        """
        systemctl stop imdsproxy
        systemd-run --quiet --unit=other python3 -m http.server --bind 127.0.0.1 9465
        until ss -ltn | grep -q 127.0.0.1:9465; do sleep 0.1; done
        """,
        "fails systemctl start imdsproxy",
        "failed",
        by_hand="systemctl stop other",
    ),
    "it does not start: `overrides.json` is damaged": Trouble(
        """
        cp --preserve /var/lib/imdsproxy/overrides.json /root 2>/dev/null || true
        systemctl stop imdsproxy
        echo '{' >/var/lib/imdsproxy/overrides.json
        """,
        "fails systemctl start imdsproxy",
        "failed",
        by_hand="rm /var/lib/imdsproxy/overrides.json; mv /root/overrides.json /var/lib/imdsproxy 2>/dev/null || true",
    ),
    "`admin.sock is not open to this account`": Trouble(
        "useradd alice",
        "setpriv --reuid=alice --regid=alice --init-groups imdsproxy status 2>&1 | grep -o 'not open to this account'"
        " || true",
        "not open to this account",
        undo="userdel alice",
    ),
    "a record file has no effect": Trouble(
        f"printf 'instances:\\n- id: new-1\\n  nam: new-1\\n' >{_OLD_RECORD}",
        "fails imdsproxy instance show new-1",
        "failed",
        by_hand=f"sed --in-place s/nam:/name:/ {_OLD_RECORD}",
        undo=f"rm {_OLD_RECORD}; while imdsproxy instance show new-1 >/dev/null 2>&1; do sleep 0.1; done",
    ),
    '"ready, degraded"': Trouble(
        "imdsproxy network add green --interface eth9 || true",
        "imdsproxy status | grep -o 'ready, degraded' || true",
        "ready, degraded",
    ),
    "a reload of settings is refused": Trouble(
        "cp /etc/imdsproxy/conf.d/nova.yaml /root; : >/etc/imdsproxy/conf.d/nova.yaml",
        "fails systemctl reload imdsproxy",
        "failed",
        by_hand="mv /root/nova.yaml /etc/imdsproxy/conf.d/nova.yaml",
    ),
    "`source sqlite is not in sync`": Trouble(
        """
        python3 -m sqlite3 /var/lib/imdsproxy/store.sqlite "VACUUM INTO '/root/store.copy'"
        systemctl stop imdsproxy
        dd if=/dev/zero of=/var/lib/imdsproxy/store.sqlite bs=4096 count=2 conv=notrunc status=none
        systemctl start imdsproxy
        """,
        "imdsproxy status | grep -o 'source sqlite is not in sync' | head -n 1 || true",
        "source sqlite is not in sync",
        by_hand="""
        systemctl stop imdsproxy
        rm /var/lib/imdsproxy/store.sqlite*
        mv /root/store.copy /var/lib/imdsproxy/store.sqlite
        systemctl start imdsproxy
        """,
    ),
    "the audit log has no lines": Trouble(
        """
        echo 'audit: {mode: all, destination: /var/log/nowhere/audit.log}' >/etc/imdsproxy/conf.d/audit.yaml
        imdsproxy reload
        """,
        "web $meta >/dev/null; test -s /var/log/nowhere/audit.log || echo none",
        "none",
        undo="rm -r /etc/imdsproxy/conf.d/audit.yaml /var/log/nowhere; imdsproxy reload --allow-dropped",
    ),
}
