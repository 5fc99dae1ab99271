"""Network configuration against itself, and against the network cards that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.exchange import json_of
from imdsproxy.core.doctor.finding import Card, Finding, Severity, Surroundings

_MAC: Final = re.compile(r"\b[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}\b")
_VIRTUAL: Final = frozenset({"bond", "vlan"})
MAC_CHANGE: Final = (
    "give the record the MAC that the network card has, or the network card the record's "
    "(`imdsproxy snippet` prints it)"
)


def check_network_data(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """network_data.json, and the MACs in all dialects."""
    path = f"/openstack/{crawl.version}/network_data.json"
    document = json_of(crawl.said(path))
    links: list[Mapping[str, object]] = []
    if isinstance(document, Mapping):
        links = _objects(document.get("links"))
        yield from _consistent(document, links, path)
    if around.macs is not None:
        yield from _openstack_macs(links, around.macs, path)
        yield from _other_macs(crawl, around.macs)
    elif links:
        yield from _cards(around.cards, path)


def _objects(value: object) -> list[Mapping[str, object]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _consistent(
    document: Mapping[str, object], links: list[Mapping[str, object]], path: str
) -> Iterator[Finding]:
    ids = [link.get("id") for link in links]
    networks = _objects(document.get("networks"))
    lost = [one.get("link") for one in networks if one.get("link") not in ids]
    lost += [
        link.get("vlan_link")
        for link in links
        if link.get("type") == "vlan" and link.get("vlan_link") not in ids
    ]
    if lost:
        yield Finding(
            "link-missing",
            Severity.ERROR,
            f"network_data.json has a network on the link {lost[0]}, which it does not describe",
            "describe every link that a network or a VLAN lies on",
            ("cloud-init, which gives up the OpenStack documents",),
            (path,),
        )
    bare = [
        link.get("id")
        for link in links
        if link.get("type") not in _VIRTUAL and not link.get("ethernet_mac_address")
    ]
    if bare:
        yield Finding(
            "link-without-mac",
            Severity.ERROR,
            f"the link {bare[0]} in network_data.json has no MAC",
            "say ethernet_mac_address: it is what a network card is found by",
            ("cloud-init", "cloudbase-init"),
            (path,),
        )
    if len(set(ids)) < len(ids):
        yield Finding(
            "link-twice",
            Severity.ERROR,
            "two links in network_data.json have one id",
            "give each its own",
            ("cloud-init", "cloudbase-init"),
            (path,),
        )
    if not links and "links" in document:
        yield Finding(
            "network-data-empty",
            Severity.ERROR,
            "network_data.json is there and describes no link",
            "answer 404 when nothing is known: then cloud-init asks DHCP",
            ("cloud-init, which then configures no network card",),
            (path,),
        )


def _openstack_macs(
    links: list[Mapping[str, object]], macs: frozenset[str], path: str
) -> Iterator[Finding]:
    told = [
        str(link["ethernet_mac_address"]).lower()
        for link in links
        if link.get("type") not in _VIRTUAL and link.get("ethernet_mac_address")
    ]
    foreign = [mac for mac in told if mac not in macs]
    if foreign:
        yield Finding(
            "mac-mismatch",
            Severity.ERROR,
            f"network_data.json describes a network card {foreign[0]}, which the guest does not have "
            f"(it has {', '.join(sorted(macs)) or 'none'})",
            MAC_CHANGE,
            ("cloud-init, which gives up the OpenStack documents", "cloudbase-init"),
            (path,),
        )


def _cards(cards: tuple[Card, ...], path: str) -> Iterator[Finding]:
    """What the host knows of the record's network cards, while nobody looks into the guest."""
    met = any(card.mac in card.seen for card in cards)
    for card in cards:
        if card.seen and card.mac not in card.seen:
            yield Finding(
                "mac-mismatch",
                Severity.ERROR,
                f"network_data.json describes a network card {card.mac} in network {card.network}, and the guest "
                f"has {', '.join(sorted(card.seen))} at its address there",
                MAC_CHANGE,
                ("cloud-init, which gives up the OpenStack documents", "cloudbase-init"),
                (path,),
            )
        elif met and not card.seen:
            yield Finding(
                "card-unseen",
                Severity.WARNING,
                f"network_data.json describes a network card {card.mac} in network {card.network}; the host has met "
                "another one of the guest, and not this one",
                "see that the guest has it; if not, remove its port from the record",
                ("cloud-init, which gives up the OpenStack documents where the guest lacks it",),
                (path,),
            )


def _other_macs(crawl: Crawl, macs: frozenset[str]) -> Iterator[Finding]:
    paths = ["/nocloud/network-config"]
    paths += [path for path in crawl.listed if path.endswith("/network/interfaces/macs/")]
    paths.append(f"{crawl.base}/meta-data/mac")
    for path in paths:
        answer = crawl.said(path)
        told = {mac.lower() for mac in _MAC.findall(answer.text)} if answer and answer.ok else set()
        if told - macs:
            yield Finding(
                "mac-mismatch",
                Severity.ERROR if path.startswith("/nocloud") else Severity.WARNING,
                f"{min(told - macs)} is the MAC of no network card of the guest "
                f"(it has {', '.join(sorted(macs)) or 'none'})",
                MAC_CHANGE,
                ("cloud-init", "amazon-ec2-net-utils"),
                (path,),
            )
