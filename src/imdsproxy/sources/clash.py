"""Problems for people: which part of a record clashes with which other record."""

from __future__ import annotations

from collections.abc import Iterator

from imdsproxy.core.addresses import link_local_of
from imdsproxy.core.model import Instance
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.records import Path, render_path
from imdsproxy.errors import Problem
from imdsproxy.sources.in_force import Clash, Record


def claim_places(instance: Instance) -> Iterator[tuple[AddressKey, Path]]:
    """Each address that the record claims, and the part of the record that does so."""
    for number, port in enumerate(instance.ports):
        for index, address in enumerate(port.addresses):
            yield (port.network, address), ("ports", number, "addresses", index)
        if port.mac is not None:
            yield (port.network, link_local_of(port.mac)), ("ports", number, "mac")


def taken_address(
    instance: Instance,
    address: AddressKey,
    holder: str,
    *,
    path: Path = (),
    place: str = "",
    file: str | None = None,
    lines: tuple[int | None, ...] = (),
) -> Problem:
    """Why an instance is refused that claims an address of another.

    Args:
        instance: The refused one.
        address: What both claim.
        holder: The id of the instance that has it.
        path: Where the refused record is in its document.
        place: Where the other record is, if that is known.
        file: The file of the refused record.
        lines: The lines of its claims, in the order of `claim_places`.
    """
    network, shown = address
    part, line = _claim(instance, address, lines)
    what = f"{shown} in network {network}"
    if part and part[-1] == "mac":
        what = f"the MAC's link-local address {what}"
    where = f" ({place})" if place else ""
    return Problem(
        render_path((*path, *part)),
        f"{what} belongs to instance {holder}{where}",
        "give one of the two another, or remove one",
        file,
        line,
    )


def _claim(
    instance: Instance, address: AddressKey, lines: tuple[int | None, ...]
) -> tuple[Path, int | None]:
    for number, (claimed, part) in enumerate(claim_places(instance)):
        if claimed == address:
            return part, lines[number] if number < len(lines) else None
    return (), None


def taken_id(
    key: str, *, path: Path, place: str, file: str | None = None, line: int | None = None
) -> Problem:
    """Why a record is refused whose id another record has, at `place`."""
    return Problem(
        render_path((*path, "id")), f"{key} is also in {place}", "keep one of the two", file, line
    )


def clash_problems(
    clash: Clash[Record], instance: Instance | None, *, path: Path, place: str, file: str | None
) -> Iterator[Problem]:
    """Why an entry is refused: each address that another has, or its id.

    Args:
        clash: The entry and the other one.
        instance: The refused record, where it is an instance.
        path: Where it is in its document.
        place: Where the other record is.
        file: The file of the refused record.
    """
    entry = clash.entry
    if instance is None or not clash.addresses:
        yield taken_id(entry.id, path=path, place=place, file=file, line=entry.line)
        return
    for address in clash.addresses:
        yield taken_address(
            instance, address, clash.other.id, path=path, place=place, file=file, lines=entry.lines
        )
