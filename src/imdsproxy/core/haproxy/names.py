"""What templates of every configuration may name: conditions of requests, and values.

The places of fields in records and in the policy word are here and nowhere else in these rules.
"""

from types import ModuleType
from typing import Final

from imdsproxy.core import path_rules, policy, tokens, wire
from imdsproxy.core import policy_word as layout
from imdsproxy.core.documents.tree import TEXT
from imdsproxy.core.haproxy import counting
from imdsproxy.core.haproxy.access_rules import ACCESS_RULES
from imdsproxy.core.haproxy.backends import BACKENDS
from imdsproxy.core.haproxy.counting import COUNTING_RULES
from imdsproxy.core.haproxy.frontends import FRONTENDS
from imdsproxy.core.haproxy.limits import LIMIT_RULES
from imdsproxy.core.haproxy.nova import NOVA_RULES
from imdsproxy.core.haproxy.request_log import LOG_RULES
from imdsproxy.core.haproxy.text import Block, Text, Value, blocks_of, fill, name_values
from imdsproxy.core.path_rules import WITHIN_OTHER_TREES
from imdsproxy.core.policy_word import POLICY_WORD, Field, Letter

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")

_GUEST_HEADERS: Final = (
    "accept|content-length|content-type|host|if-[a-z-]+|range|transfer-encoding|user-agent"
)
"""What of a guest's headers goes on, as a pattern of lower-case names; all else is deleted."""

_TOKEN_HEADERS: Final = f"{tokens.TOKEN_HEADER}|{tokens.TTL_HEADER}"
"""What goes on to our own processes beside; Nova has nothing to do with tokens."""

_CONDITIONS: Final = r"""
    # The record, without the policy word.
    acl known               var(txn.record) -m sub |
    acl of_nova             var(txn.record) -m beg <map_nova>
    acl in_conflict         var(txn.record) -m str <map_conflict>

    # The policy word.
    acl has_policy          var(txn.policy) -m found
    acl endpoint_off        var(txn.policy) -m beg <endpoint_off_word>
    acl only_tokens_off     var(txn.policy) -m beg <only_tokens_off_word>
    # A rate or a burst: then both global values are ignored.
    acl has_own_limits      var(txn.policy),field(<rate_field>,:,2) -m len gt 1

    # The record of a connection.
    acl connection_known    var(sess.record) -m sub |
    acl connection_has_policy var(sess.record) -m beg <policy_word>
    acl newcomer            var(sess.newcomer) -m found

    # The request.
    acl reads               method GET HEAD
    acl put                 method PUT
    acl repeatable          method GET HEAD OPTIONS
    # It comes through one of Neutron's proxies: `X-Forwarded-For` is that one's, and so are its packets.
    acl by_proxy            var(sess.router) -m found
    acl forwarded_for       req.fhdr_cnt(x-forwarded-for) gt 0
    # A guest's own programs send no such header: a browser or a proxy was made to ask (SSRF).
    acl forwarding_header   req.hdrs -m reg
        (?im)^(?:forwarded|via|origin|referer|sec-fetch-[^:]*|x-forwarded(?!-for:)[^:]*):
    acl own_host            req.fhdr(host) -m reg
        '(?i)^(?:169\.254\.169\.254|\[fe80::a9fe:a9fe(?:%[^\]]*)?\])?(?::80)?$'
    acl in_other_trees      path_beg <other_trees>

    # What rules have found of it.
    acl needs_check         var(txn.needs_check) -m found
    acl is_sampled          var(txn.needs_check) -m str sampled
    acl noncanonical        var(txn.noncanonical_path) -m found
    # What else begins so is nothing to Nova or to our documents.
    acl openstack           var(txn.path) -m beg /openstack
    acl nocloud             var(txn.path) -m beg /nocloud
    # As `core.policy.boot_is_over`.
    acl booting             var(txn.booting) -m int 1:<longest_boot_s>
    acl has_token           var(txn.token) -m found
    acl token_seen          var(txn.token_seen) -m found
    acl good_token          var(txn.seconds_left) -m found
    # It was good on this connection, in the same context. By parts: to put them together first costs as much again.
    acl same_token          var(txn.token),strcmp(sess.token) -m int 0
    acl same_context        <token_context>,strcmp(sess.token_context) -m int 0
    acl token_missing       var(txn.token_missing) -m found
    acl token_route         var(txn.token_route) -m found
    acl latest_token_path   var(txn.path) -m str <token_path> <token_path>/
    acl limited_hops        var(txn.hop_limit) -m int lt <unlimited>
    acl count_read          var(txn.count_read) -m found
    acl rewritten           var(txn.original_target) -m found
    acl has_short_document  var(txn.short_document) -m found
"""
"""Written into rules as anonymous conditions, `{ … }`."""


def _constants(*modules: ModuleType) -> dict[str, Value]:
    found = (item for module in modules for item in vars(module).items())
    return name_values({name: value for name, value in found if name.isupper()})


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
    # The path without escapes, doubled slashes and dot segments that lead to the same place.
    "canonical_path": r'path,url_dec,regsub("/(?:\.?/)*(?:\.$)?",/,g),regsub("^/ec2(?=/|$)","")',
    # All that a good token depends on, beside itself, its end and its key.
    "token_context": Text("var(txn.record),concat(|,txn.policy),concat(|,sess.network)"),
    # Of `KID.EXPIRY`, for whom a token is (`core.tokens`).
    "mac": Text(
        "concat(|,sess.network),concat(|,txn.instance),concat(|,txn.epoch),hmac(sha256,txn.key),ub64enc"
    ),
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
    """`policy_epoch` for the part `EPOCH` of the policy word, `policy_sealed_on` and `_off` for the letter `SEALED`."""
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
    acls = (line.split(maxsplit=2) for line in fill(_CONDITIONS, _VALUES))
    return {name: Text(f"{{ {condition} }}") for _, name, condition in acls}


CONSTANTS: Final[dict[str, Value]] = {
    **blocks_of(
        ACCESS_RULES, LIMIT_RULES, COUNTING_RULES, LOG_RULES, NOVA_RULES, FRONTENDS, BACKENDS
    ),
    **_VALUES,
    **_policy(),
    **_conditions(),
}
"""What is the same in every configuration: the blocks of all templates, conditions and other values."""
