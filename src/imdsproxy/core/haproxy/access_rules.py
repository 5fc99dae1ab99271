"""What a guest may read, in HAProxy's rules: the policy word, session tokens, hop limits, sealed user-data.

Rules look at a copy of the path in which everything is undone that Nova or our documents undo: escapes, doubled
slashes, dot segments that lead nowhere, `/ec2` before a version. What of a path is ambiguous beyond that is
refused where a rule could be passed by it. The path itself goes on as it came.

A request that has no token, and whose record has no policy word, does not come here: `note_checks` sends the others to
backends of their own.
"""

from typing import Final

ACCESS_RULES: Final = r"""
read_policy:
    # From the record as the map has it to `txn.policy`, where it has one, and `txn.record` without it.
    http-request set-var(txn.policy) var(txn.record),field(1,|) if { var(txn.record) -m beg <policy_word> }
    http-request set-var(txn.record) var(txn.record),field(2,|,0) if <has_policy>
note_checks:
    # Whether there is anything to check of a request, after the look-up: then a checked backend answers it.
    #
    # Most often there is not, so no more than this is in everybody's way. In each condition comes first what is most
    # often not so.
    http-request set-var(txn.token) req.fhdr(<token_header>)
    # A PUT asks for a token, or for nothing that there is.
    http-request set-var(txn.needs_check) bool(true)
        if <has_policy> or <has_token> <known> or <put> <known> or { path <token_path> } <known>
show_token_life:
    # Each answer to a good token has the seconds that it is still valid, as EC2's have.
    http-after-response set-header <ttl_header> %[var(txn.seconds_left)] if { var(txn.seconds_left) -m int gt 0 }
skip_checks:
    # What need not be checked after all, for the frontends that answer out of the cache: there a backend costs a third.
    # A token that was good on this connection, for the same record and under the same policy.
    http-request set-var(txn.seconds_left) date,neg,add(sess.until) if <has_token> <same_token> <same_context>
    http-request unset-var(txn.needs_check)
        if { var(txn.seconds_left) -m int gt 0 } <reads> !{ path <token_path> } <without_own_limits>
        { var(txn.token),bytes(0,8),map_str(<token_keys_map>) -m found } { req.fhdr_cnt(<token_header>) 1 }
    # Tokens are off, and nothing else is configured.
    http-request unset-var(txn.needs_check)
        if <needs_check> <only_tokens_off> <reads> !{ path <token_path> } <without_own_limits>
check:
    # Refuse, give a token, or let pass.
    <policy_share>
    <show_token_life>
    [audited] http-request set-var(txn.refused) str(endpoint)
    http-request return status 403 if <endpoint_off>
    [audited] http-request set-var(txn.refused) str(path)
    http-request set-var(txn.noncanonical_path) bool(true) if { path -m reg '%|//|/\.|^/ec2' }
    http-request set-var(txn.path) path if !<noncanonical>
    http-request set-var(txn.path) <canonical_path> if <noncanonical>
    # Nothing that there is has such a path: its sender tries to pass by a rule.
    http-request return status 400 if <noncanonical> <has_policy> !{ var(txn.path) -m found }
    http-request return status 400 if <noncanonical> <has_policy> { var(txn.path) -m reg '(?:^|/)\.\.(?:/|$)' }
    http-request return status 400 if <noncanonical> <has_policy> { path -m sub %00 }
    # A token is `KID.EXPIRY.MAC` (`core.tokens`).
    http-request unset-var(txn.seconds_left)
    # While there is no token route a token is a header like any other.
    http-request unset-var(txn.token) if <has_token> <policy_token_route_off>
    [audited] http-request set-var(txn.refused) str(token)
    [audited] http-request unset-var(txn.auth)
    [audited] http-request set-var(txn.auth) str(bad) if <has_token>
    http-request return status 401 if <has_token> !{ req.fhdr_cnt(<token_header>) 1 }
    http-request set-var(txn.key) var(txn.token),bytes(0,8),map_str(<token_keys_map>) if <has_token>
    # Also of one that was good before: its key may have been removed.
    http-request return status 401 if <has_token> !{ var(txn.key) -m found }
    # What was good on this connection, for the same record and under the same policy, still is, but for its end.
    http-request set-var(txn.token_seen) bool(true) if <has_token> <same_token> <same_context>
    # All of it: what is cut out below proves nothing of what stands behind.
    http-request return status 401 if <has_token> !<token_seen> !{ var(txn.token) -m reg <token_pattern> }
    http-request set-var(txn.instance) <instance> if <has_token> !<token_seen>
    http-request set-var(txn.instance) <instance_of_nova> if <has_token> !<token_seen> <of_nova>
    http-request set-var(txn.epoch) <policy_epoch> if <has_token> !<token_seen> <has_policy>
    http-request set-var(txn.mac) var(txn.token),bytes(0,19),<mac> if <has_token> !<token_seen>
    http-request return status 401 if <has_token> !<token_seen> !{ var(txn.token),bytes(20),secure_memcmp(txn.mac) }
    http-request set-var(txn.now) date if <has_token>
    http-request set-var(txn.lifetime) var(txn.token),field(2,.),sub(txn.now) if <has_token>
    http-request return status 401 if <has_token> { var(txn.lifetime) -m int le 0 }
    http-request set-var(txn.seconds_left) var(txn.lifetime) if <has_token>
    [audited] http-request set-var(txn.auth) str(yes) if <has_token>
    # `skip_checks` lets it pass from now on, so nothing else may be left to check.
    http-request set-var(sess.token) var(txn.token) if <token_may_stay>
    http-request set-var(sess.token_context) <token_context> if <token_may_stay>
    http-request set-var(sess.until) var(txn.token),field(2,.),add(0) if <token_may_stay>
    # The token that was given on this connection has arrived: see below.
    http-request set-fc-tos 0 if <good_token> { var(txn.mac),strcmp(sess.token_given) eq 0 }
    http-request set-var(txn.token_route) bool(true) if { var(txn.path) -m end /api/token /api/token/ }
    # A page that has its own name lead here (DNS rebinding) may send any header and any method.
    <refuse_forwarded(token_route)>
    [audited] http-request set-var(txn.refused) str(token-request)
    http-request return status 404 if <token_route> <policy_token_route_off>
    # Under a dated version there is none (AWS).
    http-request return status 403 if <token_route> <put> !<latest_token_path>
    http-request return status 404 if <token_route> !<latest_token_path>
    http-request return status 405 hdr Allow PUT if <token_route> !<put>
    # A proxy that was made to fetch a token would be made to fetch the rest as well.
    http-request return status 403 if <token_route> { var(txn.forwarded_for) -m found }
    http-request return status 403 if <token_route> <forwarded_for> !<by_proxy>
    http-request return status 400 if <token_route> !{ req.fhdr_cnt(<ttl_header>) 1 }
    http-request return status 400 if <token_route> !{ req.fhdr(<ttl_header>) -m reg '^[0-9]{1,5}$' }
    http-request return status 400 if <token_route> !{ req.fhdr(<ttl_header>) -m int 1:<ttl_limit_s> }
    http-request set-var(txn.instance) <instance> if <token_route>
    http-request set-var(txn.instance) <instance_of_nova> if <token_route> <of_nova>
    http-request set-var(txn.epoch) <policy_epoch> if <token_route> <has_policy>
    http-request set-var(txn.ttl) req.fhdr(<ttl_header>),add(0) if <token_route>
    http-request set-var(txn.until) date,add(txn.ttl) if <token_route>
    http-request set-var(txn.kid) str(<current>),map_str(<token_keys_map>) if <token_route>
    http-request set-var(txn.key) var(txn.kid),map_str(<token_keys_map>) if <token_route>
    http-request set-var(txn.token_head) var(txn.kid),concat(.,txn.until) if <token_route>
    http-request set-var(txn.mac) var(txn.token_head),<mac> if <token_route>
    # A DSCP of which the kernel makes the hop limit (`core.wire`). The kernel sends what got lost once more with the
    # DSCP that the connection has by then. So it stays until the guest has shown the token that it got on the
    # connection: then all of that answer has arrived. Until then, other answers on the connection go no farther than
    # the token. Another request on it proves less: a client that is too far away can send one too. Nor does
    # `fc_unacked`, which counts what was sent, and not what waits for the peer's window. Behind Neutron's proxies
    # nothing is done: its packets are not ours.
    http-request set-var(txn.hop_limit) <policy_hop_limit> if <token_route> <has_policy> !<by_proxy>
    # The guest's connection is another one than the resolver's. By its next request it is known.
    http-request return <status_503> if <token_route> { var(sess.from_resolver) -m found } <limited_hops>
    http-request return <status_503> if <token_route> { var(txn.hop_limit) -m int <withheld> }
    http-request set-var(txn.hop_limit) int(<next_to_mark>) if <token_route> { var(txn.hop_limit) -m int <answer_dscp> }
    # The low two bits of the byte are not the DSCP's.
    http-request set-fc-tos var(txn.hop_limit),mul(4) if <token_route> <limited_hops>
    http-request set-var(sess.token_given) var(txn.mac) if <token_route> <limited_hops>
    [audited] http-request unset-var(txn.refused) if <token_route> { var(txn.mac) -m found }
    http-request return status 200 content-type text/plain
        hdr <ttl_header> %[var(txn.ttl)] lf-string %[var(txn.token_head)].%[var(txn.mac)]
        if <token_route> { var(txn.mac) -m found }
    # No key is known: the map is written before any configuration, so it was removed since.
    [audited] http-request set-var(txn.refused) str(no-key)
    http-request return <status_503> if <token_route>
    http-request set-var(txn.rule_set) <policy_path_set> if <policy_has_paths_on>
    # As `core.path_rules.plain_path`.
    http-request set-var(txn.plain_path)
        'var(txn.path),regsub("^/openstack/(?!content(?:/|$))[^/]+",/openstack/latest),regsub("^/(?!(?:openstack|nocloud)(?:/|$))[^/]+",/latest)'
        if { var(txn.rule_set) -m found }
    # Where the request has no path at all, the rule for `/` applies.
    http-request set-var(txn.path_rule) var(txn.rule_set),concat(|,txn.plain_path,/),map_beg(<path_rules_map>)
        if { var(txn.rule_set) -m found }
    # Each set has a rule for `/`. It is written before any record refers to it, so it was removed since.
    [audited] http-request set-var(txn.refused) str(no-path-rules)
    http-request return <status_503> if { var(txn.rule_set) -m found } !{ var(txn.path_rule) -m found }
    [audited] http-request set-var(txn.refused) str(path-denied)
    http-request return status 403 if { var(txn.path_rule) -m str d }
    http-request set-var(txn.now) date if <has_policy> <policy_boot_counts_on>
    http-request set-var(txn.booting) <policy_boot_end>,sub(txn.now) if <has_policy> <policy_boot_counts_on>
    [audited] http-request set-var(txn.refused) str(token-required)
    <require_token> if <has_policy> !<good_token> <policy_tokens_on> !<openstack> !<nocloud>
    <require_token> if <has_policy> !<good_token> !<booting> <policy_openstack_tokens_on> <openstack>
    <require_token> if <has_policy> !<good_token> !<booting> <policy_nocloud_tokens_on> <nocloud>
    http-request unset-var(txn.token_missing) if { var(txn.path_rule) -m str o }
    <require_token> if { var(txn.path_rule) -m str r } !<good_token> !{ var(txn.path) -m beg <other_trees> }
    <require_token> if { var(txn.path_rule) -m str r } !<good_token> { var(txn.path) -m beg <other_trees> } !<booting>
    <count_in_passing>
    [audited] http-request set-var(txn.refused) str(path-required) if { var(txn.path_rule) -m str r }
    http-request return status 401 if <token_missing>
    <refuse_forwarded(has_policy)>
    [audited] http-request set-var(txn.refused) str(sealed)
    http-request return status 403 if !<booting> <policy_sealed_on>
        { var(txn.path) -m reg '^/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)' }
    [audited] http-request unset-var(txn.refused)
require_token:
    http-request set-var(txn.token_missing) bool(true)
token_may_stay:
    <has_token> !<token_seen> !<policy_sealed_on> !<policy_has_paths_on>
refuse_forwarded:
    [audited] http-request set-var(txn.refused) str(forwarded)
    http-request return status 403 if <argument> !<good_token> <policy_forwarded_on> { var(txn.forwarded) -m found }
    http-request return status 403 if <argument> !<good_token> <policy_forwarded_on> <forwarding_header>
    http-request return status 403 if <argument> !<good_token> <policy_forwarded_on> !<own_host>
    http-request return status 403 if <argument> !<good_token> <policy_forwarded_on> <forwarded_for> !<by_proxy>
note_forwarding:
    # Signs of forwarding in the guest's headers, noted for the resolver before these are deleted.
    http-request set-var(txn.forwarded) bool(true) if <forwarding_header>
    http-request set-var(txn.forwarded) bool(true) if !<own_host>
    http-request set-var(txn.forwarded) bool(true) if <forwarded_for> !<by_proxy>
    http-request set-var(txn.forwarded_for) bool(true) if <put> <forwarded_for> !<by_proxy>
send_forwarding:
    # What `NOTE_FORWARDING` has found, once the guest's headers are deleted.
    http-request set-header <header_forwarded> by if { var(txn.forwarded) -m found }
    http-request set-header <header_forwarded> for if { var(txn.forwarded_for) -m found }
read_forwarding:
    # The reverse, where a request comes back from the resolver.
    http-request set-var(txn.forwarded) bool(true) if { req.fhdr(<header_forwarded>) -m found }
    http-request set-var(txn.forwarded_for) bool(true) if { req.fhdr(<header_forwarded>) -m str for }
refuse_forwarded_token:
    # Refuse a request for a token that another program forwarded, however its path is spelled.
    #
    # For listeners that delete `X-Forwarded-For`, or can't attribute a request that has two. The argument is the
    # condition.
    http-request set-var(txn.path) <canonical_path> if <put>
    http-request return status 403 if <put> <argument> { var(txn.path) -m end /api/token /api/token/ }
"""
