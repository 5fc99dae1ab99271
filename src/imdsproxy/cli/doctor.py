"""`imdsproxy doctor|snippet`: a guest's machine: the answers that its programs need, and its hypervisor's settings.

`doctor` examines a server over HTTP, or the daemon's computed answers.
"""

import http.client
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

import typer

from imdsproxy.api.client import AdminClient, path_to, read_record
from imdsproxy.cli import options
from imdsproxy.cli.output import Output, Shape, clean, decode_bytes
from imdsproxy.errors import RequestRefused, spell_count
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6, Dialect, IpAddress
from imdsproxy.tools import snippets
from imdsproxy.tools.doctor import Answer, Ask, Nic, Severity, Surroundings, crawl

_PATHS_SHOWN: Final = 3
_COLOURS: Final = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NOT_LOOKED_AT: Final = ("times", "session tokens", "framing", "headers", "other clouds' paths")
_TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 17 << 20
_SAFE: Final = "/?=&:%+,@;~!$'()*"


@options.host_command
def doctor(
    run: options.Invocation,
    url: Annotated[
        str | None,
        options.argument(
            "[URL]", "The URL of a server, as http://169.254.169.254 inside a guest, or Nova's."
        ),
    ] = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    header: Annotated[
        list[str] | None,
        options.flag(
            "--header -H NAME: VALUE",
            "With URL, a header of every request, as Nova needs; may be repeated.",
        ),
    ] = None,
) -> None:
    """Request metadata as known clients do; report which would fail, why, and what to change. Exits 1 on errors.

    With --network and --from, the daemon computes its answers to that guest. With URL, doctor asks a server.
    """
    fetch: Callable[[Ask], Answer]
    if url is not None and network is None and address is None:
        fetch = server = parse_url(url, header or ())
        subject = url
        around = look_around() if is_metadata_address(server.host) else Surroundings()
    elif url is None and network is not None and address is not None and not header:
        daemon = run.daemon()
        fetch = partial(_ask_daemon, daemon, network, address)
        around = _look_at_guest(daemon, network, address)
        instance = f" ({around.instance})" if around.instance else ""
        subject = f"{address} in network {network}{instance}"
    else:
        raise RequestRefused(
            "doctor takes either a URL or both --network and --from",
            hint="use `imdsproxy doctor http://169.254.169.254` inside a guest, or "
            "`imdsproxy doctor --network NET --from ADDRESS` on the host",
        )
    from imdsproxy.tools.doctor.checks_documents import examine

    with run.output.waiting("sending the requests of known clients"):
        crawled = crawl(fetch, direct=url is not None)
    findings = examine(crawled, around)
    shape = {
        "subject": subject,
        "questions": len(crawled.asked),
        "served": [one.value for one in crawled.served],
        "given_up": crawled.given_up,
        "not_looked_at": [] if crawled.direct else list(_NOT_LOOKED_AT),
        "findings": [asdict(one) for one in findings],
    }
    run.output.answer(shape, _show)
    if any(one.severity is Severity.ERROR for one in findings):
        raise typer.Exit(options.NO)


def _look_at_guest(daemon: AdminClient, network: str, address: str) -> Surroundings:
    guest = daemon.get("/v1/explain", {"network": network, "address": address})
    nics = guest.get("nics", ())
    nics = tuple(Nic(one["network"], one["mac"], frozenset(one["seen"])) for one in nics)
    return Surroundings(
        macs=machine_macs(frozenset(mac for nic in nics for mac in (nic.mac, *nic.seen))),
        nics=nics,
        instance=guest["instance"],
        verdict=guest["verdict"],
        why=tuple(guest["why"]),
    )


def _show(output: Output, shape: Shape) -> None:
    subject, findings = f"[bold]{clean(shape['subject'])}[/]", shape["findings"]
    served = ", ".join(shape["served"]) or "none"
    output.styled(f"{subject}: {shape['questions']} requests, documents served: {served}")
    if shape["given_up"]:
        output.styled(f"[yellow]stopped early:[/] {clean(shape['given_up'])}")
    if skipped := ", ".join(shape["not_looked_at"]):
        instead = "(run `imdsproxy doctor http://169.254.169.254` in the guest for these)"
        output.styled(f"[dim]not checked: {skipped} {instead}[/]")
    output.styled("")
    for one in findings:
        heading = f"[{_COLOURS[one['severity']]}]{one['severity']}[/] [bold]{one['code']}[/]"
        output.facts(_facts(one), heading=heading)
        output.styled("")
    counts = Counter(one["severity"] for one in findings)
    shown = (
        f"[{colour}]{spell_count(counts[name], name)}[/]"
        for name, colour in _COLOURS.items()
        if counts[name]
    )
    output.styled(", ".join(shown) or "[green]nothing found[/]")


