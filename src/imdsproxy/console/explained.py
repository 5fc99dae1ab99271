"""Path of a guest's request to its answer, built from the daemon's explanation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

_HOW: Final[Mapping[str, str]] = {
    "address": "by an address of its port",
    "eui64": "by the link-local address of its MAC",
    "neighbour": "by its MAC, from the neighbour table",
    "router": "by its address behind the router",
}
_FOUND: Final = "found"
_ANY_MAC: Final = "*"


@dataclass(frozen=True, slots=True)
class Step:
    """Step on the path.

    Attributes:
        state: `good`, `bad`, or `plain` for neither.
        lines: Details, one sentence or value per line.
    """

    title: str
    name: str
    state: str = "plain"
    lines: tuple[str, ...] = ()


def spell_rule(value: object) -> str:
    """Return the value of a policy's rule in words."""
    match value:
        case None:
            return "as in the settings"
        case bool():
            return "on" if value else "off"
        case list():
            return ", ".join(map(str, value)) or "none"
        case _:
            return str(value)


def plan_path(found: Mapping[str, Any]) -> list[Step]:
    """Return the steps for one address, from the guest to the answer."""
    return list(_steps(found))


def _steps(found: Mapping[str, Any]) -> Iterator[Step]:
    pair = found["pair"]
    seen = None if pair is None else pair["seen"]
    yield Step("Guest", found["address"], lines=("last seen with MAC", seen) if seen else ())
    not_served = found["verdict"] in {"not-served", "no-network"}
    yield Step("Listener", found["network"], "bad" if not_served else "good", _listener(found))
    if pair is not None:
        yield _mac_filter(pair)
    installed = found["installed"]
    older = installed and found["revision"] and found["revision"] not in installed
    lines = ("of an older record",) if older else ()
    yield Step("HAProxy's map", _record_of(installed), "good" if installed else "bad", lines)
    yield _owner(found)
    if found["rules"] is not None:
        yield _policy(found["rules"])
    yield _answer(found)


def _listener(found: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(one for one in found["why"] if "listener" in one or one.startswith("network "))


def _mac_filter(pair: Mapping[str, Any]) -> Step:
    granted, expected = pair["granted"], pair["expected"]
    if granted == _ANY_MAC:
        return Step("MAC filter", "any MAC", "good", ("the record has no MAC",))
    if granted is not None:
        return Step("MAC filter", "one MAC only", "good", (granted,))
    lines = (f"the record has {expected}",) if expected not in {None, _ANY_MAC} else ()
    return Step("MAC filter", "no pair: asks the resolver", "plain", lines)


def _record_of(installed: str | None) -> str:
    """Return the instance in a map value, or a description of a value without instance."""
    if installed is None:
        return "nothing"
    if installed == "!":
        return "no instance: 503"
    # See `model.wire`: a policy word may come first, and the third word of Nova's records is the instance.
    words = installed.split("|")[1 if installed.startswith("+") else 0 :]
    return words[2] if words[0].startswith("@") else words[0]


def _owner(found: Mapping[str, Any]) -> Step:
    if found["instance"] is None:
        claimants = [f"{one['instance']} ({one['source']})" for one in found["claimants"]]
        name = "more than one" if claimants else found["verdict"]
        return Step("Instance", name, "bad", (*claimants, *found["why"][1:]))
    name = found["instance_name"] or found["instance"]
    how = (_HOW.get(found["how"] or "", ""), f"record of source {found['source']}")
    lines = how if found["source"] else tuple(found["why"][1:])
    good = found["verdict"] == _FOUND or bool(found["source"])
    return Step("Instance", name, "good" if good else "bad", tuple(filter(None, lines)))


def _policy(rules: Mapping[str, Any]) -> Step:
    own = [one for one in rules["rules"] if one["origin"] != "default"]
    lines = tuple(f"{one['name']}: {spell_rule(one['value'])} ({one['origin']})" for one in own)
    return Step("Policy", f"{len(own)} rules set" if own else "defaults", "plain", lines)


def _answer(found: Mapping[str, Any]) -> Step:
    probe, expected = found["probe"], found["answer"]
    status = probe["status"] if probe else expected
    if status is None:
        return Step("Answer", "Nova decides")
    known = {one.value: one.phrase for one in HTTPStatus}
    lines = (f"GET {probe['path']}",) if probe else ()
    good = status < HTTPStatus.BAD_REQUEST
    return Step("Answer", f"{status} {known.get(status, '')}", "good" if good else "bad", lines)
