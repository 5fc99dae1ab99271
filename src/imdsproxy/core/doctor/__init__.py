"""A doctor for metadata servers: asks as the known clients do, and reports which of them would fail, and why.

`crawl` is a generator of questions; `run_crawl` drives it with a function that fetches. `examine` checks the answers,
wherever they come from. What it may find stands in findings.toml.
"""

from __future__ import annotations

from imdsproxy.core.doctor.crawl import Crawl, crawl, run_crawl
from imdsproxy.core.doctor.examine import examine
from imdsproxy.core.doctor.exchange import Answer, Answered, Ask, Exchange, Framing, Unanswered
from imdsproxy.core.doctor.finding import Card, Finding, Severity, Surroundings

__all__ = [
    "Answer",
    "Answered",
    "Ask",
    "Card",
    "Crawl",
    "Exchange",
    "Finding",
    "Framing",
    "Severity",
    "Surroundings",
    "Unanswered",
    "crawl",
    "examine",
    "run_crawl",
]
