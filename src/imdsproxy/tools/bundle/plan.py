"""Contents of a bundle, the query for each part, and the redactor. Pure.

The redactor removes known secrets in every encoding, and patterns that look like secrets. It removes too much rather
than too little: a word that occurs in user-data is removed everywhere.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias
from urllib.parse import quote, quote_plus

from imdsproxy.model.tokens import TOKEN_PATTERN

UNITS: Final = (
    "imdsproxy",
    "imdsproxy-haproxy",
    "imdsproxy-documents",
    "imdsproxy-identity",
    "imdsproxy-signer",
)
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
    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """End of a file; the part is absent if the file does not exist."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Endpoint:
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
        metrics: Metrics endpoints from the settings: name, host and port.
    """

    files: Sequence[tuple[str, str]]
    haproxy: str
    metrics: Sequence[tuple[str, str, int]]


def plan_parts(places: Places) -> Iterator[Part]:
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


REMOVED: Final = "[removed]"
LEAST_SECRET: Final = 4
"""Minimum length of a secret in characters; shorter values would match everywhere."""

_LEAST_WORD: Final = 6
_BEGIN: Final = 12
"""Number of leading characters that identify a longer secret, because logs truncate values."""

_MOST_WHOLE: Final = 65_536
_BASE64_LINES: Final = (64, 76)
_BETWEEN_WORDS: Final = re.compile(rb"[\s\"'=:,;\[\]{}()<>|&]+")
_PLAIN_WORD: Final = re.compile(rb"[a-z_-]*")
"""Pattern of words like `packages` and `network`, which stay so that logs are readable. Whole values are removed."""

_PATTERNS: Final = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (rf"(?<![\w-]){TOKEN_PATTERN.strip('^$')}", 0),
        # Identity tokens, and every other token of this kind.
        (r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?", 0),
        # Signatures and keys; the pattern also removes digests, which look the same.
        (r"\b[0-9a-fA-F]{64}\b", 0),
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            re.DOTALL,
        ),
        (r"\b(?:ssh-(?:rsa|dss|ed25519)|ecdsa-sha2-\S+|sk-\S+) [A-Za-z0-9+/=]{40,}", 0),
        (r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)", 0),
        (r"(?i)(?<=authorization: )[^\r\n\"]+", 0),
    )
)


@dataclass(slots=True)
class Redactor:
    _short: dict[str, int] = field(default_factory=dict)
    _long: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _starts: set[str] = field(default_factory=set)
    _lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, secrets: Iterable[bytes], data: Iterable[bytes], names: Collection[bytes] = ()
    ) -> Self:
        """Build a redactor.

        Args:
            secrets: Whole values; values shorter than `LEAST_SECRET` are ignored.
            data: User-data and similar texts; each line and each value in a line is a secret.
            names: Words of `data` that are not secrets.
        """
        pieces = {piece for one in set(data) for piece in _pieces(one)} - set(names)
        pieces.update(one for one in map(bytes.strip, secrets) if len(one) >= LEAST_SECRET)
        made = cls()
        for form in {form for piece in pieces for form in _forms(piece)}:
            made._starts.add(form[:LEAST_SECRET])
            if len(form) < _BEGIN:
                made._short[form] = len(form)
            else:
                made._long[form[:_BEGIN]].append(form)
        made._lengths = tuple(sorted(set(made._short.values()), reverse=True))
        return made

    def clean(self, text: str) -> str:
        for pattern in _PATTERNS:
            text = pattern.sub(REMOVED, text)
        parts: list[str] = []
        done = 0
        for start, end in _merged(self._spans(text)):
            parts += (text[done:start], REMOVED)
            done = end
        return "".join((*parts, text[done:]))

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match; the first characters of a secret suffice."""
        starts = self._starts
        for at in range(len(text) - LEAST_SECRET + 1):
            if text[at : at + LEAST_SECRET] not in starts:
                continue
            length = max(
                (_common(text, at, form) for form in self._long.get(text[at : at + _BEGIN], ())),
                default=0,
            ) or next((one for one in self._lengths if text[at : at + one] in self._short), 0)
            if length:
                yield at, at + length


def _common(text: str, at: int, form: str) -> int:
    if text.startswith(form, at):
        return len(form)
    return next(
        (
            number
            for number, (one, other) in enumerate(
                zip(form, text[at : at + len(form)], strict=False)
            )
            if one != other
        ),
        len(text) - at,
    )


def _merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begin, end = -1, -1
    for start, stop in spans:
        if start > end:
            if end > 0:
                yield begin, end
            begin = start
        end = max(end, stop)
    if end > 0:
        yield begin, end


def _pieces(data: bytes) -> Iterator[bytes]:
    """Yield the pieces of data to search for: the whole, its lines, and the lines' values and words."""
    yield from (one for one in (data, data.strip()) if _LEAST_WORD <= len(one) <= _MOST_WHOLE)
    for line in data.splitlines():
        words = (one for one in _BETWEEN_WORDS.split(line) if not _PLAIN_WORD.fullmatch(one))
        found = (line.strip(), line.partition(b":")[2], line.partition(b"=")[2], *words)
        yield from (
            one for one in (each.strip(b" \t\"'") for each in found) if len(one) >= _LEAST_WORD
        )


def _forms(piece: bytes) -> Iterator[str]:
    yield piece.hex()
    yield piece.hex().upper()
    for encoded in (base64.b64encode(piece), base64.urlsafe_b64encode(piece)):
        yield encoded.decode().rstrip("=")
    if len(piece) > _BASE64_LINES[0] // 2:
        encoded = base64.b64encode(piece)
        for width in _BASE64_LINES:
            lines = (encoded[at : at + width] for at in range(0, len(encoded), width))
            yield from (one.decode() for one in lines if len(one) >= _BEGIN)
    # Base64 of surrounding data: drop the outer characters, which share bits with neighbouring bytes.
    for before in (0, 1, 2):
        inner = base64.b64encode(bytes(before) + piece).decode().rstrip("=")
        begin = before + 1 if before else 0
        inner = inner[begin : -1 if (len(piece) + before) % 3 else None]
        if len(inner) >= LEAST_SECRET:
            yield inner
    # Programs print bytes that are not UTF-8 in either decoding.
    for text in {piece.decode("utf-8", "replace"), piece.decode("latin-1")}:
        yield from _text_forms(text)
    yield from _percent_forms(quote(piece, safe=""))


def _text_forms(text: str) -> Iterator[str]:
    ascii_json, plain_json = (json.dumps(text, ensure_ascii=one)[1:-1] for one in (True, False))
    yield from (text, ascii_json, plain_json, repr(text)[1:-1])
    for quoted in (quote(text), quote(text, safe=""), quote_plus(text)):
        yield from _percent_forms(quoted)


def _percent_forms(quoted: str) -> Iterator[str]:
    yield quoted
    yield re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), quoted)
