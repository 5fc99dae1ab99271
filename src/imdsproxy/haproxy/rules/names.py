"""Names for templates of every configuration: conditions of requests, and values.

Templates use these names; they do not contain the places of fields in records and in the policy word.
"""

from types import ModuleType
from typing import Final

from imdsproxy.haproxy.rules import counting
from imdsproxy.haproxy.rules.text import (
    Block,
    Text,
    Value,
    blocks_of,
    fill,
    name_values,
    read_template,
)
from imdsproxy.model import path_rules, policy, tokens, wire
from imdsproxy.model import policy_word as layout
from imdsproxy.model.path_rules import WITHIN_OTHER_TREES
from imdsproxy.model.policy_word import POLICY_WORD, Field, Letter
from imdsproxy.model.wire import TEXT

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")

_GUEST_HEADERS: Final = (
    "accept|content-length|content-type|host|if-[a-z-]+|range|transfer-encoding|user-agent"
)
"""Guest's headers that HAProxy forwards, as a pattern of lower-case names; HAProxy deletes all others."""

_IDENTITY_HEADERS: Final = f"{wire.HEADER_AUDIENCE}|{wire.HEADER_NONCE}"

_IDENTITY_SLOTS: Final = 4096
"""Identity tokens that HAProxy keeps: about 4 MB."""

_ISSUER_CACHE_S: Final = 300
"""Seconds for which verifiers may keep the issuer's documents."""

_TOKEN_HEADERS: Final = f"{tokens.TOKEN_HEADER}|{tokens.TTL_HEADER}"
"""Headers that HAProxy also forwards to our own processes; Nova does not use tokens."""


def _constants(*modules: ModuleType) -> dict[str, Value]:
    found = (item for module in modules for item in vars(module).items())
    return name_values({name: value for name, value in found if name.isupper()})


_SPELLED_OUT: Final = r'path,url_dec,regsub("/(?:\.?/)*(?:\.$)?",/,g)'

_VALUES: Final[dict[str, Value]] = {
    **_constants(wire, tokens, path_rules, policy, layout, counting),
    # Records, and the policy word before them.
    "instance": Text("var(txn.record),field(1,|)"),
    "instance_of_nova": Text("var(txn.record),field(3,|)"),
    "endpoint_off_word": Text(f"{POLICY_WORD}{layout.ENDPOINT.off}"),
    "only_tokens_off_word": Text(layout.ONLY_TOKENS_OFF),
    "rate_field": layout.REQUESTS_PER_S.number,
    "connection_policy_limit": Text(layout.CONNECTIONS.sample("var(sess.record),field(1,|)")),
    # Patterns and expressions.
    "other_than_guest_headers": f"^(?!(?:{_GUEST_HEADERS})$)",
    "other_than_guest_and_token_headers": f"^(?!(?:{_GUEST_HEADERS}|{_TOKEN_HEADERS})$)",
    "other_than_identity_headers": f"^(?!(?:{_GUEST_HEADERS}|{_TOKEN_HEADERS}|{_IDENTITY_HEADERS})$)",
    "identity_slots": _IDENTITY_SLOTS,
    "document_paths": Text(" ".join(wire.DOCUMENT_PATHS)),
    "issuer_cache": f"public, max-age={_ISSUER_CACHE_S}",
    # The path without escapes, doubled slashes and dot segments that lead to the same place.
    "canonical_path": rf'{_SPELLED_OUT},regsub("^/ec2(?=/|$)","")',
    "spelled_out": _SPELLED_OUT,
    "below_ec2": Block("{ <spelled_out> -m beg /ec2/ }"),
    # Everything on which a token's validity depends, beside the token, its expiry and its key.
    "token_context": Text("var(txn.record),concat(|,txn.policy),concat(|,sess.network)"),
    # MAC of `KID.EXPIRY` and the token's owner (`model.tokens`).
    "mac": Text(
        "concat(|,sess.network),concat(|,txn.instance),concat(|,txn.epoch),hmac(sha256,txn.key),ub64enc"
    ),
    "key_of_token": Block("var(txn.token),bytes(0,8)<whose_keys>,map_str(<token_keys_map>)"),
    "without_token": Block("!{ req.fhdr(<token_header>) -m found }"),
    "short_document": Block("path,concat(|,txn.record),map_str(<short_map>)"),
    "status_503": Block("status 503 hdr Retry-After <retry_after_s>"),
    "always": Text(""),
    # Texts, numbers.
    "methods": Text(" ".join(_METHODS)),
    "allow_methods": ", ".join(_METHODS),
    "other_trees": Text(" ".join(WITHIN_OTHER_TREES)),
    "text_plain": TEXT.decode("ascii"),
    "answer_tos": wire.ANSWER_DSCP << 2,
}


def _policy() -> dict[str, Value]:
    """Return names for the parts of the policy word: `policy_epoch` for `EPOCH`, `policy_sealed_on` for `SEALED`."""
    names: dict[str, Value] = {}
    for name, part in vars(layout).items():
        if isinstance(part, Letter | Field):
            names[f"policy_{name.lower()}"] = Text(part.sample())
        if isinstance(part, Letter):
            for state, letter in (("on", part.on), ("off", part.off)):
                condition = f"{{ {part.sample()} -m str -- {letter} }}"
                names[f"policy_{name.lower()}_{state}"] = Text(condition)
    return names


def _conditions() -> dict[str, Value]:
    """Return the conditions as anonymous ones, `{ … }`, which rules contain directly."""
    acls = (line.split(maxsplit=2) for line in fill(read_template("conditions"), _VALUES))
    return {name: Text(f"{{ {condition} }}") for _, name, condition in acls}


_WITH_BLOCKS: Final = [
    "access_rules",
    "limits",
    "counting",
    "request_log",
    "nova",
    "identity",
    "frontends",
    "backends",
]

CONSTANTS: Final[dict[str, Value]] = {
    **blocks_of(*map(read_template, _WITH_BLOCKS)),
    **_VALUES,
    **_policy(),
    **_conditions(),
}
"""Names that are equal in every configuration: the blocks of all templates, conditions and other values."""
