"""What imdsproxy wants of HAProxy to text: sorted where order means nothing, the same text for the same spec."""

from __future__ import annotations

from imdsproxy.core.haproxy.build import build_sections
from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.section import BANNER, render_section, render_sections

__all__ = ["BANNER", "render_config", "render_section"]


def render_config(spec: DataplaneSpec) -> str:
    """The configuration file's text, its first line a banner with the hash of the rest.

    Raises:
        UnquotableWord: A name or path holds a control character.
    """
    return render_sections(build_sections(spec))
