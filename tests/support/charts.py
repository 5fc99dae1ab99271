"""Panels of the dashboard drawn as one SVG, from what a Prometheus answers: for the documents."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Final

_WIDTH, _HEIGHT, _GAP = 460, 230, 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 58
_COLOURS: Final = (
    "#3274d9",
    "#e0752d",
    "#37872d",
    "#c4162a",
    "#8f3bb8",
    "#b8860b",
    "#1f8a8a",
    "#777",
)
_STYLE: Final = """
text{{font:12px system-ui,sans-serif;fill:{text}}} .title{{font-weight:600;font-size:14px}} .small{{font-size:11px}}
.panel{{fill:{panel};stroke:{edge}}} .grid{{stroke:{edge};stroke-width:.6}}
"""
SCHEMES: Final[Mapping[str, Mapping[str, str]]] = {
    "light": {"text": "#24292f", "panel": "#ffffff", "edge": "#d0d7de"},
    "dark": {"text": "#e6edf3", "panel": "#161b22", "edge": "#30363d"},
}
"""Colours of text, panels and lines, by the name of the scheme."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One of them.

    Attributes:
        unit: As Grafana names it: `s`, `reqps`, …
        lines: Moments and values, by what the legend says.
    """

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], scheme: str, *, columns: int = 2) -> str:
    """Draw the panels as one SVG, in one of `SCHEMES`."""
    rows = -(-len(panels) // columns)
    width, height = columns * (_WIDTH + _GAP) + _GAP, rows * (_HEIGHT + _GAP) + _GAP
    body = "".join(
        _panel(
            panel,
            _GAP + number % columns * (_WIDTH + _GAP),
            _GAP + number // columns * (_HEIGHT + _GAP),
        )
        for number, panel in enumerate(panels)
    )
    titles = ", ".join(panel.title for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(titles)}"><style>{_STYLE.format(**SCHEMES[scheme])}</style>{body}</svg>\n'
    )


def _panel(panel: Panel, x: int, y: int) -> str:
    # What is always 0 says nothing beside what is not.
    moved = {name: line for name, line in panel.lines.items() if any(value for _, value in line)}
    panel = replace(panel, lines=moved or panel.lines)
    points = [point for line in panel.lines.values() for point in line]
    begin, end = min(at for at, _ in points), max(at for at, _ in points)
    most = max(value for _, value in points) or 1.0
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(at: float, value: float) -> str:
        right = _LEFT + wide * (at - begin) / ((end - begin) or 1)
        return f"{right:.1f},{_TOP + high * (1 - value / most):.1f}"

    parts = [f'<rect class="panel" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>',
             f'<text class="title" x="12" y="21">{escape(panel.title)}</text>']  # fmt: skip
    for part in (0, 0.5, 1):
        level = _TOP + high * (1 - part)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level}" y2="{level}"/>'
        )
        number = _spell(most * part, panel.unit)
        parts.append(
            f'<text class="small" text-anchor="end" x="{_LEFT - 5}" y="{level + 4}">{number}</text>'
        )
    for part in (0, 0.5, 1):
        anchor = ("start", "middle", "end")[round(part * 2)]
        passed = f"{(end - begin) * part:.0f} s"
        parts.append(
            f'<text class="small" text-anchor="{anchor}" x="{_LEFT + wide * part}" '
            f'y="{_TOP + high + 15}">{passed}</text>'
        )
    parts += _lines(panel, place)
    return f'<g transform="translate({x},{y})">{"".join(parts)}</g>'


def _lines(panel: Panel, place: Callable[[float, float], str]) -> Iterable[str]:
    right, down = 12.0, _HEIGHT - 24
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(at, value) for at, value in line)
        yield f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>'
        needed = 26 + 6.4 * len(name)
        if right + needed > _WIDTH:
            right, down = 12.0, down + 16
        yield f'<rect x="{right}" y="{down - 8}" width="10" height="4" fill="{colour}"/>'
        yield f'<text class="small" x="{right + 14}" y="{down}">{escape(name)}</text>'
        right += needed


def _spell(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
    number = f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"
    return f"{number}/s" if unit == "reqps" and value else number
