"""All checks over one crawl."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings
from imdsproxy.core.doctor.gate import check_gate
from imdsproxy.core.doctor.listings import check_listings
from imdsproxy.core.doctor.network_data import check_network_data
from imdsproxy.core.doctor.nocloud import check_nocloud
from imdsproxy.core.doctor.openstack import check_openstack
from imdsproxy.core.doctor.tokens import check_tokens
from imdsproxy.core.doctor.transport import check_transport
from imdsproxy.core.doctor.user_data import check_user_data

__all__ = ["examine"]

_ORDER: Final = tuple(Severity)


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    findings = [
        *check_transport(crawl),
        *check_gate(crawl, around),
        *check_openstack(crawl),
        *check_network_data(crawl, around),
        *check_listings(crawl),
        *check_tokens(crawl),
        *check_nocloud(crawl),
        *check_user_data(crawl),
    ]
    return tuple(sorted(findings, key=lambda one: _ORDER.index(one.severity)))
