"""What the three processes exchange, declared once: headers, map values, socket names.

A guest's request reaches the document server and the resolver with these headers, set by HAProxy after
everything the guest sent under any other name than the allow-list has been deleted.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from imdsproxy.core.model import InstanceId
from imdsproxy.core.path_rules import PathRules
from imdsproxy.core.policy_word import HOP_LIMIT, POLICY_WORD, word_of

LONGEST_PATH: Final = 1024
"""Bytes of a path; no document has a longer one, also where each of its bytes is escaped. HAProxy answers 404 to
longer ones, and so does the document server.
"""

VERIFIED_PORT: Final = 254
"""Requests that passed the kernel's MAC filter arrive here. Reserved by IANA, and below what rpc clients bind."""

REDIRECTED_PORT: Final = 9254
"""Requests that rules in a router's namespace redirect arrive here, at every address. Neutron's proxies have 9697."""

ANSWER_DSCP: Final = 0x2F
"""Marks answers to unverified requests that only the instance may read (RFC 2474's pool for local use)."""

# The hop limit of an answer that holds a session token. HAProxy cannot set a packet's TTL. It can set a DSCP on a
# connection without any privilege; a rule in the kernel (`anti_spoofing.rules`) turns the DSCP into the TTL or hop
# limit. Without that rule the answer would go as far as any other, so where it is missing the record has `WITHHELD` in
# place of the limit, and no token is given.

UNLIMITED: Final = 64
"""The kernel's own default; such an answer gets no DSCP."""

WITHHELD: Final = 0
"""No token is given."""

NEXT_TO_MARK: Final = ANSWER_DSCP - 1
"""The DSCP is the limit itself. `ANSWER_DSCP` is taken, so a limit of that value becomes one less."""

HEADER_NETWORK: Final = "x-imdsproxy-network"
HEADER_ADDRESS: Final = "x-imdsproxy-address"
HEADER_INSTANCE: Final = "x-imdsproxy-instance"
HEADER_REVISION: Final = "x-imdsproxy-revision"

HEADER_TURN: Final = "x-imdsproxy-turn"
"""Within HAProxy: the number of the document server's worker that a request was sent to first."""

HEADER_SCOPE: Final = "x-imdsproxy-scope"
"""To the resolver: `router` where the id in `HEADER_NETWORK` came as a router's, else not there."""

HEADER_TARGET: Final = "x-imdsproxy-target"
"""To the resolver: path and query as the guest sent them, which no HTTP library changes in a header."""

HEADER_RECORD: Final = "x-imdsproxy-record"
"""From the resolver back to HAProxy: the record by which a request goes to Nova."""

HEADER_UNVERIFIED: Final = "x-imdsproxy-unverified"
"""To the resolver: the port that the guest asks from, where its address is to be believed with its MAC only, and
the kernel has not seen the two together yet."""

HEADER_REFUSED: Final = "x-imdsproxy-refused"
"""From the resolver back to HAProxy: this answer has nothing of an instance, and any guest may read it."""

HEADER_LOGGED: Final = "x-imdsproxy-told"
"""From HAProxy through the resolver back to HAProxy: the audit log has a line of this request already."""

HEADER_FORWARDED: Final = "x-imdsproxy-forwarded"
"""To the resolver and back: `by` where headers show that the guest was made to ask (SSRF), `for` where it is
`X-Forwarded-For` in a PUT."""

HEADER_OPERATOR: Final = "x-imdsproxy-operator"
"""From the controller to HAProxy: an operator asks what the guest would get, so it is no read of the guest's."""

PROBE_INSTANCE: Final = InstanceId(".probe")
"""Its documents are what readiness asks for; no record may have this id."""

PROBE_PATH: Final = "/latest/meta-data/instance-id"

RETRY_AFTER_S: Final = 1
"""Seconds that every 503 asks a client to wait: cloud-init's own pace."""

UNKNOWN_TEXT: Final = "no instance has this address in this network"
"""The body of an unknown guest's 404, for people who try it with curl.

One line without its end: some clients take an error's body for the value that they asked for.
"""

MISMATCH_TEXT: Final = "this address goes with another MAC in this network"
"""The body for a guest that has another's address."""

MAP_TOMBSTONE: Final = "-"
"""An overlay's word for "not in the base any more": the address is unknown."""

MAP_CONFLICT: Final = "!"
"""Two instances claim the address."""

MAP_NOVA: Final = "@"
"""How the record of an instance begins whose documents Nova has; no instance's id begins so."""


@dataclass(frozen=True, slots=True)
class EmbeddedRecord:
    """Of one (network, address) whose documents are ours: whose it is, and in which revision.

    Attributes:
        policy: As of `NovaRecord`.
        paths: As of `NovaRecord`.
    """

    instance: InstanceId
    revision: str
    policy: str = ""
    paths: PathRules = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class NovaRecord:
    """Of one (network, address) whose documents Nova has: all that a request to Nova is made of.

    Attributes:
        endpoint_set: Which Nova metadata APIs are asked.
        project: The port's.
        signatures: By the secret in force, then, while it is being replaced, by the next one.
        policy: The policy word, empty where the default is in force (`core.policy.render_policy_word`).
        paths: The rules of the set that the word refers to. They are in another map, and not in the value.
    """

    endpoint_set: str
    instance: InstanceId
    project: str
    signatures: tuple[str, ...]
    policy: str = ""
    paths: PathRules = field(default=(), compare=False)


MapRecord: TypeAlias = EmbeddedRecord | NovaRecord
"""What the data plane knows of one (network, address)."""

_NOVA: Final = re.compile(
    r"@(?P<set>[a-z0-9-]+)\|(?P<signature>[0-9a-f]{64})\|(?P<instance>[^|]+)\|(?P<project>[^|]+)(?:\|(?P<next>[0-9a-f]{64}))?"
)


def render_map_value(record: MapRecord) -> str:
    """The record's one word in a map.

    `INSTANCE|REVISION`, or `@ENDPOINT-SET|SIGNATURE|INSTANCE|PROJECT` and perhaps `|NEXT-SIGNATURE`, and before either
    `POLICY-WORD|` where there is one. HAProxy looks for a field character by character, so what has a length of its
    own comes first: it is cut out instead.
    """
    if isinstance(record, EmbeddedRecord):
        fields: tuple[str, ...] = (record.instance, record.revision)
    else:
        first, *later = record.signatures
        begin = MAP_NOVA + record.endpoint_set
        fields = (begin, first, record.instance, record.project, *later)
    return "|".join((record.policy, *fields) if record.policy else fields)


def hide_signatures(text: str) -> str:
    """A map value fit to be shown: who has a signature can ask Nova as that instance."""
    record = parse_map_value(text)
    if isinstance(record, NovaRecord):
        return render_map_value(replace(record, signatures=("signed",)))
    return text


def parse_map_value(text: str) -> MapRecord | None:
    """The reverse of `render_map_value`; `None` for a tombstone, a conflict or a foreign word."""
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
    """The hop limit in a map value (`render_map_value`)."""
    word = word_of(value or "")
    return int(HOP_LIMIT.read(word)) if word else UNLIMITED


def withhold_token(value: str) -> str:
    """The same map value, or policy word, where no token is given."""
    word = word_of(value)
    return HOP_LIMIT.replace(word, str(WITHHELD)) + value.removeprefix(word)
