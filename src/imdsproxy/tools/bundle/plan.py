"""Contents of a bundle, and the query for each part. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

UNITS: Final = ("imdsproxy", "imdsproxy-haproxy", "imdsproxy-documents")
MOST_BYTES: Final = 4 << 20
"""Maximum size of a part in bytes; only the end of a longer part is kept."""

_JOURNAL_LINES: Final = 20_000


@dataclass(frozen=True, slots=True)
class Admin:
    """Route of the admin API, with a JSON answer."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Program:
    """Output of a program."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """End of a file; the part is absent if the file does not exist."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Worker:
    """Command to HAProxy's worker."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Page of a metrics endpoint."""

    name: str
    host: str
    port: int
    path: str


Part: TypeAlias = Admin | Program | File | Worker | Endpoint


@dataclass(frozen=True, slots=True)
class Places:
    """Files and endpoints of this host.

    Attributes:
        files: HAProxy's files and logs: name in the bundle, and path.
        haproxy: Path of the HAProxy program.
        metrics: Metrics endpoints from the settings: name, host and port.
    """

    files: Sequence[tuple[str, str]]
    haproxy: str
    metrics: Sequence[tuple[str, str, int]]


def plan_parts(places: Places) -> Iterator[Part]:
    """Yield all parts, in the order of collection."""
    for kind in ("status", "networks", "instances", "token-report"):
        yield Admin(f"daemon/{kind}.json", f"/v1/{kind}")
    for name, host, port in places.metrics:
        pages = ("metrics", "livez", "readyz") if name == "controller" else ("metrics",)
        yield from (Endpoint(f"daemon/{name}-{page}.txt", host, port, f"/{page}") for page in pages)
    for command in ("show info", "show stat", "show servers state", "show map", "show table"):
        yield Worker(f"haproxy/{command.replace(' ', '-')}.txt", command)
    yield from (File(name, path) for name, path in places.files)
    for unit in UNITS:
        words = ("journalctl", "--no-pager", f"--lines={_JOURNAL_LINES}", f"--unit={unit}")
        yield Program(f"logs/{unit}.txt", (*words, "--output=short-iso-precise"))
        yield Program(
            f"host/{unit}.unit.txt", ("systemctl", "status", "--no-pager", "--lines=0", unit)
        )
    yield Program("versions/haproxy.txt", (places.haproxy, "-vv"))
    yield Program("versions/kernel.txt", ("uname", "-a"))
    yield Program("versions/nftables.txt", ("nft", "--version"))
    yield File("versions/os-release.txt", "/etc/os-release")
    yield Program("host/namespaces.txt", ("ip", "netns", "list"))
    everywhere = ("ip", "-all", "netns", "exec")
    yield Program(
        "host/addresses-in-namespaces.txt", (*everywhere, "ip", "-brief", "address", "show")
    )
    yield Program("host/nftables-in-namespaces.txt", (*everywhere, "nft", "list", "ruleset"))
    yield Program("host/links.txt", ("ip", "-details", "link", "show"))
    yield Program("host/addresses.txt", ("ip", "address", "show"))
    yield Program("host/routes.txt", ("ip", "route", "show", "table", "all"))
    yield Program("host/nftables.txt", ("nft", "list", "ruleset"))
    yield Program("host/listeners.txt", ("ss", "-Hltnp"))
    yield Program("host/processes.txt", ("ps", "-eo", "pid,ppid,user,rss,etime,stat,comm"))


def keep_end(text: str, most: int = MOST_BYTES) -> str:
    """Return the text, or the end of a long text from the start of a line."""
    if len(text) <= most:
        return text
    end = text[-most:].partition("\n")[2]
    return f"[the beginning was cut off]\n{end}"


def render_readme(
    host: str, time: str, version: str, names: Sequence[str], lacking: Sequence[tuple[str, str]]
) -> str:
    """Return the README of a bundle: contents, missing parts with reasons, and redactions."""
    missing = "\n".join(f"- {name}: {reason}" for name, reason in lacking) or "- nothing"
    listed = "\n".join(f"- {name}" for name in names)
    return f"""Support bundle of imdsproxy {version}, host {host}, {time}

Contents

{listed}

Missing parts, with reasons

{missing}

Removed data

[removed] replaces user-data, vendor-data, SSH keys, posted passwords, session tokens and their keys, Nova's shared
secrets and signatures, private keys, and the passwords of clouds.yaml. imdsproxy searches for each value, unchanged and
in base64, hexadecimal, JSON, Python and URL form; of user-data, for each line and the values in it. It does not search
for values shorter than 4 characters, or 6 in user-data. Words that also occur in user-data may be removed elsewhere.

The bundle still contains names, ids and addresses of instances and networks, MACs, projects, paths, the settings, and
this host's links, addresses, routes and firewall rules. Review it before you share it.
"""
