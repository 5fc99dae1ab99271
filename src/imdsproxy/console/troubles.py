"""List of problems with places and hints, built from the daemon's status."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_CLAIM_HINT: Final = "take the claim out of all records but one, or make the records equal"
_MISMATCH_HINT: Final = (
    "a guest uses an address that another's record has, or its record has an old MAC: compare them"
)
_FORGED_HINT: Final = (
    "the owner is served all the same; `imdsproxy status` has the MACs that claim it"
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Problem shown on the console.

    Attributes:
        level: `bad` if guests notice the problem, otherwise `warn`.
        where: Subject of the problem: a network, a source, a part of the daemon.
        kind: Kind of `where`; `network` and `instance` have pages.
        hint: Suggested fix; empty if not known.
    """

    level: str
    where: str
    what: str
    hint: str = ""
    kind: str = ""


def list_troubles(status: Mapping[str, Any]) -> list[Trouble]:
    """Return all problems; those that guests notice come first."""
    found = [*_daemon(status), *_networks(status), *_records(status), *_names(status)]
    return sorted(found, key=lambda one: one.level != "bad")


def _daemon(status: Mapping[str, Any]) -> Iterator[Trouble]:
    for reason in status["readiness"]["reasons"]:
        yield Trouble("bad", "readiness", reason, "guests may not get what the sources say")
    for part, name in (("haproxy", "HAProxy"), ("documents", "document server")):
        if status[part]["problem"]:
            hint = f"journalctl -u imdsproxy-{part}, or its log in the runtime directory"
            yield Trouble("bad", name, status[part]["problem"], hint)
    unix, audit = status["unix_listener"], status["audit"]
    if unix is not None and unix["problem"]:
        yield Trouble("bad", "unix listener", unix["problem"], unix["path"])
    if audit is not None and audit["problem"]:
        yield Trouble(
            "warn", "audit log", audit["problem"], "no lines are written until it is mended"
        )
    for one in status["problems"]:
        yield Trouble("warn", one["field"], one["reason"], one["hint"])
    for one in status["nova"]:
        if not one["up"]:
            yield Trouble("bad", f"Nova {one['endpoint']}", f"is down {one['reason']}".rstrip())
    plan = status["last_plan"]
    for failed in () if plan is None else plan["failed"]:
        yield Trouble("bad", "last plan", failed, "the controller retries it")


def _networks(status: Mapping[str, Any]) -> Iterator[Trouble]:
    for one in status["not_served"]:
        what = f"not served: {one['reason']} ({one['code']})"
        yield Trouble("bad", one["network"], what, one["hint"], "network")
    for network, count in status["macs"]["mismatches"].items():
        what = f"{count} requests with an address of one and the MAC of another"
        yield Trouble("warn", network, what, _MISMATCH_HINT, "network")
    for network, count in status["macs"]["forged_claims"].items():
        what = f"{count} claims by ARP or ND to an address that another MAC has"
        yield Trouble("warn", network, what, _FORGED_HINT, "network")
    for one in status["busiest"]:
        if one["limited"]:
            what = (
                f"exceeds its limits: {one['requests']} requests, {one['connections']} connections"
            )
            hint = "find the program that sends the requests; raise the limits if they are too low"
            yield Trouble("warn", one["instance"], what, hint, "instance")


def _records(status: Mapping[str, Any]) -> Iterator[Trouble]:
    for source in status["sources"]:
        where = f"source {source['name']}"
        if source["stale_s"]:
            what = f"has not answered for {source['stale_s']:.0f} s; its last records stay"
            yield Trouble("bad", where, what)
        elif not source["in_sync"]:
            yield Trouble("bad", where, "has not reported all its records yet")
        for one in source["problems"]:
            place = ":".join(str(part) for part in (one["file"], one["line"]) if part is not None)
            what = f"{one['field']} {one['reason']}"
            yield Trouble("bad", f"{where} {place}".strip(), what, one["hint"])
    for one in status["conflicts"]:
        claimants = ", ".join(
            " of ".join(filter(None, (each["instance"], each["source"])))
            for each in one["claimants"]
        )
        what = f"claimed by {claimants}; guests get 503"
        yield Trouble("bad", f"{one['kind']} {one['subject']}", what, _CLAIM_HINT)


def _names(status: Mapping[str, Any]) -> Iterator[Trouble]:
    for one in status["unmatched_policies"]:
        yield Trouble("warn", "policy", f"{one} is for a name that is not known", "mend the name")
    for one in status["warnings"]:
        yield Trouble(
            "warn", "documents", one, "give it a name that documents can have, where guests need it"
        )
