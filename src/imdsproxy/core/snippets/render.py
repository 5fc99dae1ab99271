"""A snippet out of a guest, and text out of a snippet."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets.gate import Gate, plan_gate
from imdsproxy.core.snippets.incus import incus_parts
from imdsproxy.core.snippets.libvirt import libvirt_parts
from imdsproxy.core.snippets.model import Guest, Part, Snippet, Target
from imdsproxy.core.snippets.proxmox import proxmox_parts
from imdsproxy.core.snippets.qemu import qemu_parts

_WIDTH: Final = 96

_Parts: TypeAlias = Callable[[Guest, Gate], tuple[Part, ...]]
_TARGETS: Final[Mapping[Target, _Parts]] = {
    Target.QEMU: qemu_parts,
    Target.LIBVIRT: libvirt_parts,
    Target.PROXMOX: proxmox_parts,
    Target.INCUS: incus_parts,
}


def render_snippet(guest: Guest, target: Target, dialect: Dialect) -> Snippet:
    """Everything that makes `guest` ask for the documents of `dialect`, which its record must have."""
    return Snippet(target, dialect, _TARGETS[target](guest, plan_gate(dialect)))


def render_text(snippet: Snippet) -> str:
    """The snippet for people: each part under a comment that says where it goes."""
    blocks = []
    for part in snippet.parts:
        comment = _comment(f"{part.kind}: {part.place}", xml=snippet.target is Target.LIBVIRT)
        blocks.append(f"{comment}\n{part.text}" if part.text else comment)
    return "\n\n".join(blocks) + "\n"


def _comment(text: str, *, xml: bool) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    if not xml:
        return "\n".join(f"# {line}" for line in lines)
    # Two hyphens end an XML comment's right to be one.
    safe = [line.replace("--", "- -") for line in lines]
    return "<!-- " + "\n     ".join(safe) + " -->"
