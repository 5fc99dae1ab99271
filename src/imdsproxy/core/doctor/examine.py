"""All checks over one crawl."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.doctor import checks_documents, checks_http
from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings, found

_FORBIDDEN: Final = 403
_OTHER_MAC: Final = "the guest has another MAC than the record that has its address"
_ORDER: Final = tuple(Severity)


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    if _refused(crawl):
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
    return tuple(sorted(findings, key=lambda one: _ORDER.index(one.severity)))


def _refused(crawl: Crawl) -> bool:
    answers = list(crawl.answers())
    return bool(answers) and all(answer.status == _FORBIDDEN for _, answer in answers)


def _refusal(around: Surroundings) -> Finding:
    why = "; ".join(around.why)
    if around.verdict == "mismatch":
        return found("mac-mismatch", clients=["every client: 403"], what=why or _OTHER_MAC)
    return found("refused", why=f": {why}" if why else "", mismatch=_OTHER_MAC)