def _facts(finding: Shape) -> Mapping[str, str]:
    paths = finding["paths"]
    more = len(paths) - _PATHS_SHOWN
    facts = {
        "seen": [finding["what"]],
        "at": [*paths[:_PATHS_SHOWN], *([f"and {more} more"] if more > 0 else ())],
        "breaks": finding["clients"],
        "change": [finding["change"]],
    }
    return {name: "\n".join(map(clean, lines)) for name, lines in facts.items() if lines}


@dataclass(frozen=True, slots=True)
class HttpFetch:
    """HTTP client that opens a connection per request, as most clients do.

    Args:
        url: URL with scheme `http` or `https`; its path precedes every request's path.
        timeout_s: Timeout of each network operation in seconds, the same as cloud-init's.
    """

    url: SplitResult
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = _TIMEOUT_S
    clock: Callable[[], float] = time.monotonic

    @property
    def host(self) -> str:
        """Host name or address; an IPv6 address with zone and without brackets."""
        return unquote(self.url.hostname or "")

    def __call__(self, ask: Ask) -> Answer:
        """Send one request; errors become an `Answer` with the reason."""
        tls = self.url.scheme == "https"
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        port = self.url.port or kind.default_port
        with closing(kind(self.host, port, timeout=self.timeout_s)) as connection:
            try:
                return self._ask(connection, ask)
            except TimeoutError:
                return Answer(why=f"no answer within {self.timeout_s:g} s", timed_out=True)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # ValueError: the server's path or token, or the host name, has characters that HTTP does not allow.
                return Answer(why=str(error) or type(error).__name__)

    def _ask(self, connection: http.client.HTTPConnection, ask: Ask) -> Answer:
        began = self.clock()
        # `request` would add a Content-Length to a PUT, which the clients do not send.
        prefix = self.url.path.rstrip("/")
        connection.putrequest(ask.method, quote(f"{prefix}{ask.path}", safe=_SAFE))
        for name, value in (*self.headers, *ask.headers):
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        took = self.clock() - began
        length, cut = response.length, False
        try:
            body = response.read(_MOST_BYTES)
        except http.client.IncompleteRead as error:
            body, cut = error.partial, True
        return Answer(
            response.status,
            _first_of_each(response.getheaders()),
            body,
            first_byte_s=took,
            until_close=length is None and not response.chunked,
            version=response.version,
            # `read` with a limit raises no error for a truncated body.
            cut=cut or (length is not None and len(body) < min(length, _MOST_BYTES)),
        )


def _ask_daemon(daemon: AdminClient, network: str, address: str, ask: Ask) -> Answer:
    """Return the daemon's computed answer for the guest at an address, without a network request."""
    query = {"network": network, "address": address, "path": ask.path}
    document = daemon.get("/v1/documents", query)
    headers, body = _first_of_each(document["headers"]), decode_bytes(document["body"])
    return Answer(document["status"], headers, body)


def _first_of_each(headers: Sequence[Sequence[str]]) -> Mapping[str, str]:
    return {name.lower(): value for name, value in reversed(headers)}


def parse_url(url: str, headers: Sequence[str] = ()) -> HttpFetch:
    """Parse the URL of a server and further headers.

    `url`: `http://HOST[:PORT][/PREFIX]`, or https; a bare host means http. Raises `RequestRefused`: the URL or a header
    is invalid.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RequestRefused(f"{url} is not a URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
        raise RequestRefused(
            f"{url} is not the URL of a server",
            hint="use a URL as http://169.254.169.254, http://[fe80::a9fe:a9fe%25eth0] or http://nova:8775",
        )
    return HttpFetch(parts, tuple(_header(one) for one in headers))


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isprintable():
        raise RequestRefused(
            f"{text!r} is not a header", hint="use a header as 'X-Instance-ID: 5f0b…'"
        )
    return name.strip(), value.strip()


_DMI: Final = ("sys_vendor", "product_name", "product_serial", "product_uuid", "chassis_asset_tag")
_SOURCES: Final = re.compile(r"^datasource_list:\s*\[(.*)\]", re.MULTILINE)
_QEMU_MAC: Final = re.compile(r"\bmac\"?[=:]\"?((?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2})")
_LOOPBACK: Final = "00:00:00:00:00:00"


def is_metadata_address(host: str) -> bool:
    """Return whether a host is a metadata address; only then do this machine's NICs and SMBIOS matter."""
    try:
        return ip_address(host.partition("%")[0]) in {METADATA_IPV4, METADATA_IPV6}
    except ValueError:
        return False


