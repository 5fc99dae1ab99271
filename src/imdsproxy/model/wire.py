"""Interface of the three processes: headers, ports, map values and response texts.

A guest's request reaches the document server and the resolver with these headers. HAProxy sets them after it has
deleted all of the guest's headers that are not on the allow-list.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from imdsproxy.model.entities import InstanceId
from imdsproxy.model.path_rules import PathRules
from imdsproxy.model.policy_word import HOP_LIMIT, POLICY_WORD, word_of
from imdsproxy.model.subject import Subject

TEXT: Final = b"text/plain; charset=utf-8"

ONE_IN: Final = 20
"""Divisor of the sample of reads without tokens: it finds a boot, which has 100 reads, with a probability of 99.4 %."""

LONGEST_PATH: Final = 1024
"""Maximum bytes of a path; every document's path fits, even with each byte escaped. HAProxy and the document server
answer 404 to longer paths.
"""

VERIFIED_PORT: Final = 254
"""Port of requests that passed the kernel's MAC filter. Reserved by IANA, and below what rpc clients bind."""

REDIRECTED_PORT: Final = 9254
"""Port, at every address, of requests that a router's namespace redirects. Neutron's proxies have 9697."""

ANSWER_DSCP: Final = 0x2F
"""Mark of answers to unverified requests that only the instance may read (RFC 2474's pool for local use)."""

# The hop limit of an answer that holds a session token. HAProxy cannot set a packet's TTL. It can set a DSCP on a
# connection without any privilege; a rule in the kernel (`network.anti_spoofing.rules`) turns the DSCP into the TTL or
# hop limit. Without that rule the answer would travel as far as any other. If the rule is missing, the record therefore
# has `WITHHELD` in place of the limit, and HAProxy gives no token.

UNLIMITED: Final = 64
"""The kernel's own default; such an answer gets no DSCP."""

WITHHELD: Final = 0
"""HAProxy gives no token."""

NEXT_TO_MARK: Final = ANSWER_DSCP - 1
"""The DSCP equals the limit. `ANSWER_DSCP` is taken, so a limit of that value is lowered by one."""

HEADER_NETWORK: Final = "x-imdsproxy-network"
HEADER_ADDRESS: Final = "x-imdsproxy-address"
HEADER_INSTANCE: Final = "x-imdsproxy-instance"
HEADER_REVISION: Final = "x-imdsproxy-revision"

HEADER_TURN: Final = "x-imdsproxy-turn"
"""Within HAProxy: number of the first document server worker to which the request was sent."""

HEADER_SCOPE: Final = "x-imdsproxy-scope"
"""To the resolver: `router` if the id in `HEADER_NETWORK` is a router's, else absent."""

HEADER_TARGET: Final = "x-imdsproxy-target"
"""To the resolver: path and query as the guest sent them, because no HTTP library changes a header's value."""

HEADER_RECORD: Final = "x-imdsproxy-record"
"""From the resolver back to HAProxy: the record for a request to Nova."""

HEADER_UNVERIFIED: Final = "x-imdsproxy-unverified"
"""To the resolver: the guest's source port, if its address is valid only with its MAC and the kernel has not seen both
together yet.
"""

HEADER_REFUSED: Final = "x-imdsproxy-refused"
"""From the resolver back to HAProxy: the answer holds no instance's data, and any guest may read it."""

HEADER_AUDITED: Final = "x-imdsproxy-audited"
"""From HAProxy through the resolver back to HAProxy: the audit log already has a line of this request."""

HEADER_FORWARDED: Final = "x-imdsproxy-forwarded"
"""To the resolver and back: `by` if headers show that a third party made the guest send the request (SSRF), `for` if
the header is `X-Forwarded-For` in a PUT.
"""

HEADER_OPERATOR: Final = "x-imdsproxy-operator"
"""From the controller to HAProxy: an operator asks for the guest's answer, so no read of the guest is counted."""

IDENTITY_PATH: Final = "/latest/api/identity"
"""Path where a guest requests an identity token."""

OPENSTACK_TOKEN_PATH: Final = "/openstack/latest/oauth2/token"  # noqa: S105 - where tokens are, not one
"""Path where a client of Keystone requests an identity token, by OAuth's client credentials."""

HEADER_CLIENT: Final = "x-imdsproxy-client"
"""To the process that gives identity tokens, if the guest sent `Authorization`: `CLIENT_NAMED` if that header names a
client by HTTP's Basic authentication, else another word.
"""

CLIENT_NAMED: Final = "named"
"""Value of `HEADER_CLIENT`: the guest has named a client."""

DOCUMENT_PATHS: Final = tuple(
    f"/latest/dynamic/instance-identity/{name}"
    for name in ("document", "signature", "pkcs7", "rsa2048")
)
"""Paths of AWS's instance identity document, and of its signatures."""

HEADER_SUBJECT: Final = "x-imdsproxy-subject"
"""To the process that gives identity tokens: id of the guest's subject (`model.subject`)."""

HEADER_AUDIENCE: Final = "x-imdsproxy-audience"
"""From the guest: audience of the identity token that it requests."""

