"""Guests for snippets, and what `imdsproxy snippet` prints, read as its targets do."""

import re
import shlex
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from xml.etree import ElementTree as ET

from imdsproxy.model.entities import (
    BridgeListener,
    Dialect,
    Instance,
    InstanceId,
    Listener,
    MacAddress,
    Network,
    NetworkId,
    Port,
    Subnet,
)
from imdsproxy.tools.snippets import Part, Target, render_snippet, render_text
from support.ds_identify import DMI_OF_SMBIOS, Machine

MAC = MacAddress("52:54:00:12:34:56")
UUID = "ac7e3c7e-1111-4222-8333-444455556666"


@dataclass(frozen=True)
class Snippet:
    """What is printed for one target."""

    target: Target
    parts: list[Part]

    @property
    def text(self) -> str:
        return render_text(self.target, self.parts)

    def of(self, kind: str) -> str:
        """What is to be pasted of one kind."""
        return "\n".join(part.text for part in self.parts if part.kind == kind)


def network(
    listener: Listener | None = None, cidr: str = "10.0.0.0/24", gateway: str | None = "10.0.0.1"
) -> Network:
    via = None if gateway is None else ip_address(gateway)
    subnets = (Subnet(ip_network(cidr), via),) if cidr else ()
    return Network(NetworkId("lan"), listener or BridgeListener("br0"), subnets=subnets)


def snippet(
    target: Target,
    dialect: Dialect,
    *networks: Network,
    macs: Sequence[MacAddress | None] = (MAC,),
    uuid: str = UUID,
    name: str = "web-1",
    dialects: frozenset[Dialect] = frozenset(Dialect),
) -> Snippet:
    """For an instance with a port for each MAC in each network, of which the host is no gateway."""
    found = {one.id: one for one in networks or (network(),)}
    ports = tuple(Port(one, mac) for one in found for mac in macs)
    instance = Instance(InstanceId(uuid), name, "web-1", ports=ports, dialects=dialects)
    return Snippet(target, render_snippet(instance, found, target, dialect, lambda _: False))


def machine_of(snippet: Snippet) -> Machine:
    """The virtual machine with all of it pasted; systemd-stub adds words to the kernel command line."""
    smbios = list(_smbios(snippet))
    dmi = {DMI_OF_SMBIOS[key]: value for key, value in smbios if key in DMI_OF_SMBIOS}
    extra = [value for key, value in smbios if key == (11, "value")]
    words = " ".join(one.removeprefix("io.systemd.stub.kernel-cmdline-extra=") for one in extra)
    return Machine(dmi, kernel=f"{Machine.kernel} {words}")


def container_of(snippet: Snippet) -> Machine:
    """Incus' container with all of it pasted."""
    machine = Machine(virtualization="container:lxc", init=("/sbin/init",))
    for key, value in _incus_settings(snippet):
        if key.startswith("environment."):
            environment = {**machine.environment, key.removeprefix("environment."): value}
            machine = replace(machine, environment=environment)
        elif key == "raw.lxc":
            name, _, line = value.partition(" = ")
            assert name == "lxc.init.cmd"
            machine = replace(machine, init=tuple(shlex.split(line.replace(";", "\\;"))))
    return machine


def qemu_arguments(snippet: Snippet) -> list[str]:
    """The arguments that QEMU is started with, whatever the target."""
    match snippet.target:
        case Target.QEMU:
            return [word for line in _lines(snippet) for word in line if line[0].startswith("-")]
        case Target.PROXMOX:
            return list(_proxmox_arguments(snippet))
        case Target.INCUS:
            settings = dict(_incus_settings(snippet))
            arguments = shlex.split(settings.get("raw.qemu", ""))
            for key, value in settings.items():
                if key.startswith("smbios11."):
                    text = f"{key.removeprefix('smbios11.')}={value}".replace(",", ",,")
                    arguments += ["-smbios", f"type=11,value={text}"]
            return arguments
        case Target.LIBVIRT:
            raise AssertionError("libvirt has XML")


def _smbios(snippet: Snippet) -> Iterator[tuple[tuple[int, str], str]]:
    if snippet.target is Target.LIBVIRT:
        yield from _libvirt(snippet)
        return
    arguments = iter(qemu_arguments(snippet))
    for argument in arguments:
        if argument == "-smbios":
            yield from _fields(next(arguments))


def _fields(argument: str) -> Iterator[tuple[tuple[int, str], str]]:
    """As QEMU's `qemu_opts_parse`: a comma ends a value, two are one."""
    pieces = [piece.replace(",,", ",") for piece in re.findall(r"(?:[^,]|,,)+", argument)]
    pairs = [tuple(piece.split("=", 1)) for piece in pieces]
    assert pairs[0][0] == "type"
    kind = int(pairs[0][1])
    for name, value in pairs[1:]:
        yield (kind, name), value


def _libvirt(snippet: Snippet) -> Iterator[tuple[tuple[int, str], str]]:
    tree = ET.fromstring(f"<domain>{snippet.text}</domain>")  # noqa: S314 - our own
    mode = tree.find("smbios")
    assert mode is not None
    assert mode.get("mode") == "sysinfo"
    for entry in tree.iterfind("sysinfo[@type='smbios']/system/entry"):
        yield (1, str(entry.get("name"))), str(entry.text)
    for entry in tree.iterfind("sysinfo[@type='smbios']/oemStrings/entry"):
        yield (11, "value"), str(entry.text)
    uuid = tree.find("uuid")
    if uuid is not None:
        yield (1, "uuid"), str(uuid.text)


def _proxmox_arguments(snippet: Snippet) -> Iterator[str]:
    """As `PVE/QemuServer.pm` makes them of smbios1 and args."""
    for line in _lines(snippet):
        if line[:3] != ["qm", "set", "VMID"]:
            continue
        if line[3] == "--smbios1":
            fields = dict(pair.split("=", 1) for pair in line[4].split(","))
            assert fields.pop("base64") == "1"
            for name in fields.keys() - {"uuid"}:
                assert re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", fields[name])
                fields[name] = b64decode(fields[name]).decode().replace(",", ",,")
            assert len(line[4]) <= 512
            yield from ("-smbios", ",".join(["type=1", *(f"{k}={v}" for k, v in fields.items())]))
        elif line[3] == "--args":
            yield from shlex.split(line[4])


def _incus_settings(snippet: Snippet) -> Iterator[tuple[str, str]]:
    for line in _lines(snippet):
        if line[:3] == ["incus", "config", "set"]:
            assert len(line) == 6
            yield line[4], line[5]


def _lines(snippet: Snippet) -> Iterator[Sequence[str]]:
    text = snippet.text.replace("\\\n", " ")
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield list(words)
