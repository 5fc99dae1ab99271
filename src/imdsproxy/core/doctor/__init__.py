"""A doctor for metadata servers: asks as the known clients do, and reports which of them would fail, and why.

`crawl` asks by a function that fetches. `examine` checks the answers, wherever they come from. What it may find stands
in findings.toml.
"""

from __future__ import annotations

from http import HTTPStatus

from imdsproxy.core.doctor import checks_documents, checks_http
from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings, found


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    if {answer.status for answer in crawl.asked.values()} - {0} == {HTTPStatus.FORBIDDEN}:
        why = "; ".join(around.why)
        if around.verdict == "mismatch":
            why = why or "the guest has another MAC than the record that has its address"
            return (found("mac-mismatch", case="refused", why=why),)
        return (found("refused", why=f": {why}" if why else ""),)
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
    return tuple(sorted(findings, key=lambda one: list(Severity).index(one.severity)))
