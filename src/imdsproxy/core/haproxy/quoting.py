"""The only place that escapes words for an HAProxy configuration file.

Source: HAProxy configuration manual, section 2.2 "Quoting and escaping". A word is written bare where every
character is harmless and inside strong quotes otherwise, since nothing is expanded between them.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["UnquotableWord", "render_word"]

_BARE: Final = re.compile(r"[A-Za-z0-9_./:@%,|!=<>+*?^~(){}\[\]-]+")
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class UnquotableWord(ValueError):
    """The word holds a line break, NUL or another control character: no quoting makes it safe."""


def render_word(word: str) -> str:
    """One word of a configuration line, quoted if it must be.

    Raises:
        UnquotableWord: The word holds a control character other than TAB.
    """
    # Nearly all words are bare, and a thousand networks have twenty thousand of them.
    if _BARE.fullmatch(word):
        return word
    if _FORBIDDEN.search(word):
        raise UnquotableWord(f"control character in {word!r}")
    return "'" + word.replace("'", "'\\''") + "'"
