"""An OpenStack node as a machine of its own: OVN with its databases at their usual places, one network, one guest.

OVN and Open vSwitch are genuine, the latter in user space. Nova answers with the instance that it is asked for.
"""

import sys
from dataclasses import dataclass
from typing import Final

from support.demonstration import REPOSITORY
from support.guest import Guest
from support.lab import until
from support.systemd_machine import Machine

NETWORK: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
NAMESPACE: Final = f"ovnmeta-{NETWORK}"
INSTANCE: Final = "0d1c2b3a-0000-4000-8000-000000000001"
SECRET: Final = "a-secret-of-thirty-two-characters"
DEVICE: Final = f"tap{NETWORK[:10]}0"
"""On the integration bridge, where the namespace is plugged in."""

AGENTS_FILES: Final = {
    "neutron.conf": "[DEFAULT]\nstate_path = /var/lib/neutron\n",
    "neutron_ovn_metadata_agent.ini": (
        f"[DEFAULT]\nnova_metadata_host = 127.0.0.1\nmetadata_proxy_shared_secret = {SECRET}\n"
        "[ovs]\novsdb_connection = unix:/run/openvswitch/db.sock\n"
        "[ovn]\novn_sb_connection = tcp:127.0.0.1:6642\n"
    ),
}
"""Of Neutron's agent, by name."""

_READY_S: Final = 30.0
_MAC: Final = "fa:16:3e:00:00:05"
_METADATA_PORT: Final = "5f4b1c7e-52a0-4f0b-8d0e-6a3b0f7e9d21"
_PORT: Final = "5f4b1c7e-52a0-4f0b-8d0e-6a3b0f7e9d22"
_OVN: Final = f"""
# The integration bridge's own device.
mkdir -p /dev/net && mknod /dev/net/tun c 10 200
mkdir -p /run/openvswitch /run/ovn /var/lib/ovn /etc/openvswitch
rm -f /etc/openvswitch/conf.db /var/lib/ovn/*.db
start() {{
    program=$1; name=$2; shift 2
    "$program" "$@" --pidfile="/run/ovn/$name.pid" --detach --no-chdir -vconsole:off -vsyslog:off
}}
ovsdb-tool create /etc/openvswitch/conf.db /usr/share/openvswitch/vswitch.ovsschema
ovsdb-tool create /var/lib/ovn/nb.db /usr/share/ovn/ovn-nb.ovsschema
ovsdb-tool create /var/lib/ovn/sb.db /usr/share/ovn/ovn-sb.ovsschema
start ovsdb-server vswitch /etc/openvswitch/conf.db --remote=punix:/run/openvswitch/db.sock
start ovsdb-server nb /var/lib/ovn/nb.db --remote=punix:/run/ovn/ovnnb_db.sock
start ovsdb-server sb /var/lib/ovn/sb.db --remote=punix:/run/ovn/ovnsb_db.sock --remote=ptcp:6642:127.0.0.1
ovn-nbctl init
ovn-sbctl init
start ovn-northd northd
ovs-vsctl --no-wait init -- set Open_vSwitch . external-ids:system-id=node-1 external-ids:hostname=node-1 \\
    external-ids:ovn-remote=tcp:127.0.0.1:6642 external-ids:ovn-encap-type=geneve external-ids:ovn-encap-ip=127.0.0.1 \\
    external-ids:ovn-bridge=br-int external-ids:ovn-bridge-datapath-type=netdev
start ovs-vswitchd vswitchd --disable-system
ovs-vsctl add-br br-int -- set Bridge br-int datapath_type=netdev fail-mode=secure
start ovn-controller controller

port() {{
    ovn-nbctl --may-exist lsp-add neutron-{NETWORK} "$1" -- lsp-set-type "$1" "$2" -- lsp-set-addresses "$1" "$3"
    shift 3
}}
ids() {{
    port=$1; shift
    for pair in network_name=neutron-{NETWORK} project_id=c0ffee "$@"; do
        ovn-nbctl set Logical_Switch_Port "$port" "external_ids:neutron\\:${{pair%%=*}}=\"${{pair#*=}}\""
    done
}}
ovn-nbctl ls-add neutron-{NETWORK}
port {_METADATA_PORT} localport "fa:16:3e:00:00:fe 10.0.0.2"
ids {_METADATA_PORT} device_id={NAMESPACE} device_owner=network:distributed cidrs=10.0.0.2/24 mtu=1442
port {_PORT} "" "{_MAC} 10.0.0.5"
ids {_PORT} device_id={INSTANCE} device_owner=compute:nova cidrs=10.0.0.5/24

ip netns add guest
ip link add vm-1 type veth peer name eth0 address {_MAC} netns guest
ip link set vm-1 up
ip -n guest link set eth0 up mtu 1442
ip -n guest address add 10.0.0.5/24 dev eth0
ip -n guest route add 169.254.169.254 via 10.0.0.2
ip netns exec guest ethtool -K eth0 tx off
ovs-vsctl add-port br-int vm-1 -- set Interface vm-1 external_ids:iface-id={_PORT}
ovn-nbctl --timeout=30 --wait=hv sync
"""
_NOVA: Final = f"""
from support.recorder import Recorder, say_whose
Recorder(port=8775, default=say_whose, secret={SECRET!r}).listen()
"""


@dataclass(frozen=True, slots=True)
class OvnMachine:
    """The node."""

    machine: Machine

    @property
    def guest(self) -> Guest:
        """Its one guest."""
        place = self.machine.root / "run/netns"
        return Guest(INSTANCE, "guest", NETWORK, _MAC, ("10.0.0.5",), directory=place)

    def is_served(self) -> bool:
        """Whether Nova is asked for the guest's instance."""
        return self.guest.reads("/openstack", timeout_s=1) == INSTANCE

    def wait_served(self) -> None:
        """Wait until the guest is served."""
        until(self.is_served, within_s=_READY_S, what="the guest's document")

    def namespaces(self) -> list[str]:
        """Names of the metadata namespaces that the host sees."""
        names = self.machine.run("ip", "netns", "list").split()
        return [name for name in names if name.startswith("ovnmeta-")]


def start_ovn(machine: Machine) -> OvnMachine:
    """Start OVN, a guest and Nova on a machine that has their programs."""
    machine.write("/srv/ovn", _OVN)
    machine.run("sh", "-eu", "/srv/ovn")
    machine.write("/srv/nova", _NOVA)
    path = f"--setenv=PYTHONPATH={REPOSITORY}/tests"
    machine.run("systemd-run", "--quiet", path, sys.executable, "/srv/nova")
    return OvnMachine(machine)
