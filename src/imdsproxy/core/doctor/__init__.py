"""A doctor for metadata servers: asks as the known clients do, and reports which of them would fail, and why.

`crawl` asks by a function that fetches. `examine` checks the answers, wherever they come from. What it may find stands
in findings.toml.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.doctor import checks_documents, checks_http
from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings, found

_FORBIDDEN: Final = 403
_OTHER_MAC: Final = "the guest has another MAC than the record that has its address"


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    if {answer.status for _, answer in crawl.answers()} == {_FORBIDDEN}:
        return (_refusal(around),)
    findings = [
        *checks_http.check_transport(crawl),
        *checks_documents.check_gate(crawl, around),
        *checks_documents.check_openstack(crawl),
        *checks_documents.check_network_data(crawl, around),
        *checks_http.check_listings(crawl),
        *checks_http.check_tokens(crawl),
        *checks_documents.check_nocloud(crawl),
        *checks_documents.check_user_data(crawl),
    ]
    order = list(Severity)
    return tuple(sorted(findings, key=lambda one: order.index(one.severity)))


def _refusal(around: Surroundings) -> Finding:
    why = "; ".join(around.why)
    if around.verdict == "mismatch":
        return found("mac-mismatch", clients=["every client: 403"], what=why or _OTHER_MAC)
    return found("refused", why=f": {why}" if why else "", mismatch=_OTHER_MAC)