HEADER_NONCE: Final = "x-imdsproxy-nonce"
"""From the guest: value for the claim `nonce` of its identity token."""

HEADER_TOKEN_ID: Final = "x-imdsproxy-token-id"  # noqa: S105 - a header's name
"""Back to HAProxy: the identity token's claim `jti`, for the audit log."""

HEADER_FRESH: Final = "x-imdsproxy-fresh"
"""Back to HAProxy: seconds for which it may give the same identity token again."""

PROBE_INSTANCE: Final = InstanceId(".probe")
"""Instance whose documents the readiness check requests; no record may have this id."""

PROBE_PATH: Final = "/latest/meta-data/instance-id"

RETRY_AFTER_S: Final = 1
"""Seconds in `Retry-After` of every 503: cloud-init's own pace."""

UNKNOWN_TEXT: Final = "no instance has this address in this network"
"""Body of an unknown guest's 404, for people who use curl.

One line without its end: some clients take an error's body for the requested value.
"""

MISMATCH_TEXT: Final = "this address goes with another MAC in this network"
"""Body of the answer to a guest with another instance's address."""

MAP_TOMBSTONE: Final = "-"
"""Overlay value of a key that is deleted from the base: the address is unknown."""

MAP_CONFLICT: Final = "!"
"""Value of an address that two instances claim."""

MAP_NOVA: Final = "@"
"""Prefix of the record of an instance that Nova serves; no instance's id begins with it."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Values to which a policy word refers: they are in other maps and files, not in the record's value."""

    paths: PathRules = ()
    subject: Subject | None = None


_NOTHING_BESIDE: Final = Beside()


@dataclass(frozen=True, slots=True)
class EmbeddedRecord:
    """Record of one (network, address) that our document server serves: its instance and revision."""

    instance: InstanceId
    revision: str
    policy: str = ""
    beside: Beside = field(default=_NOTHING_BESIDE, compare=False)


@dataclass(frozen=True, slots=True)
class NovaRecord:
    """Record of one (network, address) that Nova serves: all data for a request to Nova.

    Attributes:
        signatures: Signature by the secret in force and, during a change of secrets, by the next one.
        policy: Policy word, empty for the default (`model.policy.render_policy_word`).
    """

    endpoint_set: str
    instance: InstanceId
    project: str
    signatures: tuple[str, ...]
    policy: str = ""
    beside: Beside = field(default=_NOTHING_BESIDE, compare=False)


MapRecord: TypeAlias = EmbeddedRecord | NovaRecord
"""Data plane's record of one (network, address)."""

_NOVA: Final = re.compile(
    r"@(?P<set>[a-z0-9-]+)\|(?P<signature>[0-9a-f]{64})\|(?P<instance>[^|]+)\|(?P<project>[^|]+)(?:\|(?P<next>[0-9a-f]{64}))?"
)


def render_map_value(record: MapRecord) -> str:
    """Render a record as one word for a map.

    `INSTANCE|REVISION`, or `@ENDPOINT-SET|SIGNATURE|INSTANCE|PROJECT` and optionally `|NEXT-SIGNATURE`; both may begin
    with `POLICY-WORD|`. HAProxy searches for a field character by character. A part of fixed length comes first,
    because HAProxy can cut it out without a search.
    """
    if isinstance(record, EmbeddedRecord):
        fields: tuple[str, ...] = (record.instance, record.revision)
    else:
        first, *later = record.signatures
        begin = MAP_NOVA + record.endpoint_set
        fields = (begin, first, record.instance, record.project, *later)
    return "|".join((record.policy, *fields) if record.policy else fields)


def hide_signatures(text: str) -> str:
    """Return a map value that is safe to show: a signature lets its reader ask Nova as that instance."""
    record = parse_map_value(text)
    if isinstance(record, NovaRecord):
        return render_map_value(replace(record, signatures=("signed",)))
    return text


def parse_map_value(text: str) -> MapRecord | None:
    """Parse the result of `render_map_value`; `None` for a tombstone, a conflict or a foreign word."""
    policy = ""
    if text.startswith(POLICY_WORD):
        policy, _, text = text.partition("|")
    if text.startswith(MAP_NOVA):
        found = _NOVA.fullmatch(text)
        if found is None:
            return None
        instance_id, project = InstanceId(found["instance"]), found["project"]
        signatures = tuple(filter(None, found.group("signature", "next")))
        return NovaRecord(found["set"], instance_id, project, signatures, policy)
    instance, separator, revision = text.partition("|")
    if not separator or not instance or not revision:
        return None
    return EmbeddedRecord(InstanceId(instance), revision, policy)


def hop_limit_of(value: str | None) -> int:
    word = word_of(value or "")
    return int(HOP_LIMIT.read(word)) if word else UNLIMITED


def withhold_token(value: str) -> str:
    """Return the map value, or policy word, with `WITHHELD` as hop limit."""
    word = word_of(value)
    return HOP_LIMIT.replace(word, str(WITHHELD)) + value.removeprefix(word)