def look_around(root: Path = Path("/")) -> Surroundings:
    """Read this machine's NICs, SMBIOS and kernel command line; skip unreadable files."""
    container = (root / "run/systemd/container").exists()
    first = _text(root / "proc/1/cmdline").replace("\0", " ")
    pairs = [one.partition("=") for one in _text(root / "proc/1/environ").split("\0")]
    files = [root / "sys/class/dmi/id" / name for name in _DMI]
    dmi = {file.name: _text(file).strip() for file in files}
    # The file has a line such as `datasource_list: [ OpenStack, None ]`.
    listed = _SOURCES.search(_text(root / "run/cloud-init/cloud.cfg"))
    return Surroundings(
        macs=_macs(root),
        dmi={name: value for name, value in dmi.items() if value},
        dmi_complete=all(os.access(file, os.R_OK) for file in files if file.exists()),
        sources=None if listed is None else tuple(re.findall(r"\w[\w-]*", listed[1])),
        kernel=first if container else _text(root / "proc/cmdline"),
        environment={name: value for name, _, value in pairs if name},
        container=container,
    )


def machine_macs(known: frozenset[str], root: Path = Path("/")) -> frozenset[str] | None:
    """Return the MACs of the QEMU machine on this host with a MAC in `known`; `None` without such a machine.

    QEMU's command line lacks hot-plugged NICs. They are found by their tap device, whose MAC differs only in the first
    byte: libvirt sets that to `fe` (`virNetDevTapCreateInBridgePort`).
    """
    commands = (_text(file) for file in (root / "proc").glob("[0-9]*/cmdline"))
    machines = (
        {mac.lower() for mac in _QEMU_MAC.findall(command)}
        for command in commands
        if "qemu" in command.partition("\0")[0]
    )
    found = next((macs for macs in machines if macs & known), None)
    if found is None:
        return None
    taps = _macs(root)
    return frozenset(found | {mac for mac in known if f"fe{mac[2:]}" in taps})


def _macs(root: Path) -> frozenset[str]:
    addresses = (_text(file).strip().lower() for file in root.glob("sys/class/net/*/address"))
    return frozenset(mac for mac in addresses if mac and mac != _LOOPBACK)


def _text(path: Path) -> str:
    """Return a file's text; empty if the file is missing or unreadable, which is no error here."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@options.host_command
def snippet(
    run: options.Invocation,
    instance: options.Instance,
    target: Annotated[
        snippets.Target,
        options.flag(f"--for {'|'.join(snippets.Target)}", "The hypervisor of the guest."),
    ],
    *,
    dialect: Annotated[
        Dialect | None,
        options.flag(
            f"--dialect {'|'.join(Dialect)}",
            "Documents that the guest requests (default: openstack; nocloud for Incus; or a dialect that the "
            "instance has).",
        ),
    ] = None,
) -> None:
    """Print the SMBIOS, NIC and route settings that make a stock image request this instance's metadata."""
    from imdsproxy.model.records import parse_instance, parse_network

    daemon = run.daemon()
    shape = daemon.get(path_to("instances", instance))
    record = read_record("instance", parse_instance, shape["record"])
    networks = {}
    for port in record.ports:
        shape = daemon.get(path_to("networks", port.network))
        networks[port.network] = read_record("network", parse_network, shape["record"])
    dialects = record.served
    if dialect is not None and dialect not in dialects:
        raise RequestRefused(
            f"instance {instance} has no {dialect} documents (it has: {', '.join(sorted(dialects)) or 'none'})",
            hint="omit --dialect, or enable the dialect with `imdsproxy instance set`",
        )
    chosen = dialect or snippets.choose_dialect(target, dialects)
    if chosen is None:
        raise RequestRefused(
            f"instance {instance} has no documents",
            hint=f"enable a dialect, as `imdsproxy instance set {instance} --openstack`",
        )
    parts = snippets.render_snippet(record, networks, target, chosen, _host_has)
    answer = {
        "instance": instance,
        "for": target,
        "dialect": chosen,
        "parts": [asdict(part) for part in parts],
    }
    run.output.answer(answer, snippets.render_text(target, parts))


def _host_has(address: IpAddress) -> bool:
    """Return whether this host has an address, by trying to bind the address."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET  # noqa: PLR2004
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False
