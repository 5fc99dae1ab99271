"""Hypothesis strategies for valid networks and instances."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import strategies as st

from imdsproxy.model.entities import (
    METADATA_IPV6,
    BridgeListener,
    Dialect,
    Instance,
    InstanceId,
    InterfaceListener,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    Scope,
    SshKey,
    Subnet,
    Upstream,
)
from imdsproxy.model.path_rules import PathRules, PathWord, find_path_fault
from imdsproxy.model.policy import RULES, PolicyRules, TokenMode

ids = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
devices = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._@+=-]{0,14}\Z")
namespaces = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._@:+-]{0,127}\Z")
macs = st.integers(0, 2**48 - 1).map(
    lambda number: MacAddress(((number & ~(1 << 40)) or 1).to_bytes(6, "big").hex(":"))
)
ipv4 = st.integers(0x0A000000, 0x0AFFFFFF).map(IPv4Address)
ipv6 = st.one_of(
    st.integers(0x20010DB8 << 96, (0x20010DB9 << 96) - 1).map(IPv6Address),
    st.integers(0xFE80 << 112, (0xFE80 << 112) + 2**64 - 1)
    .map(IPv6Address)
    .filter(lambda address: address != METADATA_IPV6),
)
printable = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
texts = st.text(printable, min_size=1, max_size=40).filter(lambda text: text == text.strip())
maybe_texts = st.none() | texts
names = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="=/"))

_cidrs = st.integers(0, 0xFFFF).map(
    lambda number: IPv4Network((0x0A000000 | number << 8, 24))
) | st.integers(0, 0xFFFF).map(lambda number: IPv6Network((0x20010DB8 << 96 | number << 64, 64)))
_subnets = _cidrs.flatmap(
    lambda cidr: st.builds(
        Subnet,
        st.just(cidr),
        st.none() | (ipv4 if cidr.version == 4 else ipv6),
        st.lists(ipv4 | ipv6, max_size=2).map(tuple),
    )
)
_listeners = st.one_of(
    st.builds(BridgeListener, devices),
    st.builds(InterfaceListener, devices),
    st.builds(NamespaceListener, namespaces, st.none() | devices),
    st.builds(NamespaceListener, namespaces, devices, st.booleans()),
)
_trees = st.sampled_from(
    ("", "/latest", "/openstack", "/openstack/latest", "/openstack/content", "/nocloud")
)
_path_names = st.sampled_from(
    ("user-data", "meta-data", "user_data", "x", "0", "02:00", "a+b=c,d@e", "..x")
)
rule_paths = st.builds(
    lambda tree, names: "".join((tree, *(f"/{name}" for name in names))) or "/",
    _trees,
    st.lists(_path_names, max_size=3),
).filter(lambda path: find_path_fault(path) is None)
"""What path rules can be for; few names, so that some are beneath others."""

path_rules: st.SearchStrategy[PathRules] = st.dictionaries(
    rule_paths, st.sampled_from(PathWord), max_size=6
).map(lambda rules: tuple(sorted(rules.items())))
_KINDS: dict[type[object], st.SearchStrategy[object]] = {
    bool: st.none() | st.booleans(),
    TokenMode: st.none() | st.sampled_from(TokenMode),
    tuple: path_rules.map(lambda rules: rules or None),
    list: st.none()
    | st.sets(st.sampled_from(["vault", "keystone", "s3"])).map(lambda names: tuple(sorted(names))),
}
policies = st.builds(
    PolicyRules,
    **{
        rule.name: st.none() | st.integers(*rule.bounds) if rule.bounds else _KINDS[rule.kind]
        for rule in RULES.values()
    },
)
networks = st.builds(
    Network,
    ids.map(NetworkId),
    _listeners,
    st.just("") | texts,
    maybe_texts,
    st.lists(_subnets, max_size=3, unique_by=lambda one: one.cidr).map(tuple),
    st.none() | st.integers(68, 65535),
    st.sampled_from(Scope),
    policy=policies,
)


@st.composite
def _ports(draw: st.DrawFn) -> tuple[Port, ...]:
    addresses = draw(st.lists(ipv4 | ipv6, max_size=6, unique=True))
    mac_list = draw(st.lists(macs, max_size=3, unique=True))
    ports = []
    while addresses or mac_list:
        count = draw(st.integers(0, len(addresses)))
        taken, addresses = addresses[:count], addresses[count:]
        mac = mac_list.pop() if mac_list else None
        project = draw(st.none() | ids)
        ports.append(Port(NetworkId(draw(ids)), mac, tuple(taken), project))
        if not count and mac is None:
            break
    return tuple(ports)


@st.composite
def _ssh_keys(draw: st.DrawFn) -> tuple[SshKey, ...]:
    chosen = draw(st.lists(names.filter(lambda name: 0 < len(name) < 40), max_size=3, unique=True))
    return tuple(
        SshKey(
            name,
            "ssh-ed25519 "
            + draw(st.from_regex(r"\A[A-Za-z0-9+/]{1,40}={0,2}\Z"))
            + draw(st.just("") | texts.map(lambda comment: f" {comment}")),
        )
        for name in chosen
    )


_common: dict[str, st.SearchStrategy[object]] = {
    "id": ids.map(InstanceId),
    "name": texts,
    "ports": _ports(),
    "policy": policies,
    "created_at": st.none() | st.integers(0, 9_999_999_999),
}
_nova_instances = st.builds(
    Instance, **_common, hostname=st.just("host"), project=ids, upstream=st.just(Upstream.NOVA)
)
embedded_instances = st.builds(
    Instance,
    **_common,
    hostname=st.from_regex(r"\A[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{1,10}){0,2}\Z"),
    project=maybe_texts,
    ssh_keys=_ssh_keys(),
    tags=st.dictionaries(texts, st.text(printable, max_size=20), max_size=3).map(
        lambda tags: tuple(sorted(tags.items()))
    ),
    user_data=st.none() | st.binary(max_size=60) | texts.map(str.encode),
    vendor_data=st.none() | st.text(st.characters(codec="utf-8")).map(str.encode),
    availability_zone=maybe_texts,
    instance_type=maybe_texts,
    dialects=st.frozensets(st.sampled_from(Dialect)),
)
instances = embedded_instances | _nova_instances
