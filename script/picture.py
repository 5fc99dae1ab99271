"""Write the pictures of the documents, light and dark, to docs/images: each is made of a text in script/pictures.

Run it after a change of a text; with an argument it writes to that directory instead of docs/images.

A text has `size WIDTH HEIGHT`, `title` and `desc`, then `zone LEFT TOP WIDTH HEIGHT TITLE`, `box NAME LEFT TOP WIDTH
HEIGHT TITLE`, `arrow FROM TO HEIGHT LABEL` (level), `down FROM TO LEFT LABEL` (upright, either way), and `note LEFT TOP
TEXT`. A line that is indented or empty continues the statement above it. Sizes are in pixels.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

_TEXTS: Final = Path(__file__).with_name("pictures")

COLOURS: Final[Mapping[str, Mapping[str, str]]] = {
    "light": {"back": "#ffffff", "zone": "#f2f4f8", "box": "#ffffff", "edge": "#8a94a6"}
    | {"text": "#1b2130", "soft": "#525c70", "line": "#1f5fbf"},
    "dark": {"back": "#14171c", "zone": "#1d222a", "box": "#2a313c", "edge": "#6b7688"}
    | {"text": "#eef1f6", "soft": "#b3bccb", "line": "#7db4ff"},
}
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
    """Render a picture as SVG, with a colour for each of the words in `COLOURS`."""
    boxes: dict[str, Box] = {}
    drawn: list[str] = []
    size = (0, 0)
    for kind, first, *more in _statements(picture):
        words = first.split(" ")
        if kind == "size":
            size = (int(words[0]), int(words[1]))
        elif kind in ("title", "desc"):
            text = " ".join([first, *more])
            drawn.append(f'<{kind} id="{kind}">{escape(text)}</{kind}>')
        elif kind == "zone":
            zone = Box(*map(int, words[:4]))
            drawn.append(_rectangle(zone, colours["zone"], "none", radius=12))
            place = f'x="{zone.left + 18}" y="{zone.top + 34}" font-size="13"'
            drawn.append(_text(place, " ".join(words[4:]), colours["soft"]))
        elif kind == "note":
            place = f'x="{words[0]}" y="{words[1]}" font-size="13"'
            drawn.append(_text(place, " ".join(words[2:]), colours["soft"]))
        elif kind == "box":
            boxes[words[0]] = Box(*map(int, words[1:5]), lines=[" ".join(words[5:]), *more])
            drawn += _box(boxes[words[0]], colours)
        else:
            draw = {"arrow": _arrow, "down": _upright_arrow}[kind]
            ends = (boxes[words[0]], boxes[words[1]])
            drawn += draw(ends, int(words[2]), " ".join(words[3:]), colours)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-labelledby="title desc" font-family="system-ui, sans-serif">'
    )
    # A reader may have chosen the other colours for the page.
    back = _rectangle(Box(0, 0, *size), colours["back"], "none", radius=12)
    return "\n".join([head, back, *drawn, "</svg>", ""])


def _statements(picture: str) -> Iterator[list[str]]:
    """Split a text into statements: the first word, the rest of its line, and the lines that continue it."""
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


def _span(start: tuple[int, int], end: tuple[int, int]) -> tuple[int, int, int]:
    """Return tail, tip and the tip's length, with its sign, of an arrow between two boxes.

    Args:
        start: Left or upper edge of the first box, and its size in this direction.
        end: The same of the second box.
    """
    if start[0] < end[0]:
        return sum(start), end[0], -7
    return start[0], sum(end), 7


def _arrow(
    ends: tuple[Box, Box], height: int, label: str, colours: Mapping[str, str]
) -> Iterator[str]:
    """Draw a level arrow between two boxes, with its label above the line."""
    start, end = ends
    tail, tip, step = _span((start.left, start.width), (end.left, end.width))
    colour = colours["line"]
    yield f'<path d="M{tail} {height}H{tip + step}" stroke="{colour}" stroke-width="2"/>'
    yield f'<path d="M{tip} {height}l{step} -5v10z" fill="{colour}"/>'
    place = f'x="{(tail + tip) // 2}" y="{height - 6}" font-size="12" text-anchor="middle"'
    yield _text(place, label, colours["soft"])


def _upright_arrow(
    ends: tuple[Box, Box], left: int, label: str, colours: Mapping[str, str]
) -> Iterator[str]:
    """Draw an upright arrow between two boxes, with its label to the right of the line."""
    start, end = ends
    tail, tip, step = _span((start.top, start.height), (end.top, end.height))
    colour = colours["line"]
    yield f'<path d="M{left} {tail}V{tip + step}" stroke="{colour}" stroke-width="2"/>'
    yield f'<path d="M{left} {tip}l-5 {step}h10z" fill="{colour}"/>'
    place = f'x="{left + 9}" y="{(tail + tip) // 2 + 4}" font-size="12"'
    yield _text(place, label, colours["soft"])


def _rectangle(box: Box, fill: str, edge: str, *, radius: int) -> str:
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" '
        f'rx="{radius}" fill="{fill}" stroke="{edge}"/>'
    )


def _text(place: str, text: str, colour: str) -> str:
    return f'<text {place} fill="{colour}">{escape(text)}</text>'


def write_all(directory: Path) -> None:
    """Write each picture in each set of colours."""
    directory.mkdir(parents=True, exist_ok=True)
    for text in sorted(_TEXTS.glob("*.txt")):
        for name, colours in COLOURS.items():
            picture = render(text.read_text("utf-8"), colours)
            (directory / f"{text.stem}-{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(*sys.argv[1:2] or ["docs/images"]))
