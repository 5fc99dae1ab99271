"""All checks over one crawl."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings
from imdsproxy.core.doctor.gate import check_gate
from imdsproxy.core.doctor.listings import check_listings
from imdsproxy.core.doctor.network_data import MAC_CHANGE, check_network_data
from imdsproxy.core.doctor.nocloud import check_nocloud
from imdsproxy.core.doctor.openstack import check_openstack
from imdsproxy.core.doctor.tokens import check_tokens
from imdsproxy.core.doctor.transport import check_transport
from imdsproxy.core.doctor.user_data import check_user_data

_FORBIDDEN: Final = 403
_OTHER_MAC: Final = "the guest has another MAC than the record that has its address"
_ORDER: Final = tuple(Severity)


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    if _refused(crawl):
        return (_refusal(around),)
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


def _refused(crawl: Crawl) -> bool:
    answers = list(crawl.answers())
    return bool(answers) and all(answer.status == _FORBIDDEN for _, answer in answers)


def _refusal(around: Surroundings) -> Finding:
    told = "; ".join(around.why)
    if around.verdict == "mismatch":
        return Finding(
            "mac-mismatch", Severity.ERROR, told or _OTHER_MAC, MAC_CHANGE, ("every client: 403",)
        )
    return Finding(
        "refused",
        Severity.ERROR,
        "every question is answered 403" + (f": {told}" if told else ""),
        "see on the host why: `imdsproxy explain --network NET --from ADDRESS`; imdsproxy answers so where "
        f"{_OTHER_MAC}",
        ("every client",),
    )
