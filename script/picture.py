"""Write the picture of a guest's request, light and dark, to docs/images, from the text in `PICTURE`.

Run the script after a change; an argument replaces the directory docs/images.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

PICTURE: Final = """\
title A guest's request for its metadata
desc Guests of any network ask 169.254.169.254. HAProxy knows each by its network, address and MAC,
 and answers from its cache. What is missing there comes from the document server or from Nova.
 A guest that is not known yet is looked up once.

zone 0 0 206 322 guests
zone 240 0 546 322 the host
zone 806 0 204 322 elsewhere

box blue 16 56 174 62 in network “blue”
 10.0.0.11
box red 16 146 174 62 in network “red”
 10.0.0.11, too
box green 16 236 174 62 in network “green”
 any address by DHCP
box haproxy 256 56 250 242 HAProxy, one for all

 Who asks? By network,
 address and MAC.

 May it? By token, path
 and number of requests.

 Answers from its cache.
box documents 612 56 158 62 document server
 EC2, OpenStack, …
box controller 612 236 158 62 controller
 store, files, libvirt
box nova 822 146 172 62 Nova
 its metadata API
box neutron 822 236 172 62 Neutron
 its API

arrow blue haproxy 87 GET
arrow red haproxy 177 GET
arrow green haproxy 267 GET
arrow haproxy documents 87 not cached
arrow haproxy nova 177 Nova's documents: signed, byte for byte
arrow haproxy controller 258 who is it?
arrow controller haproxy 284 records
arrow controller neutron 267 asks
"""
"""`title`, `desc`, then `zone LEFT TOP WIDTH HEIGHT TITLE`, `box NAME LEFT TOP WIDTH HEIGHT TITLE`, and `arrow FROM TO
HEIGHT LABEL`. An indented or empty line continues the statement above. Sizes are in pixels.
"""

COLOURS: Final[Mapping[str, Mapping[str, str]]] = {
    "light": {"back": "#ffffff", "zone": "#f2f4f8", "box": "#ffffff", "edge": "#8a94a6"}
    | {"text": "#1b2130", "soft": "#525c70", "line": "#1f5fbf"},
    "dark": {"back": "#14171c", "zone": "#1d222a", "box": "#2a313c", "edge": "#6b7688"}
    | {"text": "#eef1f6", "soft": "#b3bccb", "line": "#7db4ff"},
}
_SIZE: Final = (1010, 322)
_LINE: Final = 19


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle and the lines in it."""

    left: int
    top: int
    width: int
    height: int
    lines: list[str] = field(default_factory=list, kw_only=True)


def render(picture: str, colours: Mapping[str, str]) -> str:
    """Render the picture as SVG, with a colour for each of the words in `COLOURS`."""
    boxes: dict[str, Box] = {}
    drawn: list[str] = []
    for kind, first, *more in _statements(picture):
        words = first.split(" ")
        if kind in ("title", "desc"):
            text = " ".join([first, *more])
            drawn.append(f'<{kind} id="{kind}">{escape(text)}</{kind}>')
        elif kind == "zone":
            zone = Box(*map(int, words[:4]))
            drawn.append(_rectangle(zone, colours["zone"], "none", radius=12))
            place = f'x="{zone.left + 18}" y="34" font-size="13"'
            drawn.append(_text(place, " ".join(words[4:]), colours["soft"]))
        elif kind == "box":
            boxes[words[0]] = Box(*map(int, words[1:5]), lines=[" ".join(words[5:]), *more])
            drawn += _box(boxes[words[0]], colours)
        elif kind == "arrow":
            ends = (boxes[words[0]], boxes[words[1]])
            drawn += _arrow(ends, int(words[2]), " ".join(words[3:]), colours)
    width, height = _SIZE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="title desc" font-family="system-ui, sans-serif">'
    )
    # The page may have colours for the other theme, which the reader chose.
    back = _rectangle(Box(0, 0, *_SIZE), colours["back"], "none", radius=12)
    return "\n".join([head, back, *drawn, "</svg>", ""])


def _statements(picture: str) -> Iterator[list[str]]:
    """Yield for each statement its first word, the rest of its line, and its continuation lines."""
    statements: list[list[str]] = []
    for line in picture.splitlines():
        if line and not line.startswith(" "):
            statements.append(line.split(" ", 1))
        else:
            statements[-1].append(line.strip())
    for statement in statements:
        while not statement[-1]:
            statement.pop()
        yield statement


def _box(box: Box, colours: Mapping[str, str]) -> Iterator[str]:
    yield _rectangle(box, colours["box"], colours["edge"], radius=8)
    top = box.top + (box.height - _LINE * len(box.lines)) // 2 + 15
    for number, line in enumerate(box.lines):
        place = f'x="{box.left + 14}" y="{top + number * _LINE}" font-size="14"'
        if number == 0:
            yield _text(f'{place} font-weight="600"', line, colours["text"])
        elif line:
            yield _text(place, line, colours["soft"])


def _arrow(
    ends: tuple[Box, Box], height: int, label: str, colours: Mapping[str, str]
) -> Iterator[str]:
    """Draw an arrow from the first box to the second, with its label above the line."""
    start, end = ends
    if start.left < end.left:
        tail, tip, step = start.left + start.width, end.left, -7
    else:
        tail, tip, step = start.left, end.left + end.width, 7
    colour = colours["line"]
    yield f'<path d="M{tail} {height}H{tip + step}" stroke="{colour}" stroke-width="2"/>'
    yield f'<path d="M{tip} {height}l{step} -5v10z" fill="{colour}"/>'
    place = f'x="{(tail + tip) // 2}" y="{height - 6}" font-size="12" text-anchor="middle"'
    yield _text(place, label, colours["soft"])


def _rectangle(box: Box, fill: str, edge: str, *, radius: int) -> str:
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" '
        f'rx="{radius}" fill="{fill}" stroke="{edge}"/>'
    )


def _text(place: str, text: str, colour: str) -> str:
    return f'<text {place} fill="{colour}">{escape(text)}</text>'


def write_all(directory: Path) -> None:
    """Write the picture in each set of colours."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, colours in COLOURS.items():
        (directory / f"request-{name}.svg").write_text(render(PICTURE, colours), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(*sys.argv[1:2] or ["docs/images"]))
